"""Commands as processes of their own, without the ten seconds of imports that each would begin with.

Each is a fork of a server that has imported this project and nothing else: a clean process, with its own folder,
environment, arguments and output, as ``python -m`` gives it.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")


def start(
    module: str, arguments: Sequence[str], output: Path, *, environment: Mapping[str, str], folder: Path | None = None
) -> BaseProcess:
    """Starts ``python -m module arguments``.

    Args:
        module: by its name.
        arguments: its own.
        output: the file that gets what it prints, errors too.
        environment: on top of this process's own.
        folder: that it runs in; by default this process's.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server's, as libraries read it when they are imported
    CONTEXT.set_forkserver_preload(["lit_isdpo.cli"])
    settings = {**os.environ, **environment}
    process = CONTEXT.Process(target=_run, args=(module, list(arguments), output, settings, folder or Path.cwd()))
    process.start()
    return process


def _run(module: str, arguments: list[str], output: Path, environment: dict[str, str], folder: Path) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(environment)
    # It has taken over the server's way to start processes; workers of a loader would each import everything.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
