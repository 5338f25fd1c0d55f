"""The pictures of the field, from the tables of :mod:`lit_isdpo.study.results`.

Everywhere: a colour is a method, a band or a bar the 95 % Student-t interval over seeds, KL is in nats a response.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_isdpo.study.results import fit_gao, interval

OTHER = "#b0b0b0"
COLORS = ("#c44e52", "#4c72b0", "#ccb974", "#55a868", "#8172b3", "#937860", "#64b5cd", "#da8bc3")
SAME = 1e-5  # a reward that differs from gold by less, by rounding, is gold
GOOD_FIT = 0.8  # of the variance: below it the curve is not drawn
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def colors(highlight: Sequence[str]) -> dict[str, str]:
    """A colour for each highlighted method; all others share one."""
    return {method: COLORS[number % len(COLORS)] for number, method in enumerate(highlight)}


def draw_frontier(history: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """Gold reward and win rate against sqrt(KL): a point a checkpoint, the best of each method large.

    The best is the group of settings and step with the highest mean gold reward over seeds. The dashed curves are fits
    of arXiv 2210.10760 to all checkpoints of a method, where they explain most of the variance.
    """
    with mpl.rc_context(STYLE):
        figure, (gold_axis, win_axis) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        for axis, column in ((gold_axis, "gold"), (win_axis, "win_rate")):
            for method, rows in sorted(history.groupby("method", sort=False), key=lambda item: item[0] in color):
                shade = color.get(str(method), OTHER)
                axis.scatter(np.sqrt(rows["kl"]), rows[column], s=7, alpha=0.35, color=shade, lw=0)
            for method, shade in color.items():
                rows = history[history["method"] == method]
                if rows.empty or rows[column].isna().all():
                    continue
                best, seeds = _best_checkpoint(rows, settings)
                axis.errorbar(
                    np.sqrt(best["kl"]),
                    best[column],
                    yerr=np.nan_to_num(interval(seeds[column].tolist())[1]),
                    color=shade,
                    lw=1,
                    capsize=2,
                )
                axis.scatter(
                    np.sqrt(best["kl"]),
                    best[column],
                    s=70,
                    color=shade,
                    edgecolor="black",
                    lw=0.8,
                    zorder=3,
                    label=method,
                )
        for method, shade in color.items():
            rows = history[history["method"] == method]
            _draw_fit(gold_axis, rows, shade)
        win_axis.axhline(0.5, color="black", lw=0.6, ls=":")
        gold_axis.set(xlabel="sqrt KL(policy, reference), sqrt nats", ylabel="gold reward")
        win_axis.set(xlabel="sqrt KL(policy, reference), sqrt nats", ylabel="win rate against the reference")
        # Beside the panels: in them it hides the data.
        figure.legend(*gold_axis.get_legend_handles_labels(), loc="outside right upper", title="best checkpoint of")
    return figure


def draw_training(history: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """Gold reward, KL, mean weight and effective sample size over the training, a row of panels a group of settings."""
    columns = {
        "gold": "gold reward",
        "kl": "KL(policy, reference), nats",
        "weight": "mean weight, held-out pairs",
        "ess": "ESS / pairs",
    }
    history = _everywhere(history, settings)
    cells = list(history.groupby(list(settings), sort=False, dropna=True)) if settings else [((), history)]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(cells), 4, figsize=(13.5, 2.6 * len(cells)), layout="constrained", squeeze=False, sharex=True
        )
        for row, (values, cell) in zip(axes, cells, strict=True):
            for axis, (column, label) in zip(row, columns.items(), strict=True):
                for method, shade in color.items():
                    rows = cell[cell["method"] == method]
                    if rows.empty:
                        continue
                    curve = rows.groupby("progress")[column].agg([_mean, _half])
                    axis.plot(curve.index, curve["_mean"], color=shade, label=method)
                    axis.fill_between(
                        curve.index,
                        curve["_mean"] - curve["_half"].fillna(0),
                        curve["_mean"] + curve["_half"].fillna(0),
                        color=shade,
                        alpha=0.15,
                        lw=0,
                    )
                # The range of the data: the interval of three seeds may be wider than the picture.
                axis.set(title=label, ylim=_padded(cell.loc[cell["method"].isin(color), column]))
            named = zip(settings, values if isinstance(values, tuple) else (values,), strict=True)
            row[0].set_ylabel(", ".join(f"{key} {value}" for key, value in named))
        for axis in axes[-1]:
            axis.set_xlabel("share of the training")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def draw_over_optimization(summary: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """Gold reward at its peak and at the end, what was lost between, and when the peak was, a line a group."""
    grouped = list(summary.groupby(["method", *settings], sort=False, dropna=False))
    grouped.sort(key=lambda item: item[1]["gold_final"].mean())
    labels = [_label(key) for key, _ in grouped]
    places = [float(place) for place in range(len(grouped))]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 3, figsize=(11, 1.2 + 0.3 * len(grouped)), layout="constrained", sharey=True, width_ratios=(2, 1.2, 1.2)
        )
        for place, (key, rows) in zip(places, grouped, strict=True):
            method = key[0] if isinstance(key, tuple) else key
            shade = color.get(method, OTHER)
            final, peak = interval(rows["gold_final"]), interval(rows["gold_peak"])
            axes[0].plot([final[0], peak[0]], [place, place], color=shade, lw=1)
            axes[0].errorbar(*_bar(final, place), fmt="o", color=shade, capsize=2, lw=1)
            axes[0].scatter(peak[0], place, marker="|", s=120, color=shade)
            axes[1].errorbar(*_bar(interval(rows["gold_lost"]), place), fmt="o", color=shade, capsize=2, lw=1)
            axes[2].errorbar(*_bar(interval(rows["peak_progress"]), place), fmt="o", color=shade, capsize=2, lw=1)
        axes[0].axvline(summary["gold_start"].mean(), color="black", lw=0.6, ls=":")
        axes[0].set(title="gold reward: end (dot), peak (bar), start (dotted)", yticks=places, yticklabels=labels)
        axes[1].axvline(0, color="black", lw=0.6, ls=":")
        axes[1].set(title="lost between peak and end")
        axes[2].set(title="share of the training at the peak", xlim=(-0.05, 1.1))
    return figure


def draw_sampled_over_exact(history: pd.DataFrame, color: Mapping[str, str]) -> Figure:
    """Sampled estimates, with two standard errors, over the exact values that they estimate."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for axis, column, label in ((axes[0], "kl", "KL, nats (Rao-Blackwell)"), (axes[1], "gold", "gold reward")):
            for method, rows in history.groupby("method", sort=False):
                axis.errorbar(
                    rows[column],
                    rows[f"sampled_{column}"],
                    yerr=2 * rows[f"sampled_{column}_stderr"],
                    fmt="o",
                    ms=2.5,
                    lw=0.5,
                    color=color.get(str(method), OTHER),
                    label=method,
                )
            ends = [history[column].min(), history[column].max()]
            axis.plot(ends, ends, color="black", lw=0.8)
            axis.set(xlabel=f"exact {label}", ylabel=f"sampled {label}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def with_proxy(history: pd.DataFrame) -> pd.DataFrame:
    """The validations of methods that are trained on a reward, where that is not the gold reward itself."""
    truth = history["sampled_gold"] if "sampled_gold" in history else history["gold"]
    differs = (history["proxy"] - truth).abs() > SAME
    return history[history["method"].isin(history.loc[differs, "method"])]


def draw_proxy(history: pd.DataFrame, settings: Sequence[str], color: Mapping[str, str]) -> Figure:
    """What a policy gained by the reward that it is trained on, and by gold, over sqrt(KL): a panel a method and group.

    Both are above their values at the start of the same run, as a learned reward knows no zero; a line is the mean over
    seeds, step by step, a dot a checkpoint. Where the dashed line leaves the other, the reward is over-optimized (arXiv
    2210.10760, figure 1).
    """
    trained = with_proxy(history)
    panels = list(trained.groupby(["method", *settings], sort=False, dropna=False))
    columns = min(3, len(panels))
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            -(-len(panels) // columns),
            columns,
            figsize=(1.0 + 3.2 * columns, 3.0 * -(-len(panels) // columns)),
            layout="constrained",
            squeeze=False,
            sharey=True,
        )
        for axis, (key, rows) in zip(axes.flat, panels, strict=False):
            starts = rows[rows["progress"] == 0].set_index("seed")
            shade = color.get(key[0], COLORS[1])
            for column, style, marker in (("gold", "-", "o"), ("proxy", "--", "^")):
                label = "gold" if column == "gold" else "reward that is trained on"
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


def draw_heat_map(summary: pd.DataFrame, settings: Sequence[str], column: str, label: str) -> Figure:
    """Means over seeds: a line a method, a column a value of the first setting, a panel a combination of the rest."""
    first, rest = settings[0], list(settings[1:])
    summary = _everywhere(summary, settings)
    panels = list(summary.groupby(rest, sort=False)) if rest else [((), summary)]
    low, high = _range(summary, settings, column)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(2.0 + 2.3 * len(panels), 2.8), layout="constrained", squeeze=False, sharey=True
        )
        for axis, (values, rows) in zip(axes[0], panels, strict=True):
            table = rows.pivot_table(index="method", columns=first, values=column, aggfunc="mean", sort=False)
            image = axis.imshow(table, cmap="viridis", vmin=low, vmax=high, aspect="auto")
            axis.set_xticks(range(len(table.columns)), [_shown(value) for value in table.columns])
            axis.set_yticks(range(len(table.index)), table.index)
            for (line, place), value in np.ndenumerate(table.to_numpy()):
                ink = "black" if value > (low + high) / 2 else "white"
                axis.text(place, line, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
            named = zip(rest, values if isinstance(values, tuple) else (values,), strict=True)
            axis.set(xlabel=first, title="\n".join(f"{key} {_shown(value)}" for key, value in named))
            axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes[0].tolist(), label=label)
    return figure


def _best_checkpoint(rows: pd.DataFrame, settings: Sequence[str]) -> tuple["pd.Series[Any]", pd.DataFrame]:
    """Means of the best group of settings and step, and its rows, one a seed."""
    columns = ["kl", "gold", "win_rate"]
    cells = [cell[columns] for _, cell in rows.groupby([*settings, "step"], dropna=False)]
    best = max(cells, key=lambda cell: float(cell["gold"].mean()))
    return best.mean(), best


def _draw_fit(axis: Axes, rows: pd.DataFrame, shade: str) -> None:
    start = rows.loc[rows["progress"] == 0, "gold"].mean()
    alpha, beta, explained = fit_gao(rows["kl"].tolist(), (rows["gold"] - start).tolist())
    if explained >= GOOD_FIT:
        d = np.linspace(1e-3, np.sqrt(rows["kl"].max()), 200)
        axis.plot(d, start + d * (alpha - beta * np.log(d)), color=shade, lw=1, ls="--")


def _padded(values: "pd.Series[float]") -> tuple[float | None, float | None]:
    low, high = values.min(), values.max()
    return (None, None) if np.isnan(low) or low == high else (low - 0.05 * (high - low), high + 0.1 * (high - low))


def _range(summary: pd.DataFrame, settings: Sequence[str], column: str) -> tuple[float, float]:
    means = summary.groupby(["method", *settings], dropna=False)[column].mean()
    return float(means.min()), float(means.max())


def _bar(value: tuple[float, float], place: float) -> tuple[float, float, None, float]:
    """Positional arguments of ``errorbar``: x, y, y error, x error."""
    return value[0], place, None, 0.0 if np.isnan(value[1]) else value[1]


def _label(key: Any) -> str:
    method, *values = key if isinstance(key, tuple) else (key,)
    return ", ".join([str(method), *(_shown(value) for value in values if not pd.isna(value))])


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str | bool | np.bool_) else f"{value:g}"


def _mean(values: "pd.Series[float]") -> float:
    return interval(values.tolist())[0]


def _half(values: "pd.Series[float]") -> float:
    return interval(values.tolist())[1]


def _everywhere(rows: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Rows of methods that a setting is nothing to (NaN) at each of its values, in the order of the methods."""
    for setting in settings:
        values = rows[setting].dropna().unique()
        of_none = rows[setting].isna()
        if of_none.any() and len(values):
            copies = [rows[of_none].assign(**{setting: value}) for value in values]
            rows = pd.concat([rows[~of_none], *copies]).sort_index(kind="stable")
    return rows
