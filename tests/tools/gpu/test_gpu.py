"""The GPU check on a CPU, at tiny sizes, and its behavior when steps fail, hang or find something wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from time import monotonic
from typing import Any

import pytest

from tests.tools.gpu.__main__ import STEPS, _run
from tests.tools.gpu.report import failures, report
from tests.tools.gpu.sheet import Sheet, read


def check(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.tools.gpu", "--device=cpu", f"--output={output}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "COLUMNS": "200"})


@pytest.mark.slow
def test_every_step_runs_on_a_cpu(tmp_path: Path) -> None:
    """The report names what it skips: kernels of a GPU, and TRL if it is not installed."""
    done = check(tmp_path, "--seconds=2400")  # limits grow with it; this machine may be busy
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: step["status"] for name, step in found["steps"].items()} == dict.fromkeys(STEPS, "done")
    lines = [line for step in found["steps"].values() for line in step["lines"]]
    assert sum(line.get("passed", False) for line in lines) >= 50
    skipped = {line["skipped"] for line in lines if "skipped" in line}
    assert {"memory of the head", "backward of FlexAttention", "kernel launches"} <= skipped
    page = (tmp_path / "gpu.md").read_text()
    assert done.stdout.rstrip().endswith("0 came out badly.")
    for text in ("fp32 matmul", "| speed | done |", "### Pairs per second", "ours, live, compiled", "### The longest"):
        assert text in page


STEP = """
    import time
    def run(sheet):
        sheet.note("It begins.")
        sheet.row("Numbers", a=1.5, b="x|y")
        sheet.check("fine", 1.0, 2.0)
        {rest}
"""


def run_step(folder: Path, monkeypatch: pytest.MonkeyPatch, rest: str, limit: float = 60) -> dict[str, Any]:
    """The results of a check with a single step, whose module ends with ``rest``."""
    (folder / "a_step_of_its_own.py").write_text(dedent(STEP.format(rest=rest)))
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("a_step_of_its_own", None)
    (folder / "steps").mkdir()
    results: dict[str, Any] = {"command": "", "date": "", "machine": {}, "steps": {}}
    _run("a_step_of_its_own", Sheet("own", "cpu", folder, folder / "work", monotonic() + limit), limit, results)
    assert json.loads((folder / "gpu.json").read_text())["steps"] == results["steps"]
    assert (folder / "gpu.md").read_text() == report(results)
    return results


def test_a_step_that_fails_says_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_step(tmp_path, monkeypatch, "raise ValueError('a reason')")
    step = results["steps"]["own"]
    assert step["status"] == "failed"
    assert step["last_lines"][-1] == "ValueError: a reason"
    assert failures(results) == ["own failed"]
    assert "| 1.5 | x/y |" in report(results), "what it had found is there"


def test_a_step_that_hangs_is_cut_off_and_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = "import subprocess; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    started = monotonic()
    results = run_step(tmp_path, monkeypatch, hangs, limit=1.5)
    assert monotonic() - started < 20
    assert results["steps"]["own"]["status"] == "cut off"
    assert len(results["steps"]["own"]["lines"]) == 3


def test_a_check_that_does_not_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_step(tmp_path, monkeypatch, "sheet.check('too large', 3.0, 2.0); sheet.check('nan', float('nan'), 2)")
    assert results["steps"]["own"]["status"] == "done"
    assert failures(results) == ["own: too large", "own: nan"]


def test_a_line_that_was_not_written_whole_is_left_out(tmp_path: Path) -> None:
    sheet = Sheet("own", "cpu", tmp_path, tmp_path, 0)
    sheet.file.parent.mkdir()
    sheet.note("whole")
    with sheet.file.open("a") as file:
        file.write('{"note": "ha')
    assert read(sheet.file) == [{"note": "whole"}]


def test_without_a_gpu_there_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tools.gpu", f"--output={tmp_path}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 2
    assert "there is no CUDA GPU here; --device cpu" in done.stderr
    assert "Traceback" not in done.stderr
