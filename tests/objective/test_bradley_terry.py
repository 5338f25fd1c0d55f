"""The loss of a reward model, against values worked out by hand."""

import math

import pytest
import torch

from lit_isdpo.objective.losses import bradley_terry_losses
from lit_isdpo.objective.metrics import RowMetrics, score_columns

CHOSEN, REJECTED = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])


def test_the_loss_is_that_of_the_difference_beyond_the_margin() -> None:
    """-log sigmoid(x) = log(1 + exp(-x)) at x = 2 - 1 - 0.5, 0 and 1 - 3."""
    losses = bradley_terry_losses(CHOSEN, REJECTED, torch.tensor([0.5, 0.0, 0.0]))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in (0.5, 0.0, -2.0)])


def test_centering_adds_the_square_of_the_sum() -> None:
    added = bradley_terry_losses(CHOSEN, REJECTED, torch.zeros(3), centering=0.01)
    added = added - bradley_terry_losses(CHOSEN, REJECTED, torch.zeros(3))
    assert added.tolist() == pytest.approx([0.09, 0.0, 0.16], abs=1e-6)


def test_the_gradient_is_minus_the_probability_of_the_other_order() -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    bradley_terry_losses(chosen, rejected, torch.zeros(3)).sum().backward()
    other_order = torch.sigmoid(REJECTED - CHOSEN)
    torch.testing.assert_close(chosen.grad, -other_order)
    torch.testing.assert_close(rejected.grad, other_order)


def test_far_apart_rewards_stay_finite() -> None:
    losses = bradley_terry_losses(torch.tensor([-500.0]), torch.tensor([500.0]), torch.zeros(1))
    assert losses.item() == 1000


def test_means_are_over_counted_pairs_and_ties_are_one_half() -> None:
    metrics = RowMetrics()
    losses = torch.tensor([0.3, 0.7, 2.0])
    metrics.update(score_columns(losses[:2], CHOSEN[:2], REJECTED[:2]), 2)
    metrics.update(score_columns(losses[[2, 0]], CHOSEN[[2, 0]], REJECTED[[2, 0]]), 1)
    values = {key: value.item() for key, value in metrics.compute().items()}
    assert values == pytest.approx(
        {
            "loss": 1.0,
            "rewards/chosen": 1.0,
            "rewards/rejected": 4 / 3,
            "rewards/accuracies": 0.5,
            "rewards/margins": -1 / 3,
            "rewards/mean": 7 / 6,
        }
    )


def test_sums_are_kept_in_float64_without_gradient_and_added_up_over_ranks() -> None:
    """2^24 + 1 is no fp32 number: within a batch, over batches, and over ranks the ones are not lost."""
    rank, other = RowMetrics(), RowMetrics()
    large = torch.tensor([2.0**24, 1.0, 1.0, 1.0])
    rewards = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    rank.update(score_columns(large.clone().requires_grad_(), *rewards), 4)
    rank.update(score_columns(torch.ones(4), *rewards), 4)
    other.update(score_columns(torch.ones(4), *rewards), 4)
    assert not rank.sums.requires_grad
    rank.merge_state(other)
    assert rank.totals()["loss"] == (2**24 + 11, 12)
    assert {value.dtype for value in rank.compute().values()} == {torch.float32}
