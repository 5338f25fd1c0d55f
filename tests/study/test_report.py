"""A report of made-up runs: its words and tables say what the numbers say, and every picture is there."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lit_isdpo.study import figures
from lit_isdpo.study.grid import Run
from lit_isdpo.study.report import write_report
from lit_isdpo.types import InputError

GOLD = {"DPO": [0.5, 1.5, 1.0], "IS-DPO": [0.5, 1.4, 1.3], "same": [0.5, 1.5, 1.0]}


def make_runs(root: Path, *, settings: dict[str, list[float]], exact: bool) -> list[Run]:
    """Three seeds of each method; the end of a seed is off by a hundredth, the same for all methods but "same"."""
    runs = []
    cells = [dict(zip(settings, values, strict=True)) for values in zip(*settings.values(), strict=True)] or [{}]
    for seed in range(3):
        for method, gold in GOLD.items():
            for cell in cells:
                run = Run("toy", method, cell, seed, (), f"{len(runs)}")
                shift = 0.01 * seed * (-1 if method == "same" else 1)
                log = pd.DataFrame(
                    {
                        "step": [0, 5, 10],
                        "epoch": 0,
                        "val/loss": [0.7, 0.6, 0.5],
                        "val/gold_reward": [gold[0], gold[1], gold[2] + shift],
                        "val/gold_reward_stderr": 0.1,
                        "val/kl/rao_blackwell": [0, 1 + shift, 4 + shift],
                        "val/kl/rao_blackwell_stderr": 0.1,
                        "val/win_rate": [0.5, 0.7, 0.6],
                        "val/weights/mean": [1, 0.5, 0.2],
                        "val/weights/ess": [1, 0.4, 0.1],
                    }
                )
                if exact:
                    log["val/exact/gold_reward"], log["val/exact/kl"] = log["val/gold_reward"], [0, 1.1, 4.1]
                folder = root / run.folder / "version_0"
                folder.mkdir(parents=True)
                log.to_csv(folder / "metrics.csv", index=False)
                runs.append(run)
    return runs


def report(folder: Path, runs: list[Run], root: Path, **changes) -> str:
    given = {
        "title": "A study",
        "notes": "A *note*.",
        "num_planned": 99,
        "baseline": "DPO",
        "highlight": ["DPO", "IS-DPO"],
    }
    write_report(folder, runs=runs, root=root, **{**given, **changes})
    return (folder / "report.md").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the drawing library
def test_words_tables_and_pictures(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs", settings={"beta": [0.01, 0.1]}, exact=True)
    text = report(tmp_path / "out", runs, tmp_path / "runs")
    assert text.startswith("# A study\n\nA *note*.\n\n18 of 99 runs, 3 seeds")
    assert "Grey in the pictures, and left out of those over the training: same.\n" in text
    assert "The best end is that of IS-DPO (0.01) (1.31)" in text
    assert "Ends above DPO by more than the interval of the paired differences: IS-DPO (0.01) (+0.30 ± 0.00)" in text
    assert "Of 4 such comparisons 0.2 would be that far off by chance" in text
    assert "Not to be told from DPO by its end on these seeds: same (0.01), same (0.1)" in text
    assert "| DPO | 0.01 | 3 | 1.50 ± 0.00 | 1.01 ± 0.02 | 0.49 ± 0.02 |" in text
    for name in ("frontier", "training", "over_optimization", "sampled_over_exact"):
        assert f"(toy_{name}.png)" in text
        assert (tmp_path / "out" / f"toy_{name}.png").read_bytes().startswith(b"\x89PNG")
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == 18
    assert list(results)[:4] == ["design", "method", "beta", "seed"]
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == 54


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_several_settings_become_heat_maps(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs", settings={"lr": [0.1, 0.1, 0.2], "eps": [1, 2, 2]}, exact=False)
    text = report(tmp_path / "out", runs, tmp_path / "runs", baseline=None)
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {
        "toy_frontier.png",
        "toy_final_gold.png",
        "toy_final_kl.png",
    }
    assert "Differences" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("settings", "pictures"), [({}, {"training"}), ({"lr": [1, 2], "eps": [1, 2]}, {"final_kl"})])
def test_data_without_a_gold_reward_is_compared_by_kl(tmp_path: Path, settings, pictures: set[str]) -> None:
    runs = make_runs(tmp_path / "runs", settings=settings, exact=False)
    for file in tmp_path.rglob("metrics.csv"):
        log = pd.read_csv(file)
        log.drop(columns=[key for key in log if "gold" in key or "win" in key]).to_csv(file, index=False)
    text = report(tmp_path / "out", runs, tmp_path / "runs")
    assert "No gold reward is known for this data" in text
    assert "The best end" not in text
    assert "nan" not in text
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == {f"toy_{name}" for name in pictures}
    assert "| IS-DPO |" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "settings", [{"decay": ["linear", "null"]}, {"decay": ["linear", "null"], "on": [True, False]}]
)
def test_settings_may_be_texts(tmp_path: Path, settings) -> None:
    runs = make_runs(tmp_path / "runs", settings=settings, exact=False)
    assert "| DPO | linear |" in report(tmp_path / "out", runs, tmp_path / "runs")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_best_method_may_be_without_the_settings(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs", settings={"lr": [0.1, 0.2], "eps": [1, 2]}, exact=True)
    bare = [replace(run, settings={}) if run.method == "IS-DPO" else run for run in runs]
    for old, new in zip(runs, bare, strict=True):
        (tmp_path / "runs" / old.folder).rename(tmp_path / "runs" / new.folder)
    assert "The best end is that of IS-DPO (1.31)" in report(tmp_path / "out", bare, tmp_path / "runs")


def test_a_run_without_validations_is_named(tmp_path: Path) -> None:
    run = Run("toy", "DPO", {}, 0, (), "1")
    (tmp_path / run.folder / "version_0").mkdir(parents=True)
    (tmp_path / run.folder / "version_0" / "metrics.csv").write_text("step,train/loss\n1,0.5\n")
    with pytest.raises(InputError, match="toy, DPO, seed 0: there is no validation in its log"):
        report(tmp_path / "out", [run], tmp_path)


def test_a_method_without_a_setting_is_drawn_at_each_of_its_values() -> None:
    rows = [("DPO", math.nan, 0.5), ("IS-DPO", 0.0, 1.0), ("IS-DPO", 1.0, 2.0)]
    summary = pd.DataFrame(rows, columns=["method", "epsilon", "gold_final"])
    axis = figures.draw_heat_map(summary, ["epsilon"], "gold_final", "gold").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["DPO", "IS-DPO"]
    assert axis.images[0].get_array().tolist() == [[0.5, 0.5], [1.0, 2.0]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reward_that_is_trained_on_is_drawn_beside_gold(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs", settings={}, exact=True)
    assert "proxy" not in report(tmp_path / "before", runs, tmp_path / "runs")
    for file in (tmp_path / "runs").rglob("IS-DPO*/**/metrics.csv"):
        log = pd.read_csv(file)
        log.assign(**{"val/reward": [0.0, 2.0, 3.0]}).to_csv(file, index=False)
    assert "![toy: proxy](toy_proxy.png)" in report(tmp_path / "after", runs, tmp_path / "runs")
    history = pd.read_csv(tmp_path / "after" / "history.csv")
    (axis,) = figures.draw_proxy(history, [], {}).axes
    assert axis.get_title() == "IS-DPO"
    as_gold = history.assign(proxy=history["gold"])
    assert figures.with_proxy(as_gold).empty, "a policy that is trained on gold has no other reward"
    gold, proxy = (line.get_ydata() for line in axis.lines[:2])
    assert list(gold) == pytest.approx([0.0, 0.9, 0.81])
    assert list(proxy) == pytest.approx([0.0, 2.0, 3.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reward_that_is_trained_on_has_a_panel_at_each_setting(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs", settings={"beta": [0.01, 0.1]}, exact=True)
    for file in (tmp_path / "runs").rglob("IS-DPO*/**/metrics.csv"):
        shift = 1.0 if "beta=0.1" in str(file) else 0.0
        log = pd.read_csv(file)
        log.assign(**{"val/reward": [0.0, 2.0 + shift, 3.0]}).to_csv(file, index=False)
    assert "![toy: proxy](toy_proxy.png)" in report(tmp_path / "out", runs, tmp_path / "runs")
    panels = figures.draw_proxy(pd.read_csv(tmp_path / "out" / "history.csv"), ["beta"], {}).axes
    assert [axis.get_title() for axis in panels] == ["IS-DPO, 0.01", "IS-DPO, 0.1"]
    assert [axis.lines[1].get_ydata()[1] for axis in panels] == pytest.approx([2.0, 3.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_seed_tells_no_difference(tmp_path: Path) -> None:
    runs = [run for run in make_runs(tmp_path / "runs", settings={}, exact=True) if run.seed == 0]
    text = report(tmp_path / "out", runs, tmp_path / "runs")
    assert "One seed tells no difference from chance" in text
    assert "such comparisons" not in text
    assert "Not to be told" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_designs_are_put_side_by_side(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs", settings={}, exact=False)
    assert "All designs" not in report(tmp_path / "one", runs, tmp_path / "runs")
    others = [replace(run, design="other") for run in runs]
    (tmp_path / "runs" / "other").symlink_to(tmp_path / "runs" / "toy")
    text = report(tmp_path / "two", runs + others, tmp_path / "runs")
    shares = {"IS-DPO": "1.00", "DPO": "0.63", "same": "0.60"}
    assert text.endswith("".join(f"| {method} | {' | '.join([share] * 4)} |\n" for method, share in shares.items()))
