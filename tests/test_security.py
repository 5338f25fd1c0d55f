"""Files from others: no code of theirs runs, nothing outside their folders is touched, and no secret is kept."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_in_parts
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lit_isdpo.cli import main
from lit_isdpo.training.checkpoint_files import EXTRAS, INDEX, StoredCheckpoint
from tests.conftest import newest_run
from tests.ranks import run_on_ranks


class Payload:
    """Pickled, it makes a folder where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """There if code ran."""
    return tmp_path / "code_ran"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    main(["fit", *tiny, "--trainer.max_steps=1", f"--trainer.default_root_dir={root}", "--checkpoint.monitor=val/loss"])
    return newest_run(root)


VERBS = ("fit", "validate", "test", "predict", "export")


def arguments_of(verb: str, checkpoint: Path, tiny: list[str], pairs_file: str, folder: Path) -> list[str]:
    if verb == "export":
        return [verb, f"--ckpt_path={checkpoint}", f"--output_dir={folder / 'exported'}"]
    options = [*tiny, "--trainer.max_steps=2", f"--data.test={pairs_file}", f"--trainer.default_root_dir={folder}"]
    return [verb, *options, f"--ckpt_path={checkpoint}"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_runs_no_code(
    verb: str,
    run: Path,
    tiny: list[str],
    pairs_file: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what some advise for older checkpoints
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "more": Payload(trace)}, file)
    assert "could run code" in refusal(arguments_of(verb, file, tiny, pairs_file, tmp_path), capsys)
    assert not trace.exists()


def test_the_trainer_is_told_so_too(run: Path, tiny: list[str], tmp_path: Path, trace: Path, monkeypatch: Any) -> None:
    """Behind the check of the command line: a file that was changed in between, say."""
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "more": Payload(trace)}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("lit_isdpo.cli.check", lambda *_: None)
    with pytest.raises(Exception, match="Weights only load failed"):
        main(["validate", *tiny, f"--ckpt_path={file}", f"--trainer.default_root_dir={tmp_path}"])
    assert not trace.exists()


def test_nobody_switches_that_off(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "weights_only" in refusal(["validate", *tiny, "--weights_only=false"], capsys)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint as ranks write it."""
    folder = tmp_path / "sharded.ckpt"
    state = {"state_dict": {"policy.model.weight": torch.ones(2)}, "optimizer_0": {"lr": 0.1}}
    save_in_parts(state, storage_writer=FileSystemWriter(folder, single_file_per_rank=True), no_dist=True)
    torch.save({"global_step": 1}, folder / EXTRAS)
    StoredCheckpoint(folder)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("part", [EXTRAS, INDEX, "outside"])
def test_a_sharded_checkpoint_runs_no_code_and_stays_in_its_folder(
    part: str, sharded: Path, trace: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if part == EXTRAS:
        torch.save({"global_step": 1, "more": Payload(trace)}, sharded / EXTRAS)
    else:
        index = pickle.loads((sharded / INDEX).read_bytes())
        if part == INDEX:
            index.planner_data = Payload(trace)
        else:
            for stored in index.storage_data.values():
                stored.relative_path = f"../{stored.relative_path}"
        (sharded / INDEX).write_bytes(pickle.dumps(index))
    said = refusal(["validate", *tiny, "--trainer.strategy=fsdp2", f"--ckpt_path={sharded}"], capsys)
    assert "cannot be read as a checkpoint" in said
    assert not trace.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_optimizer_runs_no_code(tiny: list[str], trace: Path, tmp_path: Path) -> None:
    """Its plain values are pickles in the files of the tensors, which torch reads as any."""
    fit = ["fit", *tiny, "--trainer.strategy=fsdp2", "--probe.num_prompts=0", "--trainer.limit_val_batches=0"]
    run_on_ranks([[*fit, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'stopped'}"]], size=1)
    checkpoint = newest_run(tmp_path / "stopped") / "checkpoints" / "last.ckpt"
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    commands = []
    for name in ("as it was", "changed"):
        copy = tmp_path / name
        save_in_parts(state, storage_writer=FileSystemWriter(copy, single_file_per_rank=True), no_dist=True)
        shutil.copy(checkpoint / EXTRAS, copy)
        target = f"--trainer.default_root_dir={tmp_path / 'resumed' / name}"
        commands.append([*fit, "--trainer.max_steps=2", f"--ckpt_path={copy}", target])
        state["optimizer_0"]["param_groups"][0]["lr"] = Payload(trace)
    with pytest.raises(AssertionError, match=r"error: ckpt_path: .*changed.* could run code"):
        run_on_ranks(commands, size=1)
    assert newest_run(tmp_path / "resumed" / "as it was")
    assert not (tmp_path / "resumed" / "changed" / "version_0" / "checkpoints").exists()
    assert not trace.exists()
