"""The verb ``study``: plans runs, makes them side by side and reports.

Each run is a process of its own, so that one that fails takes no other with it.
"""

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
from glob import escape
from math import inf
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_isdpo.evaluation.store import write_text
from lit_isdpo.study.grid import EXPORTED, Run, StudyPlan, Value, Variant, find_run, with_needs
from lit_isdpo.types import InputError

CLI = "lit_isdpo.cli"  # by its name, as this room is below the command line
CONFIG = "run.yaml"
DONE = "done.json"
LOG = "output.log"
SHARED_LAB = "lab"


def study(
    title: str,
    output_dir: str,
    designs: dict[str, str | Variant],
    methods: dict[str, str | Variant],
    seeds: list[int],
    grid: dict[str, list[Value]] | None = None,
    options: dict[str, Value] | None = None,
    runs_dir: str = "runs/study",
    baseline: str | None = "DPO",
    highlight: list[str] | None = None,
    notes: str = "",
    num_workers: int | None = None,
    report_only: bool = False,
    prepare: dict[str, str | Variant] | None = None,
    show: str | None = None,
) -> None:
    """Runs every method on every design, with every setting and seed, and reports the results.

    ``output_dir`` gets ``report.md``, its pictures, ``results.csv`` (one row per run) and ``history.csv`` (one row per
    validation). A study that was stopped or killed goes on where it was when it is called again. Runs that another
    study has made are not made again. The folder of each run gets ``run.yaml``, the whole config of its ``fit``.

    Args:
        title: title of the report.
        output_dir: folder of the report.
        designs: data and models to train on, by name: a config file for ``fit``, or ``{config, options}``.
        methods: variants to lay over each design, by name: a config file, or ``{config, options, without}``;
            ``without`` names flags of the grid that the method does not have.
        seeds: one run each.
        grid: flags of ``fit`` (without dashes) and their values; every combination is run.
        options: flags of all runs.
        runs_dir: folder of the runs; ``tensorboard --logdir`` shows it.
        baseline: method that the others are compared with, seed by seed; ``null`` compares none.
        highlight: methods that have a colour in crowded pictures; by default the first eight.
        notes: Markdown that is put under the title.
        num_workers: runs at a time, which share the GPUs; by default one per GPU, or else one per core.
        report_only: report the runs that are done, and make none.
        prepare: fits that other runs build upon, by name: variants as those of methods, laid over each design without
            the grid, whose models are exported; ``{NAME}`` in an option is the folder of the model for its design and
            seed.
        show: print the whole config of one run, for ``fit --config``, and make none: ``DESIGN/METHOD``, with
            ``-SETTING=VALUE`` and ``-seed=SEED`` behind it if the study has several such runs.

    Raises:
        InputError: the study cannot be planned as it is, or runs of it failed.
    """
    if num_workers is not None and num_workers < 1:
        raise InputError(f"num_workers must be at least 1, not {num_workers}.")
    if baseline is not None and baseline not in methods:
        raise InputError(f"baseline: {baseline!r} is not among the methods; null compares with none.")
    if unknown := set(highlight or ()) - set(methods):
        raise InputError(f"highlight: {sorted(unknown)} is not among the methods.")
    root, output = Path(runs_dir), Path(output_dir)
    on, by, before = (
        {name: Variant(config=value) if isinstance(value, str) else value for name, value in given.items()}
        for given in (designs, methods, prepare or {})
    )
    runs = StudyPlan(on, by, grid or {}, seeds, options or {}, before, root).runs()
    if show is not None:
        print(_config(find_run(runs, show), root, CLI), end="")
        return
    _tell_of_others(runs, root)
    failed: list[Run] = []
    if not report_only:
        failed = execute(runs, root, num_workers or torch.cuda.device_count() or os.cpu_count() or 1)
    done = [run for run in runs if is_done(run, root)]
    folders = {run.folder for run in failed}
    lost = [run for run in failed if any(need.folder in folders for need in run.needs)]
    names = _first([f"{run.name} ({root / run.folder / LOG})" for run in failed if run not in lost])
    if lost:
        names += f"; not started, as they build upon what failed: {_first([run.name for run in lost])}"
    if not done:
        raise InputError(f"{title}: no run is done, so there is nothing to report." + (names and f" Failed: {names}."))
    from lit_isdpo.study.report import write_report  # drawing takes a second to import, and other verbs do not need it

    write_report(
        output,
        title=title,
        notes=notes,
        runs=done,
        num_planned=len(runs),
        root=root,
        baseline=baseline,
        highlight=highlight or list(methods)[:8],
    )
    print(f"Wrote {output / 'report.md'} ({len(done)} of {len(runs)} runs).")
    if failed:
        raise InputError(f"{len(failed) - len(lost)} runs failed (the same command tries them again): {names}.")


