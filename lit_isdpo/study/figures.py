"""The pictures of the field, from the tables of :mod:`lit_isdpo.study.results`.

In all of them, a colour is a method, a band or a bar is the 95 % Student-t interval over seeds, and KL is in nats per
response.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_isdpo.study.results import fit_of, interval

OTHER = "#b0b0b0"
COLORS = ("#c44e52", "#4c72b0", "#ccb974", "#55a868", "#8172b3", "#937860", "#64b5cd", "#da8bc3")
SAME = 1e-5  # a reward that differs from gold by less, by rounding, is gold
GOOD_FIT = 0.8  # of the variance: below it the curve is not drawn
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"figure.constrained_layout.use": True}
BAR: Any = {"capsize": 2, "lw": 1}


def colors(highlight: Sequence[str]) -> dict[str, str]:
    """A colour for each highlighted method; all others share one."""
    return {method: COLORS[number % len(COLORS)] for number, method in enumerate(highlight)}


@mpl.rc_context(STYLE)
def draw_frontier(history: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """Gold reward and win rate against sqrt(KL): one point per checkpoint, the best of each method large.

    The best is the group of settings and step with the highest mean gold reward over seeds. The dashed curves are fits
    of arXiv 2210.10760 to all checkpoints of a method, if they explain most of the variance.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for axis, column in zip(axes, ("gold", "win_rate"), strict=True):
        for method, rows in sorted(history.groupby("method", sort=False), key=lambda item: item[0] in color):
            shade = color.get(str(method), OTHER)
            axis.scatter(np.sqrt(rows["kl"]), rows[column], s=7, alpha=0.35, color=shade, lw=0)
        for method, shade in color.items():
            rows = history[history["method"] == method]
            if rows[column].isna().all():
                continue
            cells = [cell for _, cell in rows.groupby([*settings, "step"], dropna=False)]
            best = max(cells, key=lambda cell: float(cell["gold"].mean()))
            at, (mean, half) = np.sqrt(best["kl"].mean()), interval(best[column])
            axis.errorbar(at, mean, yerr=np.nan_to_num(half), color=shade, **BAR)
            axis.scatter(at, mean, s=70, color=shade, edgecolor="black", lw=0.8, zorder=3, label=method)
        axis.set(xlabel="sqrt KL(policy, reference), sqrt nats")
    for method, shade in color.items():
        rows = history[history["method"] == method]
        alpha, beta, explained = fit_of(rows)
        if explained >= GOOD_FIT:
            d = np.linspace(1e-3, np.sqrt(rows["kl"].max()), 200)
            start = rows.loc[rows["progress"] == 0, "gold"].mean()
            axes[0].plot(d, start + d * (alpha - beta * np.log(d)), color=shade, lw=1, ls="--")
    axes[1].axhline(0.5, color="black", lw=0.6, ls=":")
    axes[0].set(ylabel="gold reward")
    axes[1].set(ylabel="win rate against the reference")
    # Beside the panels: in them it hides the data.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", title="best checkpoint of")
    return figure


@mpl.rc_context(STYLE)
def draw_training(history: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """Gold reward, KL, mean weight and effective sample size over the training, one row of panels per settings."""
    columns = {
        "gold": "gold reward",
        "kl": "KL(policy, reference), nats",
        "weight": "mean weight, held-out pairs",
        "ess": "ESS / pairs",
    }
    cells = _cells(_everywhere(history, settings), settings)
    figure, axes = plt.subplots(len(cells), 4, figsize=(13.5, 2.6 * len(cells)), squeeze=False, sharex=True)
    for row, (values, cell) in zip(axes, cells, strict=True):
        for axis, (column, label) in zip(row, columns.items(), strict=True):
            for method, shade in color.items():
                rows = cell[cell["method"] == method]
                if rows.empty:
                    continue
                points = [(at, *interval(ends)) for at, ends in rows.groupby("progress")[column]]
                progress, mean, half = np.array(points, dtype=float).T
                axis.plot(progress, mean, color=shade, label=method)
                half = np.nan_to_num(half)
                axis.fill_between(progress, mean - half, mean + half, color=shade, alpha=0.15, lw=0)
            # The range of the data: the interval of three seeds may be wider than the picture.
            shown = cell.loc[cell["method"].isin(color), column]
            low, high = shown.min(), shown.max()
            axis.set(title=label)
            if low < high:
                axis.set(ylim=(low - 0.05 * (high - low), high + 0.1 * (high - low)))
        row[0].set_ylabel(", ".join(f"{key} {value}" for key, value in zip(settings, values, strict=True)))
    for axis in axes[-1]:
        axis.set_xlabel("share of the training")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@mpl.rc_context(STYLE)
def draw_over_optimization(summary: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """Gold reward at its peak and at the end, the loss between them, and the time of the peak, one line per group."""
    grouped = list(summary.groupby(["method", *settings], sort=False, dropna=False))
    grouped.sort(key=lambda item: item[1]["gold_final"].mean())
    size = (11, 1.2 + 0.3 * len(grouped))
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, width_ratios=(2, 1.2, 1.2))
    for place, (key, rows) in enumerate(grouped):
        shade = color.get(key[0], OTHER)
        peak = rows["gold_peak"].mean()
        axes[0].plot([rows["gold_final"].mean(), peak], [place, place], color=shade, lw=1)
        axes[0].scatter(peak, place, marker="|", s=120, color=shade)
        for axis, column in zip(axes, ("gold_final", "gold_lost", "peak_progress"), strict=True):
            mean, half = interval(rows[column])
            axis.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="o", color=shade, **BAR)
    axes[0].axvline(summary["gold_start"].mean(), color="black", lw=0.6, ls=":")
    axes[0].set(title="gold reward: end (dot), peak (bar), start (dotted)")
    axes[0].set_yticks(range(len(grouped)), [_label(key) for key, _ in grouped])
    axes[1].axvline(0, color="black", lw=0.6, ls=":")
    axes[1].set(title="lost between peak and end")
    axes[2].set(title="share of the training at the peak", xlim=(-0.05, 1.1))
    return figure


