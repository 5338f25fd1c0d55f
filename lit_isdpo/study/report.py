"""The study's folder: two tables, the pictures, and a report that says in words what the numbers say."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lit_isdpo import __version__
from lit_isdpo.study import figures
from lit_isdpo.study.grid import Run
from lit_isdpo.study.results import (
    KL_BUDGETS,
    WIDEST_GAP,
    across_designs,
    against_baseline,
    fit_of,
    groups,
    interval,
    paired_effect,
    read_runs,
)

COLUMNS = {
    "gold_peak": "peak gold",
    "gold_final": "final gold",
    "gold_lost": "lost",
    "gold_low": "low, 2nd half",
    "peak_progress": "peak at",
    "kl": "final KL",
    "win_rate": "final win rate",
    "weight": "final weight",
    "ess": "final ESS",
}
READING = """Gold reward is the task's true reward; *peak* is the best of a run's checkpoints, *final* its last; *lost*
is peak minus final, the over-optimization; *peak at* is the share of the training at which the peak was (of a run that
stopped early, of its own); KL(policy, reference) is in nats a response; weight and ESS (as a share of the pairs) are
those of held-out pairs. Values are means ± 95 % Student-t half widths over the seeds. Where values are sampled and not
exact, a peak is the best of noisy values and leans upwards."""


def write_report(
    folder: Path,
    *,
    title: str,
    notes: str,
    runs: Sequence[Run],
    num_planned: int,
    root: Path,
    baseline: str | None,
    highlight: Sequence[str],
) -> None:
    """Writes ``results.csv``, ``history.csv``, the pictures and ``report.md``.

    Args:
        folder: is made if it is not there.
        title: of the report.
        notes: Markdown under the title.
        runs: those that are done.
        num_planned: how many the study has.
        root: the folder of runs.
        baseline: what the other methods are compared with.
        highlight: methods that have a colour.
    """
    folder.mkdir(parents=True, exist_ok=True)
    history, summary = read_runs(runs, root)
    history.to_csv(folder / "history.csv", index=False)
    summary.to_csv(folder / "results.csv", index=False)
    settings = list(dict.fromkeys(key for run in runs for key in run.settings))
    color = figures.colors([method for method in highlight if method in set(summary["method"])])
    seeds = summary["seed"].nunique()
    lines = [f"# {title}", "", *([notes.strip(), ""] if notes.strip() else [])]
    lines.append(
        f"{len(runs)} of {num_planned} runs, {seeds} seed{'s' if seeds > 1 else ''}, lit_isdpo {__version__}. {READING}"
    )
    plain = [method for method in summary["method"].unique() if method not in color]
    if plain:
        lines[-1] += f" Grey in the pictures, and left out of those over the training: {'; '.join(plain)}."
    for design in summary["design"].unique():
        here, of_runs = history[history["design"] == design], summary[summary["design"] == design]
        varied = [key for key in settings if of_runs[key].nunique() > 1]
        pairs = None if baseline is None else against_baseline(of_runs, here, varied, baseline)
        lines += ["", f"## {design}", "", *_words(of_runs, varied, baseline, pairs), ""]
        for name, figure in _pictures(here, of_runs, varied, color):
            file = f"{''.join(c if c.isalnum() else '_' for c in design)}_{name}.png"
            figure.savefig(folder / file, dpi=110)
            plt.close(figure)
            lines += [f"![{design}: {name.replace('_', ' ')}]({file})", ""]
        lines += _table(of_runs, varied, {"seeds": len, **{title: _mean(key) for key, title in COLUMNS.items()}})
        if pairs is not None and not pairs.empty:
            lines += _differences(of_runs, pairs, varied, str(baseline))
        if here["gold"].notna().any():
            lines += ["Best gold reward of the checkpoints within a budget of KL, and its mean over the training.", ""]
            budgets = {f"KL <= {budget:g}": _mean(f"gold_at_kl_{budget:g}") for budget in KL_BUDGETS}
            lines += _table(of_runs, varied, {**budgets, "mean over training": _mean("gold_area")})
            lines += _fits(here)
    if summary["design"].nunique() > 1 and summary["gold_final"].notna().all():
        lines += _across(summary, [key for key in settings if summary[key].nunique() > 1])
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n")


def _pictures(
    history: pd.DataFrame, summary: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]
) -> list[tuple[str, Figure]]:
    gold = bool(history["gold"].notna().any())
    pictures = [("frontier", figures.draw_frontier(history, settings, color))] if gold else []
    if len(settings) < 2:
        pictures.append(("training", figures.draw_training(history, settings, color)))
        if gold:
            pictures.append(("over_optimization", figures.draw_over_optimization(summary, settings, color)))
    else:
        if gold:
            pictures.append(("final_gold", figures.draw_heat_map(summary, settings, "gold_final", "final gold reward")))
        pictures.append(("final_kl", figures.draw_heat_map(summary, settings, "kl", "final KL, nats")))
    if gold and not figures.with_proxy(history).empty:
        pictures.append(("proxy", figures.draw_proxy(history, settings, color)))
    if {"sampled_kl", "sampled_gold"} <= set(history) and not history["kl"].equals(history["sampled_kl"]):
        pictures.append(("sampled_over_exact", figures.draw_sampled_over_exact(history, color)))
    return pictures


def _words(
    summary: pd.DataFrame, settings: Sequence[str], baseline: str | None, differences: pd.DataFrame | None
) -> list[str]:
    """The numbers of the tables as sentences: who ends best, who loses most, who differs from the baseline."""
    if summary["gold_peak"].isna().all():
        return ["- No gold reward is known for this data: KL and weights are compared, and no method is called better."]
    means = groups(summary, settings)[["gold_peak", "gold_final", "gold_lost"]].mean()
    # By place: a key with a setting that a method is without cannot be looked up.
    best, peak, lost = (means.iloc[int(means[column].argmax())] for column in ("gold_final", "gold_peak", "gold_lost"))
    sentences = [
        f"- The reference has a gold reward of {summary['gold_start'].mean():.2f}. The best end is that of "
        f"{_name(best.name)} ({best['gold_final']:.2f}), the best peak that of {_name(peak.name)} "
        f"({peak['gold_peak']:.2f}); {_name(lost.name)} loses most between peak and end "
        f"({lost['gold_lost']:.2f})."
    ]
    if summary["seed"].nunique() == 1:
        return [*sentences, "- One seed tells no difference from chance."]
    if differences is None:
        return sentences
    ends = [(_name(key), *interval(rows["final"])) for key, rows in groups(differences, settings)]
    for direction, word in ((1, "above"), (-1, "below")):
        found = [f"{name} ({mean:+.2f} ± {half:.2f})" for name, mean, half in ends if direction * mean - half > 0]
        if found:
            sentences.append(
                f"- Ends {word} {baseline} by more than the interval of the paired differences: {', '.join(found)}."
            )
    if ends:
        sentences.append(f"- Of {len(ends)} such comparisons {len(ends) / 20:.1f} would be that far off by chance.")
    undecided = [name for name, mean, half in ends if not abs(mean) > half]
    if undecided:
        sentences.append(f"- Not to be told from {baseline} by its end on these seeds: {', '.join(undecided)}.")
    return sentences


def _differences(summary: pd.DataFrame, differences: pd.DataFrame, settings: Sequence[str], baseline: str) -> list[str]:
    def bootstrap(rows: pd.DataFrame) -> str:
        low, high, _ = paired_effect(rows["final"])
        return "-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"

    def effect(rows: pd.DataFrame) -> str:
        return _cell(paired_effect(rows["final"])[2], "+.1f")

    def at_equal_kl(rows: pd.DataFrame) -> str:
        known = rows["equal_kl"].count()
        return f"{_mean('equal_kl', '+')(rows)} ({known})" if known else "-"

    cells = {"final gold": _mean("final", "+"), "bootstrap": bootstrap, "d": effect}
    cells |= {"peak gold": _mean("peak", "+"), "final KL": _mean("kl", "+"), "at equal KL": at_equal_kl}
    lines = [
        f"Differences to {baseline}, paired over seeds. *At equal KL*: the method's end against {baseline} stopped",
        "where it first had that KL, on a line between two checkpoints (for the seeds on which it came so far, and",
        f"had checkpoints at most {WIDEST_GAP:g} nats apart there; their number in brackets). *d*: mean over standard",
        "deviation of the differences in final gold; with eight seeds or more, a 95 % bootstrap interval of the mean.",
        "",
        *_table(differences, settings, cells),
    ]
    left = [method for method in summary["method"].unique() if method not in {baseline, *differences["method"]}]
    if left:
        lines += [f"Without one of the settings, and so not compared: {', '.join(left)}.", ""]
    return lines


def _fits(history: pd.DataFrame) -> list[str]:
    def of_fit(number: int) -> Callable[[pd.DataFrame], str]:
        return lambda rows: _cell(fit_of(rows)[number], ".2f")

    return [
        "Fits of R = d (alpha - beta log d), d = sqrt KL (arXiv 2210.10760), to all checkpoints of a method together;",
        f"drawn above where they explain at least {figures.GOOD_FIT:.0%} of the variance.",
        "",
        *_table(history, [], {"alpha": of_fit(0), "beta": of_fit(1), "variance explained": of_fit(2)}),
    ]


def _across(summary: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    table = across_designs(summary, settings)
    designs = [design for design in summary["design"].unique() if design in table]
    lines = [
        "",
        "## All designs together",
        "",
        "Final gold reward above the reference's, as a share of that of the best row on the same design: 1 is the",
        "best, 0 the reference, below 0 is harm. The best mean comes first.",
        "",
    ]
    shares = {column: _mean(column) for column in (*designs, "mean", "worst")}
    return lines + _table(table.assign(design=""), settings, shares)


def _table(
    table: pd.DataFrame, settings: Sequence[str], cells: Mapping[str, Callable[[pd.DataFrame], Any]]
) -> list[str]:
    """A row for each method and its settings; a cell shows what its column's function makes of their rows."""
    rows = [["method", *settings, *cells]]
    rows += [[*identity, *(cell(part) for cell in cells.values())] for (_, *identity), part in groups(table, settings)]
    head, *lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *lines, ""]


def _cell(value: Any, form: str = "") -> str:
    return "-" if isinstance(value, float) and math.isnan(value) else format(value, form)


def _mean(column: str, sign: str = "") -> Callable[[pd.DataFrame], str]:
    """The cell of a column's mean over the rows, with its half width if that is known."""

    def cell(rows: pd.DataFrame) -> str:
        mean, half = interval(rows[column])
        return _cell(mean, f"{sign}.2f") + ("" if math.isnan(half) else f" ± {half:.2f}")

    return cell


def _name(key: Any) -> str:
    _, method, *values = key
    known = [str(value) for value in values if not pd.isna(value)]
    return f"{method} ({', '.join(known)})" if known else str(method)
