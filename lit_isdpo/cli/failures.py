"""What ends a command that is no mistake of the program's, in a sentence and an exit status."""

import errno
import os
import traceback
from collections.abc import Iterator
from dis import opmap
from pathlib import Path
from socket import gethostname
from time import sleep
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_isdpo.policy.sharding import all_ranks
from lit_isdpo.types import InputError, first_line

EX_USAGE = 2  # what argparse has
EX_OSERR = 71  # sysexits.h: a process is not there, or not enough memory
EX_IOERR = 74  # likewise: reading or writing failed
OF_THE_SYSTEM = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE),
)
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")  # as PyTorch and CUDA say it
IN_A_STEP = "lower data.micro_batch_size or data.max_length, or set model.policy.gradient_checkpointing to true"
PLACES = {
    "lit_isdpo.training.evaluation": ("the evaluation", "lower evaluation.batch_size or evaluation.max_new_tokens"),
    "lit_isdpo.training.probe": ("the probe of a validation", "lower probe.batch_size or probe.max_new_tokens"),
    "lit_isdpo.evaluation.reference_logps": ("the reference's log-probs", "lower data.eval_batch_size"),
    "lightning.pytorch.loops.evaluation_loop": ("a validation or test", "lower data.eval_batch_size"),
    "lightning.pytorch.loops.prediction_loop": ("sampling", "lower data.eval_batch_size"),
    "lit_isdpo.training.rollouts": (
        "sampling in a training step",
        f"lower batch_size or max_new_tokens of model.rollout or model.on_policy_kl; or {IN_A_STEP}",
    ),
    "lightning.pytorch.loops.training_epoch_loop": ("a training step", IN_A_STEP),
}
"""Modules that a traceback leads through, inner ones first: what they do, and the options that count there."""
SECONDS_TO_DIE = 3  # between a connection that breaks and a process that is gone
KEPT = "What was saved before is whole: mend it and run the command again, a fit with --ckpt_path of its last.ckpt."


class Failure(NamedTuple):
    """A sentence for the user, and the status that the process ends with."""

    sentence: str
    status: int


class RankDiedError(Exception):
    """Ranks are no more; the message names them."""


class RankWatch(Callback):
    """Knows the processes of the other ranks, and says which of them died when one is waited for in vain.

    The process group tells that a connection broke, and not whose. Processes of other machines cannot be looked at.
    """

    def __init__(self) -> None:
        self._peers: list[tuple[int, str, int]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns rank, host and process id of all."""
        if trainer.world_size > 1:
            self._peers = all_ranks().gather((trainer.global_rank, gethostname(), os.getpid()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Looks who is not there.

        Raises:
            RankDiedError: somebody is not.
        """
        if not _is_of_ranks(exception):
            return
        for _ in range(SECONDS_TO_DIE * 10):
            dead = [rank for rank, host, pid in self._peers if host == gethostname() and not _is_alive(pid)]
            if dead:
                ranks = "Rank" if len(dead) == 1 else "Ranks"
                raise RankDiedError(f"{ranks} {', '.join(map(str, dead))} died") from exception
            sleep(0.1)


def _is_of_ranks(error: BaseException) -> bool:
    """Whether a collective failed, as gloo and NCCL say it."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # a dead child whose parent has not looked is still there, where there is /proc
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def explain(error: BaseException) -> Failure | None:
    """What an error, or one that it comes from, says to a user; ``None`` where it is a defect of the program."""
    causes = list(_causes(error))
    for cause in causes:  # the parser wraps what constructors raise
        if isinstance(cause, InputError | MisconfigurationException):
            return Failure(str(cause), EX_USAGE)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in OF_THE_SYSTEM:
            is_named = isinstance(cause.filename, str | bytes | os.PathLike)
            where = f": {os.fsdecode(cause.filename)!r}" if is_named else ""
            return Failure(f"{os.strerror(cause.errno)}{where}. {KEPT}", EX_IOERR)
        if "os error " in str(cause) and type(cause).__module__.startswith("safetensors"):
            return Failure(f"{cause}. {KEPT}", EX_IOERR)
        if _is_of_memory(cause):
            return Failure(_explain_memory(cause), EX_OSERR)
        if isinstance(cause, RankDiedError):
            return Failure(f"{cause}; this one cannot go on alone. {KEPT}", EX_OSERR)
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader worker (pid"):
            died = f"data.num_workers: {first_line(cause).rstrip('. ')}"
            return Failure(f"{died}; it may have been out of memory: use fewer, or 0. {KEPT}", EX_OSERR)
    for cause in causes:  # after the system: what a logger could not write, Lightning calls a value of a wrong kind
        if isinstance(cause, ValueError | TypeError) and _lightning_raised(cause):  # it refuses arguments so too
            return Failure(str(cause), EX_USAGE)
        if package := _missing_package(cause):
            return Failure(f"A package is not installed: {package}", EX_USAGE)
        if _is_of_ranks(cause):
            return Failure(f"Another rank died or is out of reach ({first_line(cause)}). {KEPT}", EX_OSERR)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it comes from; one that was raised again while it was handled comes from itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, was not enough."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def _explain_memory(error: BaseException) -> str:
    """Where memory was not enough, and which options need less of it there."""
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    place, options = next((what for module, what in PLACES.items() if module in modules), ("this command", IN_A_STEP))
    return (
        f"There is not enough memory for {place} ({first_line(error).rstrip('. ')}): {options}; "
        f"lit-isdpo plan with the same options tells what a fit needs. {KEPT}"
    )


def _missing_package(error: BaseException) -> str:
    """What Lightning says of a package that one of its classes needs, or nothing.

    A class says so when it is made. Where its annotations name types of the package, the parser fails before.
    """
    if isinstance(error, ImportError) and _lightning_raised(error):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, NameError) and frames and frames[-1].f_code.co_filename == "<string>":  # the annotation
        needs = [value for name, value in frames[-1].f_globals.items() if name.endswith("_AVAILABLE") and not value]
        return "; ".join(map(str, needs))
    return ""


def _lightning_raised(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` in Lightning's code, and is no accident."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__")).startswith("lightning."):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == opmap["RAISE_VARARGS"]
