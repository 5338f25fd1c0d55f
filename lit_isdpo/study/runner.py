"""Runs side by side, each in a process of its own, so that one that fails takes no other with it."""

import fcntl
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from math import inf
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_isdpo.evaluation.store import write_text
from lit_isdpo.study.grid import EXPORTED, Run
from lit_isdpo.types import InputError

CLI = "lit_isdpo.cli"  # by its name, as a user calls it: this room is below the command line
DONE = "done.json"
LOG = "output.log"
SHARED_LAB = "lab"


def is_done(run: Run, root: Path) -> bool:
    """Whether a run has ended well, in this study or another; a preparation must have its model still."""
    folder = root / run.folder
    return (folder / DONE).is_file() and (not run.exports or (folder / EXPORTED).is_dir())


def execute(runs: Sequence[Run], root: Path, num_workers: int, cli: str = CLI) -> list[Run]:
    """Makes the runs that are not done yet, and returns those that failed.

    What a run prints is in its folder, ``output.log``. One that was cut off goes on from its last checkpoint. Where
    there are GPUs, the workers take them in turn. What runs need is made before them; where it failed they are not
    started, and count as failed.

    Args:
        runs: of the study.
        root: the folder of runs.
        num_workers: processes at a time.
        cli: module whose ``main`` is called.

    Raises:
        InputError: the options of a run cannot be parsed; none has been started.
        KeyboardInterrupt: the user stopped the study; the runs have saved where they were.
    """
    total = len(_with_needs(runs))
    missing = _with_needs([run for run in runs if not is_done(run, root)], root)
    waiting = list(missing.values())
    # A fork of a server that has imported everything: a clean process, without the seconds that the imports take.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([cli])
    # What is wrong in a study's file is told at once, and not hours later where a run of a kind is first made.
    kinds = {(run.exports, run.design, run.method, *run.settings.items()): run for run in waiting}.values()
    with ProcessPoolExecutor(min(num_workers, len(kinds)) or 1, mp_context=context) as pool:
        for run, error in zip(kinds, pool.map(partial(_parse, cli=cli), kinds), strict=True):
            if error:
                pool.shutdown(cancel_futures=True)
                raise InputError(f"{run.name}: {error.removeprefix('error: ')}")
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    working: dict[int, tuple[BaseProcess, Run, float]] = {}  # by worker
    failed: list[Run] = []
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # By default the remaining time follows from the last half minute, in which a run may well not have ended.
    with Progress(*columns, console=console, speed_estimate_period=inf) as progress:
        bar = progress.add_task("runs", total=total, completed=total - len(waiting))
        try:
            while waiting or working:
                for worker in (worker for worker in range(num_workers) if worker not in working):
                    ready = [one for one in waiting if not any(need.folder in missing for need in one.needs)]
                    if ready:
                        run = ready[0]
                        waiting.remove(run)
                        new = context.Process(target=_work, args=(run, root, threads, worker, cli), name=run.name)
                        new.start()
                        working[worker] = (new, run, monotonic())
                wait([process.sentinel for process, _, _ in working.values()])
                for worker, (process, run, started) in list(working.items()):
                    if process.exitcode is not None:
                        del working[worker]
                        seconds = monotonic() - started
                        if process.exitcode == 0:
                            _mark(run, root, seconds)
                            del missing[run.folder]
                            progress.console.print(f"{run.name}: {seconds:.0f} s")
                        else:
                            failed.append(run)
                            lost = [one for one in waiting if run.folder in _with_needs(one.needs)]
                            waiting = [one for one in waiting if one not in lost]
                            failed += lost
                            more = f"; runs that build upon it and are not started: {len(lost)}" if lost else ""
                            progress.console.print(f"{run.name}: failed, see {root / run.folder / LOG}{more}")
                            progress.advance(bar, len(lost))
                        progress.advance(bar)
        except KeyboardInterrupt:
            for process, _, _ in working.values():  # Ctrl-C has reached them too, kill -INT of this process has not
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGINT)
            for process, _, _ in working.values():
                process.join(60)
            raise
    return failed


def _with_needs(runs: Sequence[Run], root: Path | None = None) -> dict[str, Run]:
    """The runs by their folders, each behind what it needs; with ``root`` only what is not done there."""
    found: dict[str, Run] = {}
    for run in runs:
        if run.folder not in found and (root is None or not is_done(run, root)):
            found.update({folder: need for folder, need in _with_needs(run.needs, root).items() if folder not in found})
            found[run.folder] = run
    return found


def _parse(run: Run, cli: str) -> str:
    """What the command line says to a run's options; nothing where they are in order."""
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            importlib.import_module(cli).main(["fit", *run.arguments, "--print_config"])
    except SystemExit as end:
        return said.getvalue().strip() if end.code else ""
    raise AssertionError("--print_config ends the command line")


def _mark(run: Run, root: Path, seconds: float) -> None:
    done = {"run": run.name, "arguments": list(run.arguments), "seconds": round(seconds, 1)}
    write_text(root / run.folder / DONE, json.dumps(done, indent=2) + "\n")


def _work(run: Run, root: Path, threads: int, worker: int, cli: str) -> None:
    """What a process does: one fit, its output into a file, and the export of a preparation."""
    _end_with_parent()
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (root / SHARED_LAB).mkdir(exist_ok=True)
    if not (folder / SHARED_LAB).exists():  # the lab's files are the same for all runs, and take seconds to write
        (folder / SHARED_LAB).symlink_to(os.path.relpath(root / SHARED_LAB, folder), target_is_directory=True)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = _gpu(worker, torch.cuda.device_count(), os.environ)
    lock = (folder / "lock").open("w")  # held until the process ends, however it ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("error: another study is making this run; wait for it, or stop it.") from None
    exported = folder / EXPORTED
    if run.exports and exported.is_dir():  # it was cut off just before it was marked; the folder is there as a whole
        return
    main = importlib.import_module(cli).main
    arguments = [*run.arguments, f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    if checkpoint := _last_checkpoint(folder):
        arguments.append(f"--ckpt_path={checkpoint}")
    main(["fit", *arguments])
    if run.exports:
        if (checkpoint := _last_checkpoint(folder)) is None:
            raise SystemExit("error: the fit has left no last.ckpt, so there is no model to export.")
        for rest in folder.glob(f".{EXPORTED}-*"):  # of an export that was killed
            shutil.rmtree(rest, ignore_errors=True)
        main(["export", f"--ckpt_path={checkpoint}", f"--output_dir={exported}"])


def _last_checkpoint(folder: Path) -> Path | None:
    checkpoints = folder.glob("version_*/checkpoints/last.ckpt")
    return max(checkpoints, key=lambda file: file.stat().st_mtime, default=None)


def _gpu(worker: int, num_gpus: int, environment: Mapping[str, str]) -> str:
    """The worker's GPU, of those that the study itself was given.

    >>> _gpu(3, 2, {"CUDA_VISIBLE_DEVICES": "4,6"})
    '6'
    >>> _gpu(3, 2, {})
    '1'
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else [str(number) for number in range(num_gpus)]
    return names[worker % num_gpus]


def _end_with_parent() -> None:
    """A run whose study was killed must not go on beside the study's next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
