"""The study's folder: two tables, the pictures, and a report that says in words what the numbers say."""

import math
from collections.abc import Sequence
from pathlib import Path

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
    fit_gao,
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
        lines += ["", f"## {design}", "", *_words(of_runs, here, varied, baseline), ""]
        for name, figure in _pictures(here, of_runs, varied, color):
            file = f"{''.join(c if c.isalnum() else '_' for c in design)}_{name}.png"
            figure.savefig(folder / file, dpi=110)
            plt.close(figure)
            lines += [f"![{design}: {name.replace('_', ' ')}]({file})", ""]
        lines += _table(of_runs, varied)
        if baseline is not None:
            lines += _differences(of_runs, here, varied, baseline)
        if here["gold"].notna().any():
            lines += _budgets(of_runs, varied)
            lines += _fits(here)
    if summary["design"].nunique() > 1 and summary["gold_final"].notna().all():
        lines += _across(summary, [key for key in settings if summary[key].nunique() > 1])
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n")


def _pictures(
    history: pd.DataFrame, summary: pd.DataFrame, settings: Sequence[str], color: dict[str, str]
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


def _words(summary: pd.DataFrame, history: pd.DataFrame, settings: Sequence[str], baseline: str | None) -> list[str]:
    """What stands in the tables, as sentences: who ends best, who loses most, who differs from the baseline."""
    if history["gold"].isna().all():
        return ["- No gold reward is known for this data: KL and weights are compared, and no method is called better."]
    means = summary.groupby(["method", *settings], sort=False, dropna=False)[
        ["gold_peak", "gold_final", "gold_lost"]
    ].mean()
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
    if baseline is None:
        return sentences
    differences = against_baseline(summary, history, settings, baseline)
    for direction, word in ((1, "above"), (-1, "below")):
        found = []
        for key, rows in differences.groupby(["method", *settings], sort=False, dropna=False):
            mean, half = interval(rows["final"])
            if direction * mean - half > 0:
                found.append(f"{_name(key)} ({mean:+.2f} ± {half:.2f})")
        if found:
            sentences.append(
                f"- Ends {word} {baseline} by more than the interval of the paired differences: {', '.join(found)}."
            )
    if compared := differences.groupby(["method", *settings], dropna=False).ngroups:
        sentences.append(f"- Of {compared} such comparisons {compared / 20:.1f} would be that far off by chance.")
    undecided = [
        _name(key)
        for key, rows in differences.groupby(["method", *settings], sort=False, dropna=False)
        if not abs(interval(rows["final"])[0]) > interval(rows["final"])[1]
    ]
    if undecided:
        sentences.append(f"- Not to be told from {baseline} by its end on these seeds: {', '.join(undecided)}.")
    return sentences


def _table(summary: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    lines = _head(["method", *settings, "seeds", *COLUMNS.values()])
    for key, rows in groups(summary, settings):
        _, *identity = key
        lines.append(_row([*identity, len(rows), *(_pm(rows[column].tolist()) for column in COLUMNS)]))
    return [*lines, ""]


def _differences(summary: pd.DataFrame, history: pd.DataFrame, settings: Sequence[str], baseline: str) -> list[str]:
    differences = against_baseline(summary, history, settings, baseline)
    if differences.empty:
        return []
    lines = [
        f"Differences to {baseline}, paired over seeds. *At equal KL*: the method's end against {baseline} stopped",
        "where it first had that KL, on a line between two checkpoints (for the seeds on which it came so far, and",
        f"had checkpoints at most {WIDEST_GAP:g} nats apart there; their number in brackets). *d*: mean over standard",
        "deviation of the differences in final gold; with eight seeds or more, a 95 % bootstrap interval of the mean.",
        "",
        *_head(["method", *settings, "final gold", "bootstrap", "d", "peak gold", "final KL", "at equal KL"]),
    ]
    for key, rows in groups(differences, settings):
        _, *identity = key
        known = rows["equal_kl"].dropna().tolist()
        equal = f"{_pm(known, signed=True)} ({len(known)})" if known else "-"
        low, high, effect = paired_effect(rows["final"].tolist())
        ends = "-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        final, peak, kl = (_pm(rows[column].tolist(), signed=True) for column in ("final", "peak", "kl"))
        lines.append(_row([*identity, final, ends, "-" if math.isnan(effect) else f"{effect:+.1f}", peak, kl, equal]))
    left = [method for method in summary["method"].unique() if method not in {baseline, *differences["method"]}]
    if left:
        lines += ["", f"Without one of the settings, and so not compared: {', '.join(left)}."]
    return [*lines, ""]


def _budgets(summary: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    lines = [
        "Best gold reward of the checkpoints within a budget of KL, and its mean over the training.",
        "",
        *_head(["method", *settings, *(f"KL <= {budget:g}" for budget in KL_BUDGETS), "mean over training"]),
    ]
    for key, rows in groups(summary, settings):
        _, *identity = key
        columns = [*(f"gold_at_kl_{budget:g}" for budget in KL_BUDGETS), "gold_area"]
        lines.append(_row([*identity, *(_pm(rows[column].tolist()) for column in columns)]))
    return [*lines, ""]


def _fits(history: pd.DataFrame) -> list[str]:
    lines = [
        "Fits of R = d (alpha - beta log d), d = sqrt KL (arXiv 2210.10760), to all checkpoints of a method together;",
        f"drawn above where they explain at least {figures.GOOD_FIT:.0%} of the variance.",
        "",
        *_head(["method", "alpha", "beta", "variance explained"]),
    ]
    for method, rows in history.groupby("method", sort=False):
        start = rows.loc[rows["progress"] == 0, "gold"].mean()
        fit = fit_gao(rows["kl"].tolist(), (rows["gold"] - start).tolist())
        lines.append(_row([method, *("-" if math.isnan(value) else f"{value:.2f}" for value in fit)]))
    return [*lines, ""]


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
        *_head(["method", *settings, *designs, "mean", "worst"]),
    ]
    for _, row in table.iterrows():
        identity = ["-" if pd.isna(row[key]) else row[key] for key in settings]
        lines.append(_row([row["method"], *identity, *(f"{row[key]:.2f}" for key in (*designs, "mean", "worst"))]))
    return lines


def _head(cells: Sequence[object]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: Sequence[object]) -> str:
    shown = ["-" if isinstance(cell, float) and math.isnan(cell) else str(cell) for cell in cells]
    return f"| {' | '.join(shown)} |"


def _pm(values: Sequence[float], signed: bool = False) -> str:
    mean, half = interval(values)
    if math.isnan(mean):
        return "-"
    number = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return number if math.isnan(half) else f"{number} ± {half:.2f}"


def _name(key: object) -> str:
    method, *values = key if isinstance(key, tuple) else (key,)
    known = [str(value) for value in values if not (isinstance(value, float) and math.isnan(value))]
    return f"{method} ({', '.join(known)})" if known else str(method)
