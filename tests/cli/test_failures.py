"""What ends a command, in a sentence and a status."""

import errno
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_isdpo.cli import main
from lit_isdpo.cli.failures import EX_IOERR, EX_OSERR, EX_USAGE, RankDiedError, explain
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.types import InputError


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        pytest.param(InputError("data.train: no such file."), EX_USAGE, "data.train: no such file.", id="input"),
        pytest.param(
            OSError(errno.ENOSPC, "", "last.ckpt"), EX_IOERR, "No space left on device: 'last.ckpt'", id="full"
        ),
        pytest.param(OSError(errno.EROFS, "", b"events"), EX_IOERR, "Read-only file system: 'events'", id="bytes"),
        pytest.param(RankDiedError("Rank 1 died"), EX_OSERR, "Rank 1 died; this one cannot go on alone", id="rank"),
        pytest.param(torch.distributed.DistNetworkError("reset"), EX_OSERR, "Another rank died", id="network"),
        pytest.param(RuntimeError("DataLoader worker (pid 7) is killed"), EX_OSERR, "(pid 7) is killed", id="worker"),
    ],
)
def test_what_is_no_defect_has_a_sentence(error: Exception, status: int, words: str) -> None:
    wrapped = RuntimeError("in a constructor")
    wrapped.__context__ = error
    failure = explain(wrapped)
    assert failure is not None
    assert failure.status == status
    assert words in failure.sentence


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "", "x"), RuntimeError("shapes"), KeyError("x")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        (f"{PreferenceModule.__module__}.PreferenceModule.training_step", CUDA, "for a training step (CUDA out of"),
        (f"{PreferenceModule.__module__}.PreferenceModule.training_step", CPU, "lower data.micro_batch_size or"),
        (f"{PreferenceModule.__module__}.PreferenceModule.training_step", MemoryError(), "gradient_checkpointing to"),
        (f"{PreferenceModule.__module__}.PreferenceModule.validation_step", CUDA, "lower data.eval_batch_size"),
        ("lit_isdpo.training.probe.Evaluator", CUDA, "for the probe of a validation (CUDA out of memory"),
        ("lit_isdpo.training.language.LanguageModule.configure_model", CUDA, "for this command (CUDA out of memory"),
    ],
)
def test_out_of_memory(
    place: str,
    error: Exception,
    words: str,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error.with_traceback(None)

    monkeypatch.setattr(place, fail)
    with pytest.raises(SystemExit, match=str(EX_OSERR)):
        main(["fit", *tiny, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert words in said
    assert "lit-isdpo plan with the same options tells what a fit needs" in said


def test_an_error_that_comes_from_itself_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert explain(first) is None


def test_what_a_logger_could_not_write_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls it a value that it cannot log."""
    logger = TensorBoardLogger(tmp_path)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "events")

    monkeypatch.setattr(logger.experiment, "add_scalar", refuse)
    with pytest.raises(ValueError, match="you tried to log") as raised:
        logger.log_metrics({"loss": 1.0}, step=0)
    failure = explain(raised.value)
    assert failure is not None
    assert failure.status == EX_IOERR
    assert "Read-only file system" in failure.sentence