def _tell_of_others(runs: Sequence[Run], root: Path) -> None:
    """Says which runs are not done although the folder has runs of their names that are, with another digest."""
    others = [one.name for one in _missing(runs, root) if any(root.glob(f"{escape(one.cell)}-????????/{DONE}"))]
    if others:
        print(
            f"{len(others)} runs are not done, although {root} has runs of their names that are: those had other "
            f"options or config files, perhaps of another version of lit_isdpo, and do not count: {_first(others)}."
        )


def _first(names: Sequence[str]) -> str:
    return "; ".join(names[:8]) + ("; ..." if names[8:] else "")


def is_done(run: Run, root: Path) -> bool:
    """Whether a run has ended well, in this study or another; a preparation must have its model still."""
    folder = root / run.folder
    return (folder / DONE).is_file() and (not run.exports or (folder / EXPORTED).is_dir())


def execute(runs: Sequence[Run], root: Path, num_workers: int, cli: str = CLI) -> list[Run]:
    """Makes the runs that are not done yet, and returns those that failed.

    The output of a run is in its folder, ``output.log``. A run that was cut off goes on from its last checkpoint. The
    workers share the GPUs. The preparations that a run needs are made before it; if one of them fails, the run is not
    started and counts as failed.

    Args:
        runs: the runs of the study.
        root: the folder of runs.
        num_workers: processes at a time.
        cli: the module whose ``main`` is called.

    Raises:
        InputError: the options of a run cannot be parsed; none has been started.
        KeyboardInterrupt: the user stopped the study; the runs have saved where they were.
    """
    total = len(with_needs(runs))
    waiting = _missing(runs, root)
    missing = {run.folder for run in waiting}
    # A worker is a fork of a server that has imported everything: a clean process, without the seconds of the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([cli])
    # A mistake in a study's file ends the study at once, and not hours later when the first run of a kind is made.
    kinds = {(run.exports, run.design, run.method, *run.settings.items()): run for run in waiting}.values()
    with ProcessPoolExecutor(min(num_workers, len(kinds)) or 1, mp_context=context) as pool:
        for _ in pool.map(partial(_config, root=root, cli=cli), kinds):
            pass  # it raises the first mistake
    working: dict[int, tuple[BaseProcess, Run, float]] = {}  # by worker
    failed: list[Run] = []
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # By default the remaining time follows from the last half minute, in which a run may well not have ended.
    with Progress(*columns, console=console, speed_estimate_period=inf) as progress:
        bar = progress.add_task("runs", total=total, completed=total - len(waiting))
        try:
            while waiting or working:
                for worker in {*range(num_workers)} - {*working}:
                    ready = (one for one in waiting if not any(need.folder in missing for need in one.needs))
                    if run := next(ready, None):
                        waiting.remove(run)
                        arguments = (run, root, worker, num_workers, cli)
                        new = context.Process(target=_work, args=arguments, name=run.name)
                        new.start()
                        working[worker] = (new, run, monotonic())
                wait([process.sentinel for process, _, _ in working.values()])
                for worker, (process, run, started) in list(working.items()):
                    if process.exitcode is not None:
                        del working[worker]
                        seconds = monotonic() - started
                        if process.exitcode == 0:
                            done = {"run": run.name, "arguments": run.arguments, "seconds": round(seconds, 1)}
                            write_text(root / run.folder / DONE, json.dumps(done, indent=2) + "\n")
                            missing.remove(run.folder)
                            progress.console.print(f"{run.name}: {seconds:.0f} s")
                        else:
                            lost = [one for one in waiting if run in with_needs(one.needs)]
                            waiting = [one for one in waiting if one not in lost]
                            failed += [run, *lost]
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


