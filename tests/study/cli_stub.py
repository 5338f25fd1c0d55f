"""Stands for the command line in tests of the runner: logs its calls, and fails or lasts where told to."""

import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> None:
    if arguments[-1] == "--print_config":
        if "--is_wrong=true" in arguments:
            print("error: no such option", file=sys.stderr)
        raise SystemExit(2 if "--is_wrong=true" in arguments else 0)
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments[1:])
    folder = Path(flags["trainer.default_root_dir"])
    with (folder / "calls.txt").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    print("what a run prints")
    if flags.get("fails") == "true":
        print("error: no such data", file=sys.stderr)
        raise SystemExit(2)
    time.sleep(float(flags.get("lasts", 0)))
    (folder / "ended.txt").write_text("")
