"""What ends a command that is no mistake of the program's, in a sentence and an exit status."""

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_isdpo.types import InputError

EX_USAGE = 2  # what argparse has
EX_OSERR = 71  # sysexits.h: a process is not there
EX_IOERR = 74  # likewise: reading or writing failed
OF_THE_SYSTEM = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE),
)
KEPT = (
    "What was saved before is whole: mend it and give the same command again, a fit with --ckpt_path of its last.ckpt."
)


class Failure(NamedTuple):
    """A sentence for the user, and the status that the process ends with."""

    sentence: str
    status: int


def explain(error: BaseException) -> Failure | None:
    """What an error, or one that it comes from, says to a user; ``None`` where it is a defect of the program."""
    causes = list(_causes(error))
    for cause in causes:  # the parser wraps what constructors raise
        if isinstance(cause, InputError | MisconfigurationException):
            return Failure(str(cause), EX_USAGE)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in OF_THE_SYSTEM:
            where = (
                f": {os.fsdecode(cause.filename)!r}" if isinstance(cause.filename, str | bytes | os.PathLike) else ""
            )
            return Failure(f"{os.strerror(cause.errno)}{where}. {KEPT}", EX_IOERR)
        if "os error " in str(cause) and type(cause).__module__.startswith("safetensors"):
            return Failure(f"{cause}. {KEPT}", EX_IOERR)
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader worker (pid"):
            first = str(cause).splitlines()[0].rstrip(". ")
            return Failure(
                f"data.num_workers: {first}; it may have been out of memory: use fewer, or 0. {KEPT}", EX_OSERR
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
