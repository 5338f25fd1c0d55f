"""Runs in processes of their own: what fails is named, what is done is not done again, a killed study ends its runs."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_isdpo.study.plan import Run
from lit_isdpo.study.runner import execute, is_done
from lit_isdpo.types import InputError

STUB = "cli_stub"


def run_of(name: str, *arguments: str) -> Run:
    return Run("toy", name, {}, 0, arguments, "1")


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    importlib.import_module(STUB)


def calls(run: Run, root: Path) -> list[str]:
    return (root / run.folder / "calls.txt").read_text().splitlines()


def test_good_runs_are_done_once_and_failed_ones_are_named(tmp_path: Path) -> None:
    good, bad = run_of("good"), run_of("bad", "--fails=true")
    (tmp_path / good.folder / "version_0" / "checkpoints").mkdir(parents=True)
    last = tmp_path / good.folder / "version_0" / "checkpoints" / "last.ckpt"
    last.touch()  # it was cut off before
    assert execute([good, bad], tmp_path, 2, cli=STUB) == [bad]
    assert is_done(good, tmp_path)
    assert not is_done(bad, tmp_path)
    assert "error: no such data" in (tmp_path / bad.folder / "output.log").read_text()
    (call,) = calls(good, tmp_path)
    assert call.startswith("fit ")
    assert f"--ckpt_path={last}" in call
    assert (tmp_path / good.folder / "lab").resolve() == (tmp_path / "lab").resolve()
    assert execute([good, bad], tmp_path, 2, cli=STUB) == [bad]
    assert len(calls(good, tmp_path)) == 1
    assert len(calls(bad, tmp_path)) == 2


def test_nothing_is_run_where_one_kind_of_run_cannot_be_parsed(tmp_path: Path) -> None:
    good, wrong = run_of("good"), run_of("wrong", "--is_wrong=true")
    with pytest.raises(InputError, match=r"^toy, wrong, seed 0: no such option$"):
        execute([good, wrong], tmp_path, 2, cli=STUB)
    assert not (tmp_path / good.folder).exists()


SCRIPT = """
from pathlib import Path
from lit_isdpo.study.plan import Run
from lit_isdpo.study.runner import execute
if __name__ == "__main__":
    execute([Run("toy", "long", {}, 0, ("--lasts=30",), "1")], Path("runs"), 1, cli="cli_stub")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_study_leaves_no_run_behind(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    study = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    folder = tmp_path / "runs" / "toy" / "long-seed=0-1"
    deadline = time.monotonic() + 120
    while not (folder / "calls.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    study.send_signal(how)
    study.wait(60)
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert left == ""
    assert not (folder / "ended.txt").exists()
    assert not (folder / "done.json").exists()
