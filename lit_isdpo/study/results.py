"""The logs of runs as tables: one row per validation, one row per run, one row per group of seeds."""

import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_isdpo.study.grid import Run
from lit_isdpo.types import InputError

KL_BUDGETS = (0.5, 1.0, 2.0, 4.0)
WIDEST_GAP = 2.0  # nats between two checkpoints: a line between farther ones says nothing about the curve
ENOUGH_SEEDS = 8  # for a bootstrap over seeds: with fewer it knows nothing about what it has not seen
SOURCES = {
    "gold": ("val/exact/gold_reward", "val/gold_reward"),
    "kl": ("val/exact/kl", "val/kl/rao_blackwell"),
    "proxy": ("val/reward",),
    "win_rate": ("val/exact/win_rate", "val/win_rate"),
    "weight": ("val/weights/mean",),
    "ess": ("val/weights/ess",),
    "support_mass": ("val/exact/support_mass",),
    "loss": ("val/loss",),
    "accuracy": ("val/rewards/accuracies",),
    "length": ("val/exact/response_length", "val/response_length"),
}
"""Column of a study, and the log keys that it is taken from: exact values before sampled ones."""


def read_log(folder: Path) -> pd.DataFrame:
    """A run's log, one row an optimizer step, a column a log key; NaN where a key was not logged at a step.

    Args:
        folder: one ``version_N``, or the folder of several that are one run, cut off and resumed: what a later one
            logged at a step counts.

    Where there is no ``metrics.csv``, the TensorBoard events are read.

    Raises:
        InputError: there is neither.
    """
    in_order = sorted(folder.glob("version_*"), key=lambda part: (len(part.name), part.name))  # 2 before 10
    own = _read_version(folder)
    versions = [_read_version(part) for part in in_order] if own is None else [own]
    if all(version is None for version in versions):
        raise InputError(f"{str(folder)!r} holds no log of a run: no metrics.csv, no TensorBoard events.")
    return pd.concat(versions).groupby("step").last().drop(columns="epoch", errors="ignore")


def _read_version(folder: Path) -> pd.DataFrame | None:
    csv = folder / "metrics.csv"
    if csv.is_file() and csv.stat().st_size:
        whole_lines = csv.read_text().rpartition("\n")[0]  # a kill may have cut the last one, in a number even
        return pd.read_csv(StringIO(whole_lines + "\n"))
    if not any(folder.glob("events.out.tfevents.*")):
        return None
    # All scalars: by default a sample of each is kept.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    columns = {
        tag: pd.Series({event.step: event.value for event in events.Scalars(tag)}) for tag in events.Tags()["scalars"]
    }
    return pd.DataFrame(columns).rename_axis("step").reset_index()


def validations(log: pd.DataFrame) -> pd.DataFrame:
    """The validations of a log under the columns of ``SOURCES``, with ``step`` and ``progress``, 0 at the start to 1.

    ``sampled_gold`` and ``sampled_kl``, with their standard errors, stand beside exact values.
    """
    rows = log[log["val/loss"].notna()] if "val/loss" in log else log.iloc[:0]
    table = pd.DataFrame({"step": rows.index, "progress": rows.index / max(1, rows.index.max() if len(rows) else 1)})
    for column, keys in SOURCES.items():
        key = next((key for key in keys if key in rows), None)
        table[column] = math.nan if key is None else rows[key].to_numpy()
    for column, key in (("gold", "val/gold_reward"), ("kl", "val/kl/rao_blackwell")):
        for suffix in ("", "_stderr"):
            if f"{key}{suffix}" in rows:
                table[f"sampled_{column}{suffix}"] = rows[f"{key}{suffix}"].to_numpy()
    return table