@mpl.rc_context(STYLE)
def draw_sampled_over_exact(history: pd.DataFrame, color: Mapping[str, str]) -> Figure:
    """Sampled estimates, with two standard errors, over the exact values that they estimate."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for axis, column, label in ((axes[0], "kl", "KL, nats (Rao-Blackwell)"), (axes[1], "gold", "gold reward")):
        for method, rows in history.groupby("method", sort=False):
            shade, error = color.get(str(method), OTHER), 2 * rows[f"sampled_{column}_stderr"]
            sampled = rows[f"sampled_{column}"]
            axis.errorbar(rows[column], sampled, yerr=error, fmt="o", ms=2.5, lw=0.5, color=shade, label=method)
        ends = [history[column].min(), history[column].max()]
        axis.plot(ends, ends, color="black", lw=0.8)
        axis.set(xlabel=f"exact {label}", ylabel=f"sampled {label}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def with_proxy(history: pd.DataFrame) -> pd.DataFrame:
    """The validations of methods that are trained on a reward other than the gold reward."""
    truth = history["sampled_gold"] if "sampled_gold" in history else history["gold"]
    differs = (history["proxy"] - truth).abs() > SAME
    return history[history["method"].isin(history.loc[differs, "method"])]


@mpl.rc_context(STYLE)
def draw_proxy(history: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """The gain of a policy by the reward that it is trained on, and by gold, over sqrt(KL): one panel per group.

    Both are above their values at the start of the same run, as a learned reward knows no zero; a line is the mean over
    seeds, step by step, a dot a checkpoint. Where the dashed line leaves the other, the reward is over-optimized (arXiv
    2210.10760, figure 1).
    """
    panels = list(with_proxy(history).groupby(["method", *settings], sort=False, dropna=False))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (1.0 + 3.2 * columns, 3.0 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    for axis, (key, rows) in zip(axes.flat, panels, strict=False):
        starts = rows[rows["progress"] == 0].set_index("seed")
        shade = color.get(key[0], COLORS[1])
        for column, label, style, marker in (
            ("gold", "gold", "-", "o"),
            ("proxy", "reward that is trained on", "--", "^"),
        ):
            gained = rows[column] - rows["seed"].map(starts[column])
            axis.scatter(np.sqrt(rows["kl"]), gained, s=9, marker=marker, alpha=0.35, color=shade, lw=0)
            curve = rows.assign(gained=gained).groupby("step")[["kl", "gained"]].mean()
            axis.plot(np.sqrt(curve["kl"]), curve["gained"], style, color=shade, label=label)
        axis.axhline(0, color="black", lw=0.6, ls=":")
        axis.set(title=_label(key), xlabel="sqrt KL, sqrt nats")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("gained over the reference")
    axes[0, 0].legend(loc="lower left")
    return figure


@mpl.rc_context(STYLE)
def draw_heat_map(summary: pd.DataFrame, settings: Sequence[str], column: str, label: str) -> Figure:
    """Means over seeds: methods by values of the first setting, one panel per combination of the other settings."""
    first, *rest = settings
    summary = _everywhere(summary, settings)
    panels = _cells(summary, rest)
    means = summary.groupby(["method", *settings], dropna=False)[column].mean()
    size = (2.0 + 2.3 * len(panels), 2.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, (values, rows) in zip(axes[0], panels, strict=True):
        table = rows.pivot_table(index="method", columns=first, values=column, aggfunc="mean", sort=False)
        image = axis.imshow(table, cmap="viridis", vmin=means.min(), vmax=means.max(), aspect="auto")
        axis.set_xticks(range(len(table.columns)), [_shown(value) for value in table.columns])
        axis.set_yticks(range(len(table.index)), table.index)
        for (line, place), value in np.ndenumerate(table.to_numpy()):
            ink = "black" if value > (means.min() + means.max()) / 2 else "white"
            axis.text(place, line, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        named = zip(rest, values, strict=True)
        axis.set(xlabel=first, title="\n".join(f"{key} {_shown(value)}" for key, value in named))
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes[0].tolist(), label=label)
    return figure


def _cells(rows: pd.DataFrame, settings: Sequence[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The rows by values of the settings."""
    return list(rows.groupby(list(settings), sort=False)) if settings else [((), rows)]


def _label(key: tuple[Any, ...]) -> str:
    method, *values = key
    return ", ".join([str(method), *(_shown(value) for value in values if not pd.isna(value))])


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str | bool | np.bool_) else f"{value:g}"


def _everywhere(rows: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Rows with copies of those without a setting (NaN) at each of its values, in the order of the methods."""
    for setting in settings:
        values = rows[setting].dropna().unique()
        of_none = rows[setting].isna()
        if of_none.any() and len(values):
            copies = [rows[of_none].assign(**{setting: value}) for value in values]
            rows = pd.concat([rows[~of_none], *copies]).sort_index(kind="stable")
    return rows
