"""Runs in processes of their own: what fails is named, what is done is not done again, a killed study ends its runs."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from lit_isdpo.study.grid import Run, Variant
from lit_isdpo.study.runner import execute, is_done, study
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
    assert f"--config={tmp_path / good.folder / 'run.yaml'}" in call
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


def preparation(name: str, *arguments: str, needs: tuple[Run, ...] = ()) -> Run:
    return Run("toy", name, {}, 0, arguments, "2", needs, exports=True)


def upon(name: str, *needs: Run) -> Run:
    return Run("toy", name, {}, 0, (), "1", needs)


def test_what_a_run_needs_is_fitted_and_exported_before_it(tmp_path: Path) -> None:
    sft = preparation("sft", f"--waits_for={tmp_path / run_of('DPO').folder / 'lock'}")  # that needs nothing
    reward = preparation("reward", needs=(sft,))
    runs = [upon("RLOO", reward), upon("both", sft, reward), run_of("DPO")]
    assert execute(runs, tmp_path, 3, cli=STUB) == []
    for run in (sft, reward):
        folder = tmp_path / run.folder
        last = folder / "version_0" / "checkpoints" / "last.ckpt"
        fit, export = calls(run, tmp_path)
        assert fit.startswith("fit ")
        assert export == f"export --ckpt_path={last} --output_dir={folder / 'exported'}"
        assert is_done(run, tmp_path)
    ended = [(tmp_path / run.folder / "done.json").stat().st_mtime for run in (sft, reward)]
    started = [(tmp_path / run.folder / "lock").stat().st_mtime for run in (reward, *runs[:2])]
    assert ended[0] <= started[0]
    assert ended[1] <= min(started[1:])
    for run in (sft, reward):  # somebody needs the space
        (tmp_path / run.folder / "exported").rmdir()
    assert execute([*runs, upon("another", sft)], tmp_path, 3, cli=STUB) == []
    assert len(calls(sft, tmp_path)) == 4
    assert len(calls(reward, tmp_path)) == 2  # nobody needs it now


def test_a_preparation_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    marked, exporting = preparation("marked"), preparation("exporting")
    (tmp_path / marked.folder / "exported").mkdir(parents=True)
    half = tmp_path / exporting.folder / ".exported-x1"
    (half / "exported").mkdir(parents=True)
    assert execute([upon("RLOO", marked, exporting)], tmp_path, 2, cli=STUB) == []
    assert is_done(marked, tmp_path)
    assert not (tmp_path / marked.folder / "calls.txt").exists()
    assert [call.split()[0] for call in calls(exporting, tmp_path)] == ["fit", "export"]
    assert not half.exists()


@pytest.mark.parametrize("how", ["--fails=true", "--leaves=damaged"])
def test_what_builds_upon_a_failed_preparation_is_not_started(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = preparation("sft", how)
    reward = preparation("reward", needs=(sft,))
    good, rloo, other = run_of("good"), upon("RLOO", reward), upon("other", sft)
    assert execute([rloo, good, other], tmp_path, 1, cli=STUB) == [sft, reward, rloo, other]
    assert is_done(good, tmp_path)
    assert not is_done(sft, tmp_path)
    assert not any((tmp_path / run.folder).exists() for run in (reward, rloo, other))
    said = capsys.readouterr().out
    assert f"see {tmp_path / sft.folder / 'output.log'}; runs that build upon it and are not started: 3\n" in said


def test_a_preparation_is_parsed_too_before_anything_is_started(tmp_path: Path) -> None:
    wrong = preparation("RLOO", "--is_wrong=true")
    with pytest.raises(InputError, match=r"^toy, RLOO, seed 0: no such option$"):
        execute([run_of("good"), upon("RLOO", wrong)], tmp_path, 2, cli=STUB)
    assert not (tmp_path / "toy").exists()


def test_a_study_says_what_failed_and_what_was_not_started_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_isdpo.study.runner.execute", partial(execute, cli=STUB))
    reported = {}
    monkeypatch.setattr("lit_isdpo.study.report.write_report", lambda folder, **given: reported.update(given))
    with pytest.raises(InputError) as error:
        study(
            "A title",
            str(tmp_path / "report"),
            designs={"toy": Variant()},
            methods={"DPO": Variant(), "RLOO": Variant(options={"path": "{reward model}"})},
            seeds=[0],
            runs_dir=str(tmp_path / "runs"),
            num_workers=1,
            prepare={"reward model": Variant(options={"fails": True})},
        )
    (log,) = tmp_path.glob("runs/toy/reward_model-*/output.log")
    assert str(error.value) == (
        f"1 runs failed (the same command tries them again): toy, reward model, seed 0 ({log}); not started, as they "
        "build upon what failed: toy, RLOO, seed 0."
    )
    assert [run.method for run in reported["runs"]] == ["DPO"]
    assert reported["num_planned"] == 2


def small(folder: Path, **changes) -> dict[str, Any]:
    """Arguments of a study."""
    given = {"designs": {"toy": Variant()}, "methods": {"DPO": Variant(), "IS-DPO": Variant()}, "seeds": [0, 1]}
    given |= {"title": "A title", "output_dir": str(folder / "report"), "runs_dir": str(folder / "runs")}
    return given | changes


@pytest.mark.parametrize("name", ["toy/IS-DPO", "toy/IS-DPO-seed=4"])
def test_one_run_is_shown_and_none_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_isdpo.study.runner.CLI", STUB)
    options = {"model.loss.beta": 0.1}
    study(**small(tmp_path, seeds=[4], options=options), show=name)
    shown = json.loads(capsys.readouterr().out)
    folder = shown.pop("trainer.default_root_dir")
    assert folder.startswith(str(tmp_path / "runs" / "toy" / "IS-DPO-seed=4-"))
    assert shown == {"model.loss.beta": "0.1", "seed_everything": "4"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "toy/RPO",
            r"show: the study has no run 'toy/RPO'; it has, for example, toy/DPO-seed=0; .*IS-DPO-seed=1\.",
        ),
        (
            "toy/DPO",
            r"show: 'toy/DPO' is the name of 2 runs; name one, for example of .*DPO-seed=0; toy/DPO-seed=1\.",
        ),
    ],
)
def test_a_name_must_be_that_of_one_run(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        study(**small(tmp_path), show=name)


def test_runs_that_do_not_count_any_more_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("DPO-seed=0-12345678", "DPO-seed=1-12345678", "RPO-seed=0-12345678"):
        (tmp_path / "runs" / "toy" / name).mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "DPO-seed=0-12345678" / "done.json").touch()
    (tmp_path / "runs" / "toy" / "RPO-seed=0-12345678" / "done.json").touch()
    with pytest.raises(InputError, match="no run is done"):
        study(**small(tmp_path), report_only=True)
    said = capsys.readouterr().out
    assert said.startswith(f"1 runs are not done, although {tmp_path / 'runs'} has runs of their names that are")
    assert said.endswith("do not count: toy, DPO, seed 0.\n")


def test_a_study_without_such_runs_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no run is done"):
        study(**small(tmp_path), report_only=True)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_is_repeated_by_its_file_and_its_ranks_are_ranks_of_it(tmp_path: Path, tiny: list[str]) -> None:
    """With two ranks, which Lightning starts by the command line of the process."""
    flags = dict(option.removeprefix("--").split("=", 1) for option in tiny)
    options = {key: yaml.safe_load(value) for key, value in flags.items()}
    options |= {"trainer.max_steps": 2, "trainer.devices": 2, "trainer.strategy": "ddp"}
    given = small(tmp_path, methods={"DPO": Variant()}, seeds=[3], options=options, num_workers=1)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(given | {"designs": {"toy": {}}, "methods": {"DPO": {}}}))
    command = [sys.executable, "-m", "lit_isdpo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    run([*command, "study", "--config=study.yaml"])
    shown = run([*command, "study", "--config=study.yaml", "--show=toy/DPO"]).stdout
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    assert (folder / "run.yaml").read_text() == shown
    assert [file.name for file in folder.glob("version_*")] == ["version_0"]
    run([*command, "fit", f"--config={folder / 'run.yaml'}"])
    logs = [pd.read_csv(folder / f"version_{number}" / "metrics.csv") for number in (0, 1)]
    assert logs[0]["train/loss"].notna().sum() == 2
    pd.testing.assert_series_equal(logs[0]["train/loss"], logs[1]["train/loss"], check_exact=True)


SCRIPT = """
from pathlib import Path
from lit_isdpo.study.grid import Run
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
