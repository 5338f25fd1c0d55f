"""``python -m lit_isdpo study``: plan, run, read, draw, report."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lit_isdpo.study.grid import Run, Value, Variant, plan_runs
from lit_isdpo.study.runner import LOG, execute, is_done
from lit_isdpo.types import InputError


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
) -> None:
    """Runs every method on every design, with every setting and seed, and reports what came out.

    ``output_dir`` gets ``report.md``, its pictures, ``results.csv`` (a row a run) and ``history.csv`` (a row a
    validation). A study that was stopped or killed goes on where it was when it is called again; runs that another
    study made already are not made again.

    Args:
        title: of the report.
        output_dir: folder of the report.
        designs: what is trained on, by name: a config file for ``fit``, or ``{config, options}``.
        methods: laid over each design, by name: likewise; ``without`` names flags of the grid that it has not.
        seeds: one run each.
        grid: flags of ``fit`` (without dashes) and their values; every combination is run.
        options: flags of all runs.
        runs_dir: folder of the runs; ``tensorboard --logdir`` shows it.
        baseline: method that the others are compared with, seed by seed; ``null`` compares none.
        highlight: methods that have a colour in crowded pictures; by default the first eight.
        notes: Markdown that is put under the title.
        num_workers: runs at a time; by default one a GPU, or else one a core.
        report_only: report what there is, and run nothing.
        prepare: what other runs build upon, by name: fits like those of methods, laid over each design without the
            grid, whose models are exported; ``{NAME}`` in an option is the folder of the model for its design and seed.

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
    runs = plan_runs(
        _variants(designs), _variants(methods), grid or {}, seeds, options or {}, _variants(prepare or {}), root
    )
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
    from lit_isdpo.study.report import write_report  # drawing takes a second to import, other verbs need it not

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


def _first(names: Sequence[str]) -> str:
    return "; ".join(names[:8]) + ("; ..." if names[8:] else "")


def _variants(given: dict[str, str | Variant]) -> dict[str, Variant]:
    return {name: Variant(config=value) if isinstance(value, str) else value for name, value in given.items()}
