"""Each loss against algebra worked by hand, and the closed form that it has where every run begins."""

import math

import pytest
import torch
from torch import Tensor

from lit_isdpo.objective.losses import DPOLoss, IPOLoss, PairLogps, PreferenceLoss, SLiCLoss
from lit_isdpo.types import InputError


def pairs(chosen: Tensor, rejected: Tensor, ref_chosen: float = -10.0, ref_rejected: float = -12.0) -> PairLogps:
    """Two pairs; chosen responses of 4 tokens, rejected ones of 2."""
    full = torch.full_like(chosen, 1.0)
    return PairLogps(chosen, rejected, ref_chosen * full, ref_rejected * full, 4 * full, 2 * full)


EXAMPLE = pairs(torch.tensor([-9.0, -14.0]), torch.tensor([-13.0, -10.0]))
"""Log-ratios: s_w = 1, -4 and s_l = -1, 2, so h = 2, -6; per token s_w/4 = 1/4, -1 and s_l/2 = -1/2, 1."""

LOSSES: list[tuple[PreferenceLoss, list[float], float]] = [
    # loss, its value on the example, its value at the reference
    (DPOLoss(beta=0.5), [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))], math.log(2)),
    (IPOLoss("sum", beta=0.5), [1.0, 49.0], 1.0),
    (IPOLoss("mean", beta=0.25), [(0.75 - 2) ** 2, (-2 - 2) ** 2], 4.0),
    (SLiCLoss(beta=0.5), [0.0, 4.0], 1.0),
]


@pytest.mark.parametrize(("loss", "expected", "_"), LOSSES)
def test_worked_algebra(loss: PreferenceLoss, expected: list[float], _: float) -> None:
    torch.testing.assert_close(loss(EXAMPLE), torch.tensor(expected))


@pytest.mark.parametrize(("loss", "_", "at_reference"), LOSSES)
def test_closed_form_where_policy_is_reference(loss: PreferenceLoss, _: list[float], at_reference: float) -> None:
    torch.testing.assert_close(loss(EXAMPLE.at_reference()), torch.full((2,), at_reference))


@pytest.mark.parametrize(("loss", "_", "__"), LOSSES)
def test_swapping_chosen_and_rejected_flips_the_margin(loss: PreferenceLoss, _: list[float], __: float) -> None:
    swapped = PairLogps(
        EXAMPLE.rejected_logps,
        EXAMPLE.chosen_logps,
        EXAMPLE.ref_rejected_logps,
        EXAMPLE.ref_chosen_logps,
        EXAMPLE.rejected_num_tokens,
        EXAMPLE.chosen_num_tokens,
    )
    chosen, rejected = loss.utilities(EXAMPLE)
    torch.testing.assert_close(loss(swapped), loss.penalty(rejected - chosen))


@pytest.mark.parametrize(("loss", "_", "__"), LOSSES)
def test_gradients(loss: PreferenceLoss, _: list[float], __: float) -> None:
    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(pairs(chosen, rejected))

    chosen = torch.tensor([-9.3, -14.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-13.1, -10.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (chosen, rejected))


def test_the_logistic_loss_is_finite_far_out() -> None:
    far = pairs(torch.tensor([-5000.0]), torch.tensor([5000.0]))  # h = -4990 - 5012
    torch.testing.assert_close(DPOLoss(beta=1.0)(far), torch.tensor([10_002.0]))


@pytest.mark.parametrize("beta", [0.0, -0.1, float("inf"), float("nan")])
def test_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(InputError, match=r"loss\.beta must be a positive number"):
        DPOLoss(beta=beta)


def test_ipo_says_which_logratio() -> None:
    with pytest.raises(InputError, match="'sum' or 'mean'"):
        IPOLoss("token")  # type: ignore[arg-type]
