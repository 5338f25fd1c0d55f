"""Work in processes of its own: what fails, hangs or fills a GPU there leaves the others alone."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

START = "GPU_CHECK_START"  # environment: how processes start, fork or spawn


class Failed(NamedTuple):
    """What a process says that failed."""

    error: str


def started_by() -> str:
    """A fork has imported everything already; where CUDA cannot be used in one, a new process imports it again."""
    return os.environ.get(START, "fork")


def context() -> Any:
    """Makes processes so."""
    return multiprocessing.get_context(started_by())


def started(module: str, *arguments: Any, log: Path) -> BaseProcess:
    """Starts a module's ``run`` in a process with a session of its own, whose output goes to a file."""
    process: BaseProcess = context().Process(target=_work, args=(module, arguments, log))
    process.start()
    return process


def end(process: BaseProcess) -> None:
    """Kills a process of ``started`` with all that it has started."""
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # it ended, or has not got its session yet
        process.kill()
    process.join()


def _work(module: str, arguments: tuple[Any, ...], log: Path) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)  # a fork of a process that has computed on several would wait for them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(module).run(*arguments)


def _end_with_parent() -> None:
    """Ends this session when the check is killed: nobody would use the GPU's results any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose memory is free afterwards.

    Raises:
        RuntimeError: it failed there; with the last line of its error.
    """
    receiver, sender = context().Pipe(duplex=False)
    process = context().Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        result = Failed(f"{function.__name__} ended with status {process.exitcode}")
    process.join()
    if isinstance(result, Failed):
        raise RuntimeError(result.error)
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = Failed(traceback.format_exception_only(error)[-1].strip()[:500])
    sender.send(result)