def summarize(history: pd.DataFrame) -> dict[str, float]:
    """What a run came to: gold reward, where it peaked, and at which price in KL.

    Args:
        history: of one run, as :func:`validations` gives it.

    Returns:
        ``gold_{start,peak,final}``; ``gold_lost``, peak minus final: the over-optimization; ``gold_low``, the least
        after half of the training; ``gold_area``, the mean over the training; ``gold_at_kl_B``, the best of the
        checkpoints within B nats; ``peak_progress``, the share of the training at which gold peaked; ``kl_peak``; and
        the final ``kl``, ``proxy`` (of a policy that is trained on a reward, what that one says), ``win_rate``,
        ``weight``, ``ess``, ``accuracy``, ``loss``, ``length`` and ``support_mass``.
    """
    gold, last = history["gold"], history.iloc[-1]
    # Of data without a known reward there is no peak.
    at_peak = history.loc[gold.idxmax()] if gold.notna().any() else pd.Series(math.nan, index=history.columns)
    values = {
        "gold_start": gold.iloc[0],
        "gold_peak": at_peak["gold"],
        "gold_final": last["gold"],
        "gold_lost": at_peak["gold"] - last["gold"],
        "gold_low": gold[history["progress"] >= 0.5].min(),
        "gold_area": np.trapezoid(gold, history["progress"]),
        "peak_progress": at_peak["progress"],
        "kl_peak": at_peak["kl"],
    }
    values |= {column: last[column] for column in SOURCES if column != "gold"}
    values |= {f"gold_at_kl_{budget:g}": gold[history["kl"] <= budget].max() for budget in KL_BUDGETS}
    return {key: float(value) for key, value in values.items()}


