"""What ends a command, in a sentence and a status."""

import errno
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_isdpo.training.failures import EX_IOERR, EX_OSERR, EX_USAGE, RankDiedError, explain
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