def _missing(runs: Sequence[Run], root: Path) -> list[Run]:
    """The runs that are not done, each behind the preparations that it needs and that are not done."""
    return with_needs(runs, lambda run: not is_done(run, root))


def _config(run: Run, root: Path, cli: str) -> str:
    """The whole config of a run's ``fit``, as the command line makes it of the files and options; for any verb.

    Raises:
        InputError: they cannot be parsed.
    """
    printed, said = io.StringIO(), io.StringIO()
    folder = f"--trainer.default_root_dir={root / run.folder}"
    try:
        with redirect_stdout(printed), redirect_stderr(said):
            importlib.import_module(cli).main(["fit", *run.arguments, folder, "--print_config"])
    except SystemExit as end:
        if end.code:
            raise InputError(f"{run.name}: {said.getvalue().strip().removeprefix('error: ')}") from None
    unset = ("ckpt_path: null\n", "weights_only: null\n")  # they would undo a flag before the file
    return "".join(line for line in printed.getvalue().splitlines(keepends=True) if line not in unset)


def _work(run: Run, root: Path, worker: int, num_workers: int, cli: str) -> None:
    """The work of one process: a fit, its output in a file, and the export of a preparation."""
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
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = _gpus(worker, num_workers, torch.cuda.device_count(), os.environ)
    lock = (folder / "lock").open("w")  # held until the process ends, however it ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("error: another study is making this run; wait for it, or stop it.") from None
    exported = folder / EXPORTED
    if run.exports and exported.is_dir():  # it was cut off just before it was marked; the folder is there as a whole
        return
    write_text(folder / CONFIG, _config(run, root, cli))
    main = importlib.import_module(cli).main
    arguments = ["fit", f"--config={folder / CONFIG}", "--trainer.enable_progress_bar=false"]
    if checkpoint := _last_checkpoint(folder):
        arguments.append(f"--ckpt_path={checkpoint}")
    sys.argv[1:] = arguments  # Lightning starts other ranks by the command line of the process
    main(arguments)
    if run.exports:
        if (checkpoint := _last_checkpoint(folder)) is None:
            raise SystemExit("error: the fit has left no last.ckpt, so there is no model to export.")
        for rest in folder.glob(f".{EXPORTED}-*"):  # left by an export that was killed
            shutil.rmtree(rest, ignore_errors=True)
        main(["export", f"--ckpt_path={checkpoint}", f"--output_dir={exported}"])


def _last_checkpoint(folder: Path) -> Path | None:
    checkpoints = folder.glob("version_*/checkpoints/last.ckpt")
    return max(checkpoints, key=lambda file: file.stat().st_mtime, default=None)


def _gpus(worker: int, num_workers: int, num_gpus: int, environment: Mapping[str, str]) -> str:
    """The GPUs of a worker, out of those that the study was given; one GPU if there are as many workers or more.

    >>> _gpus(3, 4, 2, {"CUDA_VISIBLE_DEVICES": "4,6"})
    '6'
    >>> _gpus(0, 2, 4, {})
    '0,2'
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else [str(number) for number in range(num_gpus)]
    return ",".join(names[worker % num_gpus :: num_workers])


def _end_with_parent() -> None:
    """A run whose study was killed must not go on beside the study's next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