def read_runs(runs: Sequence[Run], root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The validations of all runs, and a summary of each run.

    Both tables begin with ``design``, ``method``, the settings of the grid (empty where a method is without one) and
    ``seed``.

    Raises:
        InputError: a run was not validated.
    """
    histories, summaries = [], []
    for run in runs:
        identity = {"design": run.design, "method": run.method, **run.settings, "seed": run.seed}
        history = validations(read_log(root / run.folder))
        if history.empty:
            raise InputError(f"{run.name}: there is no validation in its log, and a study compares those.")
        histories.append(history.assign(**identity))
        summaries.append({**identity, **summarize(history)})
    columns = ["design", "method", *dict.fromkeys(key for run in runs for key in run.settings), "seed"]
    tables = pd.concat(histories, ignore_index=True), pd.DataFrame(summaries)
    history, summary = (table[[*columns, *table.columns.difference(columns, sort=False)]] for table in tables)
    return history, summary


def groups(table: pd.DataFrame, settings: Sequence[str]) -> "pd.api.typing.DataFrameGroupBy":
    """Rows by design, method and settings, in the order of the study, over seeds."""
    return table.groupby(["design", "method", *settings], sort=False, dropna=False)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean over seeds and the half width of its Student-t interval, NaN for one seed.

    With three to five seeds a bootstrap knows nothing about what it has not seen and is too narrow; the t interval
    covers where a method's values are about normal over seeds.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    known = pd.Series(values, dtype=float).dropna()
    return float(known.mean()), float(stats.t.ppf((1 + level) / 2, len(known) - 1) * known.sem())


def against_baseline(
    summary: pd.DataFrame, history: pd.DataFrame, settings: Sequence[str], baseline: str
) -> pd.DataFrame:
    """Differences to the baseline on the same design, settings and seed, a row a run of another method.

    ``final`` and ``peak`` are differences in gold reward. ``equal_kl`` is the final gold reward minus the baseline's
    where it first had that KL (its checkpoints are joined by lines, of ``WIDEST_GAP`` at most): against a baseline that
    is stopped early. A setting that the baseline does not have matches all of its values.
    """
    rows = []
    keys = ["design", "method", *settings, "seed"]
    of_baseline = summary[summary["method"] == baseline]
    for _, run in summary[summary["method"] != baseline].iterrows():
        same = (of_baseline["design"] == run["design"]) & (of_baseline["seed"] == run["seed"])
        for key in settings:
            same &= (of_baseline[key] == run[key]) | of_baseline[key].isna()
        for _, other in of_baseline[same].head(1).iterrows():
            curve = history[(history[keys].eq(other[keys]) | other[keys].isna()).all(axis=1)].sort_values("step")
            ends = [run[column] - other[column] for column in ("gold_final", "gold_peak", "kl")]
            rows.append([*run[keys], *ends, run["gold_final"] - _gold_at(curve, run["kl"])])
    return pd.DataFrame(rows, columns=[*keys, "final", "peak", "kl", "equal_kl"])


def paired_effect(differences: Sequence[float]) -> tuple[float, float, float]:
    """What paired differences over seeds say beside their mean.

    Returns:
        The ends of the mean's 95 % bootstrap interval (bias-corrected and accelerated, 10,000 draws), NaN below
        ``ENOUGH_SEEDS``, and Cohen's d: the mean over the standard deviation of the differences.
    """
    known = pd.Series(differences, dtype=float).dropna()
    spread = known.std()
    effect = float(known.mean() / spread) if spread > 0 else math.nan
    if len(known) < ENOUGH_SEEDS or math.isnan(effect):
        return math.nan, math.nan, effect
    drawn = stats.bootstrap((known,), np.mean, n_resamples=10_000, rng=np.random.default_rng(0))
    low, high = drawn.confidence_interval
    return float(low), float(high), effect


def across_designs(summary: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """How near each method came to the best of all, design by design: a row a method and settings, the best first.

    The *share* of a design is the mean final gold reward above the reference's, as a share of that of the best row on
    that design: 1 is the best, 0 is the reference. A design on which no row ends above the reference has no such scale
    and is left out, as are rows that were not run on all designs.

    Returns:
        ``method``, the settings, a column a design, ``mean`` and ``worst`` over the designs.
    """
    designs = list(summary["design"].unique())
    means = summary.groupby(["method", *settings, "design"], sort=False, dropna=False)["gold_final"].mean()
    gained = means.unstack("design")[designs] - summary.groupby("design")["gold_start"].mean()[designs]
    gained = gained[[design for design in designs if gained[design].max() > 0]]
    shares = (gained / gained.max()).dropna()
    table = shares.assign(mean=shares.mean(axis=1), worst=shares.min(axis=1))
    return table.sort_values("mean", ascending=False).reset_index()


def _gold_at(curve: pd.DataFrame, kl: float) -> float:
    """Gold reward where a curve first reaches a KL; NaN if it never does, or between checkpoints that lie far apart."""
    kls, golds = curve["kl"].to_numpy(), curve["gold"].to_numpy()
    around = np.flatnonzero((kls[:-1] <= kl) & (kl <= kls[1:]))
    if not len(around) or kls[around[0] + 1] - kls[around[0]] > WIDEST_GAP:
        return math.nan
    line = slice(around[0], around[0] + 2)
    return float(np.interp(kl, kls[line], golds[line]))


def fit_of(history: pd.DataFrame) -> tuple[float, float, float]:
    """:func:`fit_gao` of the checkpoints in a history, whose gold reward counts from its mean at the start."""
    start = history.loc[history["progress"] == 0, "gold"].mean()
    return fit_gao(history["kl"].tolist(), (history["gold"] - start).tolist())


def fit_gao(kl: Sequence[float], gained: Sequence[float]) -> tuple[float, float, float]:
    """Fits ``R = d (alpha - beta log d)``, ``d = sqrt(KL)`` (arXiv 2210.10760 for RL, 2406.02900 for DPO and its kin).

    Args:
        kl: of N checkpoints, in nats; those at 0 say nothing.
        gained: their gold reward above the reference's.

    Returns:
        alpha, beta and the share of variance explained; NaN below three checkpoints.
    """
    d = np.sqrt(np.asarray(kl, dtype=float))
    reward = np.asarray(gained, dtype=float)
    used = (d > 1e-3) & np.isfinite(reward)
    d, reward = d[used], reward[used]
    if len(d) < 3:
        return math.nan, math.nan, math.nan
    features = np.stack([d, -d * np.log(d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(features, reward, rcond=None)
    residual = reward - features @ [alpha, beta]
    spread = ((reward - reward.mean()) ** 2).sum()
    return float(alpha), float(beta), float(1 - (residual**2).sum() / spread) if spread > 0 else math.nan
