"""The experiments as they stand: what the lab is for can be seen in their logs."""

from pathlib import Path

import pytest

from lit_isdpo.cli import main
from tests.conftest import read_metrics

CONFIGS = Path(__file__).parent.parent.parent / "configs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The mean importance weight fell", "ignore:The effective sample size fell"),
]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[int, float]]]:
    logs = {}
    for name in ("posts_dpo", "posts_is_dpo"):
        root = tmp_path_factory.mktemp(name)
        options = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={root}"]
        main(["fit", f"--config={CONFIGS / 'experiment' / name}.yaml", *options])
        logs[name] = read_metrics(root / "version_0")
    return logs


def test_gold_reward_of_dpo_rises_and_falls_while_its_loss_falls_and_kl_grows(
    logs: dict[str, dict[str, dict[int, float]]],
) -> None:
    dpo = logs["posts_dpo"]
    gold, error = dpo["val/gold_reward"], dpo["val/gold_reward_stderr"]
    first, last, peak = min(gold), max(gold), max(gold, key=gold.__getitem__)
    assert gold[peak] - gold[first] > 4 * error[first]
    assert gold[peak] - gold[last] > 4 * error[last]
    loss, kl = dpo["train/loss"], dpo["val/kl/rao_blackwell"]
    assert loss[max(loss)] < loss[0]
    assert kl[first] == 0
    assert kl[peak] < kl[last]


def test_kl_trajectories_side_by_side(logs: dict[str, dict[str, dict[int, float]]]) -> None:
    """The same first step; later the weights hold the policy nearer to its reference, and fade as it leaves."""
    dpo, is_dpo = logs["posts_dpo"], logs["posts_is_dpo"]
    for ratio in ("chosen", "rejected"):
        assert dpo[f"train/logratios/{ratio}"][0] == is_dpo[f"train/logratios/{ratio}"][0] == 0
    # The weights divide by the data's log-probs, which were rounded in another layout of the rows.
    assert dpo["train/loss"][0] == pytest.approx(is_dpo["train/loss"][0], abs=1e-6)
    kl, is_kl = dpo["val/kl/rao_blackwell"], is_dpo["val/kl/rao_blackwell"]
    assert is_kl[max(is_kl)] < kl[max(kl)]
    weights = is_dpo["val/weights/mean"]
    assert weights[min(weights)] == pytest.approx(1, abs=1e-6)  # likewise
    assert weights[max(weights)] < 0.5
    assert set(dpo["val/weights/mean"].values()) == {1.0}
