"""The folder of a run, ``{default_root_dir}/version_N``, which no other run writes to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_isdpo.evaluation.store import naming


def run_dir(trainer: Trainer) -> Path:
    """The folder of this run, as rank 0 knows it. Every rank must call it.

    It is that of a logger which writes to a folder; with other loggers or none it is the root, of which the command
    line makes a new one for each run.
    """
    first = next(iter(trainer.loggers), None)
    own = first.log_dir if isinstance(first, TensorBoardLogger | CSVLogger) else trainer.default_root_dir
    folder: str = trainer.strategy.broadcast(own)
    return Path(folder)


@contextmanager
def claimed(loggers: Sequence[Logger]) -> Iterator[list[Logger]]:
    """Loggers whose folders exist and belong to no other run; a folder to which nothing is written is removed again.

    Lightning's loggers take the next version that is free when they look, which is the same for runs that are started
    together. ``mkdir`` succeeds for one of them only; the others look again. A version that the user names stays.

    Args:
        loggers: none of them has been used. Those whose version is free get the same one.
    """
    copies = [copy(one) if isinstance(one, TensorBoardLogger | CSVLogger) else one for one in loggers]
    # Lightning has no public way to tell a version that was given from one that is looked up when it is asked for.
    free = [one for one in copies if isinstance(one, TensorBoardLogger | CSVLogger) and one._version is None]
    unused = [copy(one) for one in free]
    while True:
        version = max((int(copy(one).version) for one in unused), default=0)
        for one in free:
            one._version = version
        folders = {Path(one.log_dir) for one in free}
        made = [place for folder in folders for place in _make(folder)]
        if folders <= {*made}:
            break
        _remove(made)
    try:
        yield copies
    finally:
        _remove(made)


def _make(folder: Path) -> list[Path]:
    """The folder and its parents, as far as this call has made them; nothing if the folder was there."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with naming(folder):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return []
    return missing


def _remove(folders: Sequence[Path]) -> None:
    for folder in sorted(folders, reverse=True):  # inner ones first
        with suppress(OSError):  # it holds something
            folder.rmdir()
