"""What runs logged, read back: hand-made logs with known answers."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_isdpo.study.results import (
    across_designs,
    against_baseline,
    fit_gao,
    interval,
    paired_effect,
    read_log,
    summarize,
    validations,
)
from lit_isdpo.types import InputError


def write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def history(**columns) -> pd.DataFrame:
    num = len(columns["gold"])
    default = {key: [math.nan] * num for key in ("proxy", "win_rate", "weight", "ess", "accuracy", "loss", "length")}
    steps = {"step": range(num), "progress": np.linspace(0, 1, num), "support_mass": [math.nan] * num}
    return pd.DataFrame({**default, **steps, **columns})


def test_a_log_has_one_row_a_step_and_a_resumed_run_is_one(tmp_path: Path) -> None:
    write(tmp_path / "version_0", "step,epoch,train/loss,val/loss\n1,0,0.7,\n2,0,0.6,\n2,0,,0.5\n3,0,0.9,\n")
    write(tmp_path / "version_1", "step,epoch,train/loss,val/loss\n3,1,0.4,\n4,1,,0.3\n")
    log = read_log(tmp_path)
    assert log.index.tolist() == [1, 2, 3, 4]
    assert log["train/loss"].tolist()[:3] == [0.7, 0.6, 0.4]
    assert log["val/loss"].dropna().tolist() == [0.5, 0.3]
    assert read_log(tmp_path / "version_0").index.tolist() == [1, 2, 3]
    with pytest.raises(InputError, match=r"no metrics\.csv"):
        read_log(tmp_path / "version_0" / "none")


def test_tensorboard_events_are_read_where_there_is_no_csv(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path / "version_0") as writer:
        for step in range(2000):  # more than TensorBoard keeps by default
            writer.add_scalar("train/loss", step / 2000, step)
        writer.add_scalar("val/loss", 0.25, 1999)
    log = read_log(tmp_path)
    assert len(log) == 2000
    assert log["train/loss"].tolist() == pytest.approx([step / 2000 for step in range(2000)])
    assert log["val/loss"].dropna().to_dict() == {1999: 0.25}


def test_exact_values_stand_before_sampled_ones() -> None:
    log = pd.DataFrame(
        {
            "val/loss": [0.7, 0.6],
            "val/gold_reward": [1.0, 2.0],
            "val/gold_reward_stderr": [0.1, 0.2],
            "val/kl/rao_blackwell": [0, 3.0],
        },
        index=[0, 8],
    )
    table = validations(log)
    assert table["progress"].tolist() == [0, 1]
    assert table["gold"].tolist() == table["sampled_gold"].tolist() == [1, 2]
    table = validations(log.assign(**{"val/exact/gold_reward": [1.5, 2.5]}))
    assert table["gold"].tolist() == [1.5, 2.5]
    assert table["sampled_gold_stderr"].tolist() == [0.1, 0.2]
    assert table["support_mass"].isna().all()


def test_a_summary_by_hand() -> None:
    values = summarize(
        history(gold=[0.0, 2.0, 1.0, -1.0, 0.5], kl=[0.0, 0.9, 1.5, 3.0, 5.0], win_rate=[0.5, 0.8, 0.7, 0.4, 0.6])
    )
    assert values["gold_start"] == 0
    assert values["gold_peak"] == 2
    assert values["gold_final"] == 0.5
    assert values["gold_lost"] == 1.5
    assert values["gold_low"] == -1
    assert values["peak_progress"] == 0.25
    assert values["kl_peak"] == 0.9
    assert values["kl"] == 5
    assert values["win_rate"] == 0.6
    assert values["gold_area"] == pytest.approx((0 / 2 + 2 + 1 - 1 + 0.5 / 2) / 4)
    assert values["gold_at_kl_0.5"] == 0
    assert values["gold_at_kl_4"] == 2


def test_differences_are_paired_and_at_equal_kl() -> None:
    """The baseline comes to KL 2 halfway between its second and third checkpoint, at gold (3 + 1) / 2."""
    dpo, other = history(gold=[0.0, 3.0, 1.0], kl=[0.0, 1.0, 3.0]), history(gold=[0.0, 1.0, 2.5], kl=[0.0, 1.0, 2.0])
    far = history(gold=[0.0, 1.0, 2.5], kl=[0.0, 1.0, 9.0])
    rows = {("DPO", 0): dpo, ("IS", 0): other, ("far", 0): far, ("IS", 1): other}
    identity = {key: {"design": "toy", "method": key[0], "beta": 0.1, "seed": key[1]} for key in rows}
    table = pd.concat([rows[key].assign(**identity[key]) for key in rows], ignore_index=True)
    summary = pd.DataFrame([{**identity[key], **summarize(rows[key])} for key in rows])
    differences = against_baseline(summary, table, ["beta"], "DPO")
    assert differences[["method", "seed"]].to_numpy().tolist() == [["IS", 0], ["far", 0]]  # seed 1 has no baseline
    assert differences["final"].tolist() == [1.5, 1.5]
    assert differences["peak"].tolist() == [-0.5, -0.5]
    assert differences["equal_kl"][0] == pytest.approx(0.5)
    assert math.isnan(differences["equal_kl"][1])


def test_no_line_is_drawn_between_checkpoints_that_lie_far_apart() -> None:
    """From KL 1 to 3 it is, from 3 to 5.1 it says nothing about what lies between."""
    dpo = history(gold=[0.0, 3.0, 1.0, 0.0], kl=[0.0, 1.0, 3.0, 5.1])
    rows = [("DPO", dpo), *((f"at {kl}", history(gold=[0.0, 2.0], kl=[0.0, kl])) for kl in (3.0, 3.1, 5.1))]
    identity = {name: {"design": "toy", "method": name, "seed": 0} for name, _ in rows}
    table = pd.concat([part.assign(**identity[name]) for name, part in rows], ignore_index=True)
    summary = pd.DataFrame([{**identity[name], **summarize(part)} for name, part in rows])
    near, inside, at_end = against_baseline(summary, table, [], "DPO")["equal_kl"]
    assert near == pytest.approx(1.0)
    assert math.isnan(inside)
    assert math.isnan(at_end)


def test_a_baseline_without_the_setting_stands_for_all_its_values() -> None:
    runs = [("DPO", math.nan, 1.0), ("IS", 0.5, 2.0), ("IS", 1.0, 4.0)]
    histories = [history(gold=[0.0, gold], kl=[0.0, 1.0]) for _, _, gold in runs]
    identity = [{"design": "toy", "method": method, "epsilon": value, "seed": 0} for method, value, _ in runs]
    table = pd.concat([part.assign(**who) for part, who in zip(histories, identity, strict=True)], ignore_index=True)
    summary = pd.DataFrame([{**who, **summarize(part)} for part, who in zip(histories, identity, strict=True)])
    differences = against_baseline(summary, table, ["epsilon"], "DPO")
    assert differences["final"].tolist() == [1.0, 3.0]
    assert differences["equal_kl"].tolist() == [1.0, 3.0]


def test_intervals_cover_at_their_nominal_rate() -> None:
    """Five normal values: 4,000 intervals miss the mean in 5 %, give or take four binomial standard errors."""
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    missed = sum(abs(mean) > half for mean, half in map(interval, draws.tolist()))
    assert abs(missed / 4000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert interval([2.0])[0] == 2
    assert math.isnan(interval([2.0])[1])
    assert interval([1.0, math.nan, 3.0])[0] == 2


def test_the_fit_gives_back_what_made_the_curve() -> None:
    kl = np.linspace(0, 9, 30)
    d = np.sqrt(kl)
    reward = np.where(d > 0, d * (1.3 - 0.7 * np.log(np.maximum(d, 1e-9))), 0)
    assert fit_gao(kl.tolist(), reward.tolist()) == pytest.approx((1.3, 0.7, 1.0))
    noise = np.random.default_rng(0).normal(size=30).tolist()
    assert fit_gao(kl.tolist(), noise)[2] < 0.5
    assert all(math.isnan(value) for value in fit_gao([0.0, 1.0], [0.0, 1.0]))


def test_a_paired_effect_has_a_bootstrap_from_eight_seeds_on() -> None:
    """Standard deviation 1 and mean 2 over two seeds; ten normal draws against the t interval, which is wider."""
    low, high, effect = paired_effect([2 - math.sqrt(0.5), 2 + math.sqrt(0.5)])
    assert (math.isnan(low), math.isnan(high), effect) == (True, True, pytest.approx(2.0))
    assert all(math.isnan(value) for value in paired_effect([1.0, 1.0, 1.0])), "no spread, no scale"
    differences = np.random.default_rng(0).normal(1.0, 0.5, size=10)
    low, high, effect = paired_effect([*differences, math.nan])
    mean, half = interval(differences.tolist())
    assert mean - half < low < mean < high < mean + half
    assert high - low > half
    assert effect == pytest.approx(differences.mean() / differences.std(ddof=1))


def test_shares_are_of_the_best_gain_on_each_design() -> None:
    """On one design the best gains 1.0 over the reference, on the other 0.5; a row that was not run on both is out."""
    rows = [
        ("one", "A", 0.1, 1.5),
        ("one", "B", 0.1, 1.0),
        ("one", "B", 0.2, 1.4),
        ("two", "A", 0.1, 0.25),
        ("two", "B", 0.1, 0.5),
    ]
    summary = pd.DataFrame(rows, columns=["design", "method", "lr", "gold_final"])
    summary["gold_start"] = summary["design"].map({"one": 0.5, "two": 0.0})
    table = across_designs(summary, ["lr"])
    assert table[["method", "one", "two", "mean", "worst"]].to_numpy().tolist() == [
        ["A", 1.0, 0.5, 0.75, 0.5],
        ["B", 0.5, 1.0, 0.75, 0.5],
    ]
    twice = across_designs(pd.concat([summary, summary.assign(gold_final=summary["gold_final"] - 0.5)]), ["lr"])
    assert twice["method"].tolist() == ["B", "A"], "means over seeds come first: gains of 0.75 and 0.25, and 0 and 0.25"
    assert twice["worst"].tolist() == pytest.approx([1 / 3, 0.0])
    harmed = across_designs(summary.assign(gold_start=summary["gold_start"] + summary["design"].eq("two")), ["lr"])
    assert list(harmed) == ["method", "lr", "one", "mean", "worst"], "where all end below the reference, none is best"
