"""Stands for the command line in tests of the runner: logs its calls, and fails, waits or lasts as its flags say."""

import json
import sys
import time
from pathlib import Path

LONGEST_WAIT = 120  # seconds


def main(arguments: list[str]) -> None:
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments[1:] if "=" in argument)
    if arguments[-1] == "--print_config":
        if flags.get("is_wrong") == "true":
            print("error: no such option", file=sys.stderr)
            raise SystemExit(2)
        print(json.dumps(flags))
        raise SystemExit(0)
    if arguments[0] == "export":
        checkpoint, exported = Path(flags["ckpt_path"]), Path(flags["output_dir"])
        with (exported.parent / "calls.txt").open("a") as calls:
            calls.write(" ".join(arguments) + "\n")
        if checkpoint.read_text() == "damaged":
            raise SystemExit(2)
        exported.mkdir()  # an error where it is there already, as the real one
        return
    flags = json.loads(Path(flags["config"]).read_text()) | flags
    folder = Path(flags["trainer.default_root_dir"])
    with (folder / "calls.txt").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    print("what a run prints")
    if flags.get("fails") == "true":
        print("error: no such data", file=sys.stderr)
        raise SystemExit(2)
    time.sleep(float(flags.get("lasts", 0)))
    started = time.monotonic()
    while "waits_for" in flags and not Path(flags["waits_for"]).exists():
        if time.monotonic() - started > LONGEST_WAIT:
            raise SystemExit(f"error: {flags['waits_for']} does not come")
        time.sleep(0.05)
    (folder / "ended.txt").write_text("")
    last = folder / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True, exist_ok=True)
    last.write_text(flags.get("leaves", ""))
