"""Processes for single pieces of work: one that fails, hangs or fills the GPU does not disturb the others."""

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
    """The error of a process that failed."""

    error: str


def started_by() -> str:
    """``fork`` saves the imports. ``spawn`` imports everything again, and is needed if CUDA does not work in a fork."""
    return os.environ.get(START, "fork")


def context() -> Any:
    """Starts processes in that way."""
    return multiprocessing.get_context(started_by())


def started(module: str, *arguments: Any, log: Path) -> BaseProcess:
    """Starts a module's ``run`` in a new process and session, and sends its output to a file."""
    process: BaseProcess = context().Process(target=_work, args=(module, arguments, log))
    process.start()
    return process


def end(process: BaseProcess) -> None:
    """Kills a process of ``started`` and its children."""
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
    torch.set_num_threads(1)  # a fork would wait forever for the threads of its parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(module).run(*arguments)


def _end_with_parent() -> None:
    """Kills this session when the check itself is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process and returns its result. The process's memory is free afterwards.

    Raises:
        RuntimeError: the function failed; with the last line of its error.
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
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = Failed(traceback.format_exception_only(error)[-1].strip()[:500])
    sender.send(result)
