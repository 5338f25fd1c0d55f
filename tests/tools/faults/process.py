"""The command line in a process of its own that can be injured, and what is left of it.

The process is a fork of a server that has imported everything, as the study's are: it lives and dies like
``python -m lit_isdpo``, without the seconds that the imports take.
"""

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_isdpo.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.tools.faults.process"])
TIMEOUT = 120  # seconds: a hang is a fault that was not survived
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.symlink", "shutil.rmtree")


@dataclass(frozen=True)
class Injury:
    """What happens to a process.

    Attributes:
        kind: ``kill`` (SIGKILL) or ``int`` (SIGINT to all of its group) ``at`` a file event, ``half`` a checkpoint
            written and then SIGKILL, ``limit`` on the size of a file, ``none``, which records the events.
        at: number of the event or of the checkpoint, or bytes.
    """

    kind: str = "none"
    at: int = 0


@dataclass
class Ended:
    """How a process ended."""

    status: int | None  # negative: the signal; None: it had to be ended
    printed: str
    events: list[str] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """Its last words."""
        lines = [line for line in self.printed.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Progress(Callback):
    """Tells from outside how far a fit has come."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"%8d" % trainer.global_step)
        os.close(descriptor)


def run(
    arguments: Sequence[str],
    folder: Path,
    injury: Injury = Injury(),
    *,
    during: Callable[[int], None] | None = None,
    rank: int | None = None,
    port: int = 0,
) -> Ended:
    """Runs one command to its end.

    Args:
        arguments: of the command line.
        folder: file events under it count; the log and the record of the events are beside it.
        injury: happens inside.
        during: is called with the process's id every few milliseconds, to injure it from outside.
        rank: of two, as torchrun would start it.
        port: of both.
    """
    suffix = "" if rank is None else f"-{rank}"
    log = folder.with_name(f"{folder.name}{suffix}.log")
    record = folder.with_name(f"{folder.name}{suffix}.events")
    for file in (log, record):
        file.unlink(missing_ok=True)
    world = {} if rank is None else _world(rank, port)
    process = CONTEXT.Process(target=_child, args=(list(arguments), str(folder), str(log), str(record), injury, world))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + TIMEOUT
    while process.is_alive() and time.monotonic() < deadline:
        if during is not None:
            during(process.pid)
        time.sleep(0.005)
    status = process.exitcode
    if status is None:
        shutil.copy(log, log.with_suffix(".hung"))
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    events = record.read_text().splitlines() if record.exists() else []
    return Ended(status, log.read_text(errors="replace") if log.exists() else "", events)


def _world(rank: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "faults"}
    return address | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _child(arguments: list[str], folder: str, log: str, record: str, injury: Injury, world: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(world)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    faulthandler.dump_traceback_later(TIMEOUT - 5, file=sys.__stderr__)  # of a hang
    torch.set_num_threads(1)
    if injury.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (injury.at, injury.at))
    elif injury.kind == "half":
        _kill_in_a_save(injury.at)
    else:
        _watch(folder, record, injury)
    sys.argv = ["lit-isdpo", *arguments]
    main(arguments)


def _watch(folder: str, record: str, injury: Injury) -> None:
    """Counts what is done to files of the folder, and injures at the event of that number."""
    events = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    owner, number = os.getpid(), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal number
        if event not in FILE_EVENTS or os.getpid() != owner:
            return
        if not any(isinstance(arg, str | os.PathLike) and os.fspath(arg).startswith(folder) for arg in args[:2]):  # type: ignore[arg-type]
            return
        if event == "open" and not (isinstance(args[1], str) and set("wax+") & set(args[1])):
            return
        names = [
            os.path.relpath(arg, folder) for arg in args[:2] if isinstance(arg, str | os.PathLike) and "/" in str(arg)
        ]
        os.write(events, f"{event} {' '.join(names)}\n".encode())
        if number == injury.at and injury.kind == "kill":
            os.kill(owner, signal.SIGKILL)
        if number == injury.at and injury.kind == "int":
            os.killpg(owner, signal.SIGINT)
        number += 1

    sys.addaudithook(hook)


def _kill_in_a_save(at: int) -> None:
    """Half of the ``at``-th checkpoint is written, and flushed, when the process dies."""
    save, number = torch.save, 0

    def half(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal number
        number += 1
        if number <= at:
            return save(obj, file, *args, **kwargs)
        if isinstance(file, str | os.PathLike):
            file = open(file, "wb")  # noqa: SIM115, PTH123 - dies with the process
        begin = file.tell()
        save(obj, file, *args, **kwargs)
        file.truncate(begin + (file.tell() - begin) // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")

    torch.save = half  # type: ignore[assignment]


def steps_done(file: Path) -> int:
    """What ``Progress`` wrote."""
    return int(file.read_text()) if file.exists() and file.read_text().strip() else 0
