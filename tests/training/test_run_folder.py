"""Runs that are started together, each in a folder of its own."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_isdpo.cli import main
from lit_isdpo.training import run_folder
from lit_isdpo.training.run_folder import claimed
from tests.processes import start
from tests.runs import read_metrics

NUM_RUNS = 4


def folders(loggers: list[Logger]) -> list[str]:
    return [str(logger.log_dir) for logger in loggers]


def test_claims_at_once_give_different_folders(tmp_path: Path) -> None:
    together = Barrier(8)
    with ExitStack() as stack:

        def claim(_: int) -> list[str]:
            loggers = [TensorBoardLogger(tmp_path, name=""), CSVLogger(tmp_path, name="")]
            together.wait()
            return folders(stack.enter_context(claimed(loggers)))

        with ThreadPoolExecutor(8) as pool:
            found = [folder for _ in range(5) for folder in pool.map(claim, range(8))]
        assert all(tensorboard == csv for tensorboard, csv in found), "a run's logs are in one folder"
        assert len({folder for folder, _ in found}) == 40
    assert not list(tmp_path.iterdir()), "nothing was written to them"


def test_a_version_that_the_user_names_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    loggers = [CSVLogger(tmp_path, name="", version="mine"), TensorBoardLogger(tmp_path, name="")]
    with claimed(loggers) as given:
        assert folders(given) == [str(tmp_path / "mine"), str(tmp_path / "version_0")]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("logger", ["true", "false", "lightning.pytorch.loggers.CSVLogger"])
def test_a_command_that_fails_early_leaves_no_folder(
    logger: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.train=nowhere.jsonl", "--trainer.max_steps=1", f"--trainer.logger={logger}"]
    if "CSV" in logger:
        options.append(f"--trainer.logger.save_dir={tmp_path / 'logs'}")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny, *options, f"--trainer.default_root_dir={tmp_path}"])
    assert "data.train: no such file" in capsys.readouterr().err
    assert not list(tmp_path.rglob("version_*"))


@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
def test_everything_of_a_run_is_in_its_folder_whatever_the_logger(logger: str, tiny: list[str], tmp_path: Path) -> None:
    options = [f"--trainer.logger={logger}", "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]
    if logger != "false":
        options.append(f"--trainer.logger.save_dir={tmp_path / 'logs'}")
    main(["fit", *tiny, *options])
    (run,) = tmp_path.rglob("version_0")
    assert {"config.yaml", "model", "checkpoints"} <= {path.name for path in run.iterdir()}


@pytest.mark.slow
def test_runs_that_are_started_together_stay_apart(tiny: list[str], tmp_path: Path) -> None:
    """They also write the lab's model and the reference's log-probs at the same time."""
    root = tmp_path / "root"
    options = [*tiny, "--model.policy.path=lab:posts", "--model.reference.cache=true"]
    commands = [
        ["fit", *options, "--trainer.max_steps=2", f"--model.loss.beta={number + 1}", f"--seed_everything={number}"]
        for number in range(NUM_RUNS)
    ]
    outputs = [tmp_path / f"output{number}" for number in range(NUM_RUNS)]
    processes = [
        start("lit_isdpo", [*command, f"--trainer.default_root_dir={root}"], output, environment={})
        for command, output in zip(commands, outputs, strict=True)
    ]
    for process, output in zip(processes, outputs, strict=True):
        process.join(300)
        assert process.exitcode == 0, output.read_text()
    runs = sorted(root.glob("version_*"))
    assert len(runs) == NUM_RUNS
    betas = set()
    for run in runs:
        assert set(read_metrics(run)["train/loss"]) == {0, 1}
        assert len(list(run.glob("events.*"))) == 1
        assert (run / "checkpoints" / "last.ckpt").is_file()
        betas.add(yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["loss"]["init_args"]["beta"])
    assert betas == {1, 2, 3, 4}


def test_a_folder_that_another_run_makes_in_between_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run makes the version just before this one does, twice, and is gone in between."""
    make, lost = run_folder._make, [tmp_path / "version_0"] * 2

    def late(folder: Path) -> list[Path]:
        return [] if lost and lost.pop() == folder else make(folder)

    monkeypatch.setattr(run_folder, "_make", late)
    with claimed([TensorBoardLogger(tmp_path, name=""), CSVLogger(tmp_path, name="")]) as loggers:
        assert len({*folders(loggers)}) == 1
        assert Path(folders(loggers)[0]).is_dir()
