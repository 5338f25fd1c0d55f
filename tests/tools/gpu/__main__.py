"""Does everything work on a GPU, and how fast is it? ``python -m tests.tools.gpu [--seconds 330] [--only STEP ...]``.

The check runs its steps one after another and begins with the most valuable ones. Each step is a process with a time
limit. The check writes ``gpu.md`` and ``gpu.json`` after every finding, so that they survive if it is cut off. If a
step fails, the report shows its last lines, and the next step runs. The exit status is 1 if a step or check failed.

``--device cpu`` runs a tiny version of every step that a CPU can run. ``python -m tests.tools.gpu.wheels`` downloads
the missing packages for a machine without network.

{steps}
"""

import argparse
import importlib
import json
import math
import os
import platform
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from tests.tools.gpu import processes
from tests.tools.gpu.report import failures, report
from tests.tools.gpu.sheet import Sheet, read


class Step(NamedTuple):
    """A step: a module of this folder with a function ``run(sheet)``.

    Attributes:
        module: its name.
        seconds: its time limit in a whole check. If it is the only step, it may use all of the time.
        about: one line for the help.
    """

    module: str
    seconds: float
    about: str


STEPS = {
    "numerics": Step("numerics", 30, "the same pairs on CPU and GPU, in every layout; the head; sampling and scoring"),
    "fit": Step("fits", 55, "the quickstart and 135M parameters in bfloat16: first-step gate, resume, export"),
    "speed": Step("speed", 100, "pairs per second and memory beside TRL, on three shapes of rows"),
    "kernels": Step("kernels", 40, "FlexAttention with packed rows, compiled layers, fused AdamW"),
    "ranks": Step("ranks", 30, "ddp and fsdp2 on one rank equal one device"),
    "memory": Step("memory", 25, "the plan against the measured peak, four settings"),
    "sampling": Step("sampling", 20, "tokens per second, the probe, a step of HyPO and of RLOO"),
    "profile": Step("profiling", 15, "host synchronizations, casts, the longest kernels"),
}
WHOLE = 330.0  # seconds, which the steps share with imports
SMALLEST = 5.0  # seconds; with less left a step is not started
PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "jsonargparse", "trl")
PRELOADED = ("lit_isdpo.cli", "peft", "datasets", "trl", "torch._dynamo", "torch.profiler", "torch.utils.tensorboard")
PRELOADED += ("transformers.models.llama.modeling_llama", "torch._inductor.compile_fx", "trl.trainer.dpo_trainer")


def main() -> int:
    """Runs the steps that were asked for."""
    described = "\n".join(f"{name}: {step.about}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.gpu",
        description=str(__doc__).replace("{steps}", described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for the whole check, imports included")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("1b", "3b", "8b_lora"), default="1b", help="what `speed` trains")
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() == 0:
        parser.error("there is no CUDA GPU here; --device cpu tries a tiny part of each step")
    root = given.output.resolve()
    (root / "steps").mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m tests.tools.gpu", *sys.argv[1:]])
    results: dict[str, Any] = {"command": command, "date": date.today().isoformat(), "machine": {}, "steps": {}}
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as work:
        sheet = Sheet("", given.device, root, Path(work), monotonic() + given.seconds, given.model)
        try:
            _check(sheet, given.only, given.seconds, results)
        except KeyboardInterrupt:
            print(f"Stopped; what was found is in {root / 'gpu.md'}")
            return 130
    print((root / "gpu.md").read_text())
    bad = failures(results)
    print(f"{len(bad)} came out badly{': ' if bad else '.'}{'; '.join(bad)}")
    return 1 if bad else 0


def _check(sheet: Sheet, names: list[str], seconds: float, results: dict[str, Any]) -> None:
    """Runs all steps within the time that is left."""
    missing = _import_all()
    machine = _machine(sheet, results)
    sheet = replace(sheet, rate=machine.pop("rate", math.nan))
    results["machine"] = machine | _versions()
    results["machine"] |= {f"{name} cannot be imported:": error for name, error in missing.items()}
    for name in names:
        left = sheet.left
        limit = left if len(names) == 1 else min(left, STEPS[name].seconds * max(1.0, seconds / WHOLE))
        if left < SMALLEST:
            results["steps"][name] = _step_result("not started: no time was left", 0, [], [])
            continue
        own = replace(sheet, name=name, ends=monotonic() + limit)
        print(f"{name} ...", flush=True)
        step = _run(f"tests.tools.gpu.{STEPS[name].module}", own, limit, results)
        failed = [line["check"] for line in step["lines"] if "check" in line and not line["passed"]]
        print(f"{name}: {step['status']} after {step['seconds']:.0f} s; failed checks: {failed or 'none'}", flush=True)
    _write(sheet.root, results)


def _machine(sheet: Sheet, results: dict[str, Any]) -> dict[str, Any]:
    """Describes the machine, and decides how processes start."""
    for _ in range(2):
        step = _run("tests.tools.gpu.machine", replace(sheet, name="machine"), min(60.0, sheet.left), results={})
        cells: dict[str, Any] = next((line["cells"] for line in step["lines"] if "cells" in line), {})
        if not cells.pop("bad fork", False):
            break
        os.environ[processes.START] = "spawn"
    if step["status"] != "done":
        results["steps"]["machine"] = step
    return cells


def _import_all() -> dict[str, str]:
    """Imports what the steps need, once for all of them. Returns the errors by module."""
    missing = {}
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except Exception as error:  # the steps that need it report it
            missing[name] = f"{type(error).__name__}: {error}"[:200]
    return missing


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _run(module: str, sheet: Sheet, limit: float, results: dict[str, Any]) -> dict[str, Any]:
    """Runs a step, and writes its findings as they come."""
    for old in (sheet.file, sheet.log):
        old.unlink(missing_ok=True)
    began = monotonic()
    process = processes.started(module, sheet, log=sheet.log)
    known = -1
    try:
        while process.is_alive() and monotonic() - began < limit:
            process.join(0.25)
            lines = read(sheet.file)
            if results and len(lines) != known:
                known = len(lines)
                results["steps"][sheet.name] = _step_result("running", monotonic() - began, lines, [])
                _write(sheet.root, results)
        seconds = monotonic() - began
        is_late = process.is_alive()
    finally:
        processes.end(process)
    status = "cut off" if is_late else "done" if process.exitcode == 0 else "failed"
    last = (
        [] if status == "done" or not sheet.log.exists() else sheet.log.read_text(errors="replace").splitlines()[-12:]
    )
    step = _step_result(status, seconds, read(sheet.file), last)
    if results:
        results["steps"][sheet.name] = step
        _write(sheet.root, results)
    return step


def _step_result(status: str, seconds: float, lines: list[Any], last_lines: list[str]) -> dict[str, Any]:
    return {"status": status, "seconds": seconds, "lines": lines, "last_lines": last_lines}


def _write(root: Path, results: dict[str, Any]) -> None:
    """Replaces both files atomically: a kill leaves whole files."""
    for name, text in (("gpu.json", json.dumps(results, indent=1)), ("gpu.md", report(results))):
        part = root / f".{name}"
        part.write_text(text)
        part.replace(root / name)


if __name__ == "__main__":
    sys.exit(main())
