"""The experiments as they stand: what the lab is for can be seen in their logs, and the ways in which the method fails.

Those are no clip, too tight a one, and a wrong mu. Each signature is a difference to the healthy run of the same data,
model and seed.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from lit_isdpo.cli import main
from tests.runs import read_metrics

EXPERIMENTS = Path(__file__).parent.parent.parent / "configs" / "experiment"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The mean importance weight of", "ignore:The effective sample size fell"),
]


Log = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    @cache
    def log_of(name: str, *options: str) -> Log:
        root = tmp_path_factory.mktemp(name)
        quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={root}"]
        main(["fit", f"--config={EXPERIMENTS / name}.yaml", *quiet, *options])
        return read_metrics(root / "version_0")

    return log_of


AT_THE_ENDS = ("--probe.num_prompts=128", "--trainer.check_val_every_n_epoch=8")


def last(values: dict[int, float]) -> float:
    return values[max(values)]


def test_gold_reward_of_dpo_rises_and_falls_while_its_loss_falls_and_kl_grows(run) -> None:  # type: ignore[no-untyped-def]
    dpo = run("posts_dpo")
    gold, error = dpo["val/gold_reward"], dpo["val/gold_reward_stderr"]
    first, end, peak = min(gold), max(gold), max(gold, key=gold.__getitem__)
    assert gold[peak] - gold[first] > 4 * error[first]
    assert gold[peak] - gold[end] > 4 * error[end]
    loss, kl = dpo["train/loss"], dpo["val/kl/rao_blackwell"]
    assert loss[max(loss)] < loss[0]
    assert kl[first] == 0
    assert kl[peak] < kl[end]


def test_kl_trajectories_side_by_side(run) -> None:  # type: ignore[no-untyped-def]
    """The same first step; later the weights hold the policy nearer to its reference, and fade as it leaves."""
    dpo, is_dpo = run("posts_dpo"), run("posts_is_dpo", *AT_THE_ENDS)
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


def test_without_a_clip_a_few_pairs_hold_the_weight_and_the_gradient_jumps(run) -> None:  # type: ignore[no-untyped-def]
    healthy, unclipped = run("posts_is_dpo", *AT_THE_ENDS), run("failure_no_clip", *AT_THE_ENDS)
    assert max(healthy["train/weights/max"].values()) <= 7.4  # exp(2)
    assert max(unclipped["train/weights/max"].values()) > 5 * 7.4
    assert last(unclipped["val/weights/ess"]) < last(healthy["val/weights/ess"])
    assert set(unclipped["train/weights/clip_fraction"].values()) == {0.0}

    def roughness(log: Log) -> float:
        """Largest jump of the gradient's norm, in units of its median."""
        norms = list(log["train/grad_norm"].values())
        jumps = [abs(after - before) for before, after in pairwise(norms)]
        return max(jumps) / sorted(norms)[len(norms) // 2]

    assert roughness(unclipped) > 2 * roughness(healthy)


def test_too_small_an_epsilon_learns_nothing_unless_adam_divides_the_weight_away(run) -> None:  # type: ignore[no-untyped-def]
    healthy, tight = run("posts_is_dpo", *AT_THE_ENDS), run("failure_small_epsilon", *AT_THE_ENDS)
    divided = run("failure_small_epsilon", *AT_THE_ENDS, "--model.optimizer.eps=1e-8")
    assert tight["train/weights/clip_fraction"][0] == 1
    assert max(tight["train/weights/max"].values()) == pytest.approx(0.00248, rel=0.01)  # exp(-6)
    kl = "val/kl/rao_blackwell"
    assert last(tight[kl]) < last(healthy[kl]) / 20
    gained = last(healthy["val/gold_reward"]) - healthy["val/gold_reward"][0]
    assert last(tight["val/gold_reward"]) - tight["val/gold_reward"][0] < gained / 2
    assert last(divided[kl]) > 20 * last(tight[kl])


def test_a_wrong_mu_gives_weights_other_than_one_to_a_policy_that_has_not_moved(run) -> None:  # type: ignore[no-untyped-def]
    healthy, wrong = (
        run("verbosity_is_dpo", *AT_THE_ENDS, "--trainer.max_steps=40"),
        run("failure_wrong_mu", *AT_THE_ENDS, "--trainer.max_steps=40"),
    )
    # Of the true mu, which is the reference given the data's support, the exact mean is the support's squared mass.
    assert healthy["val/weights/mean"][0] == pytest.approx(healthy["val/exact/expected_weight_true_mu"][0], abs=0.01)
    assert healthy["val/weights/clip_fraction"][0] == 0
    assert healthy["val/weights/ess"][0] > 0.99
    assert wrong["val/exact/kl"][0] == 0
    assert wrong["val/weights/mean"][0] > 2
    assert wrong["val/weights/clip_fraction"][0] > 0.1
    assert wrong["val/weights/ess"][0] < 0.8
