"""Each loss against algebra worked by hand, and the closed form that it has where every run begins."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import (
    CDPOLoss,
    ChiPOLoss,
    DPOLoss,
    IPOLoss,
    IRPOLoss,
    LengthRegularizedDPOLoss,
    PreferenceLoss,
    RobustDPOLoss,
    RPOLoss,
    SimPOLoss,
    SLiCLoss,
)
from lit_isdpo.types import InputError
from tests.conftest import pair_logps


def pairs(chosen: Tensor, rejected: Tensor) -> PairLogps:
    """Two pairs; chosen responses of 4 tokens, rejected ones of 2."""
    return pair_logps(chosen, rejected, ref=(-10.0, -12.0), num_tokens=(4, 2))


EXAMPLE = pairs(torch.tensor([-9.0, -14.0]), torch.tensor([-13.0, -10.0]))
"""Log-ratios: s_w = 1, -4 and s_l = -1, 2, so h = 2, -6; per token s_w/4 = 1/4, -1 and s_l/2 = -1/2, 1.
Mean log-probs of a token: -9/4, -14/4 and -13/2, -10/2."""

LN2 = math.log(2)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


LOSSES: list[tuple[PreferenceLoss, list[float], float | None]] = [
    # loss, its value on the example, its value at the reference (SimPO has none)
    (DPOLoss(beta=0.5), [softplus(-1), softplus(3)], LN2),
    (IPOLoss("sum", beta=0.5), [1.0, 49.0], 1.0),
    (IPOLoss("mean", beta=0.25), [(0.75 - 2) ** 2, (-2 - 2) ** 2], 4.0),
    (SLiCLoss(beta=0.5), [0.0, 4.0], 1.0),
    (CDPOLoss(0.5, 0.1), [0.9 * softplus(-1) + 0.1 * softplus(1), 0.9 * softplus(3) + 0.1 * softplus(-3)], LN2),
    (
        RobustDPOLoss(0.5, 0.1),
        [(0.9 * softplus(-1) - 0.1 * softplus(1)) / 0.8, (0.9 * softplus(3) - 0.1 * softplus(-3)) / 0.8],
        LN2,
    ),
    (RPOLoss(0.5, 0.2), [softplus(-1), softplus(3)], LN2),
    (IRPOLoss(0.5, 2.0), [softplus(-1), softplus(3)], LN2),
    # phi(s) = e^s + s: rewards (e + 1)/2 against (1/e - 1)/2, and (e^-4 - 4)/2 against (e^2 + 2)/2
    (
        ChiPOLoss(beta=0.5),
        [softplus(-(math.e - math.exp(-1) + 2) / 2), softplus(-(math.exp(-4) - math.exp(2) - 6) / 2)],
        LN2,
    ),
    # the first preference is 2.18, the second -6.7: with R = 1 both are cut, to 2 and to -2
    (ChiPOLoss(beta=0.5, reward_bound=1.0), [softplus(-2), softplus(2)], LN2),
    # phi(s) = e^(s/2) + s/10
    (
        ChiPOLoss(beta=1.0, alpha=0.5, gamma=0.1),
        [softplus(-(math.exp(0.5) - math.exp(-0.5) + 0.2)), softplus(-(math.exp(-2) - math.exp(1) - 0.6))],
        LN2,
    ),
    (LengthRegularizedDPOLoss(0.5, 0.3), [softplus(-1 - 0.6), softplus(3 - 0.6)], softplus(-0.6)),
    # beta (-9/4 + 13/2) - beta/4, and beta (-14/4 + 10/2) - beta/4
    (SimPOLoss(2.0, 0.25), [softplus(-(8.5 - 0.5)), softplus(-(3.0 - 0.5))], None),
]


@pytest.mark.parametrize(("loss", "expected", "_"), LOSSES)
def test_worked_algebra(loss: PreferenceLoss, expected: list[float], _: float) -> None:
    torch.testing.assert_close(loss(EXAMPLE), torch.tensor(expected))


@pytest.mark.parametrize(("loss", "_", "at_reference"), LOSSES)
def test_closed_form_where_policy_is_reference(
    loss: PreferenceLoss, _: list[float], at_reference: float | None
) -> None:
    if at_reference is None:
        assert not loss.needs_reference
        return
    torch.testing.assert_close(loss(EXAMPLE.at_reference()), torch.full((2,), at_reference))


@pytest.mark.parametrize(("loss", "_", "__"), LOSSES)
def test_swapping_chosen_and_rejected_flips_the_preference(loss: PreferenceLoss, _: list[float], __: float) -> None:
    """All but what the method itself shifts the preference by."""
    swapped = EXAMPLE._replace(
        chosen_logps=EXAMPLE.rejected_logps,
        rejected_logps=EXAMPLE.chosen_logps,
        ref_chosen_logps=EXAMPLE.ref_rejected_logps,
        ref_rejected_logps=EXAMPLE.ref_chosen_logps,
        chosen_num_tokens=EXAMPLE.rejected_num_tokens,
        rejected_num_tokens=EXAMPLE.chosen_num_tokens,
    )
    chosen, rejected = loss.rewards(EXAMPLE)
    torch.testing.assert_close(loss(swapped), loss.penalty(loss.clip(rejected - chosen) + loss.shift(swapped)))


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
    with pytest.raises(InputError, match=rf"loss\.beta must be a finite number above 0, not {beta}\.$"):
        DPOLoss(beta=beta)


def test_ipo_says_which_logratio() -> None:
    with pytest.raises(InputError, match="'sum' or 'mean'"):
        IPOLoss("token")  # type: ignore[arg-type]


def test_the_likelihood_term_is_of_the_chosen_response_alone() -> None:
    torch.testing.assert_close(RPOLoss(0.5, 0.2).auxiliary(EXAMPLE), 0.5 * 0.2 * torch.tensor([9.0, 14.0]))
    torch.testing.assert_close(IRPOLoss(0.5, 2.0).auxiliary(EXAMPLE), 2 * torch.tensor([9.0 / 4, 14.0 / 4]))
    assert not DPOLoss(0.5).auxiliary(EXAMPLE).any()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(0.5), [softplus(0.5), softplus(4.5)]),  # beta h = 1, -3, to exceed 1.5
        (IPOLoss("sum", 0.5), [4.0, 100.0]),  # h = 2, -6, to be 1 + 1.5 / 0.5
        (SLiCLoss(0.5), [1.5, 5.5]),
        (SimPOLoss(2.0, 0.25), [softplus(-6.5), softplus(-1.0)]),
    ],
)
def test_a_margin_of_the_data_is_what_the_preference_must_exceed(loss: PreferenceLoss, expected: list[float]) -> None:
    asked = EXAMPLE._replace(margins=torch.full((2,), 1.5))
    torch.testing.assert_close(loss(asked), torch.tensor(expected))


def test_the_noisy_label_losses_have_the_clean_losss_expectation() -> None:
    """Robust DPO averaged over flips with probability e is DPO on the clean label; cDPO is not."""
    clean, flipped = (
        EXAMPLE,
        EXAMPLE._replace(
            chosen_logps=EXAMPLE.rejected_logps,
            rejected_logps=EXAMPLE.chosen_logps,
            ref_chosen_logps=EXAMPLE.ref_rejected_logps,
            ref_rejected_logps=EXAMPLE.ref_chosen_logps,
        ),
    )
    robust = RobustDPOLoss(0.5, 0.2)
    torch.testing.assert_close(0.8 * robust(clean) + 0.2 * robust(flipped), DPOLoss(0.5)(clean))
    torch.testing.assert_close(CDPOLoss(0.5, 0.0)(clean), DPOLoss(0.5)(clean))


def test_chi_po_without_a_chi_squared_part_is_dpo_and_far_out_it_is_finite() -> None:
    small = ChiPOLoss(beta=0.5, alpha=1e-8)
    torch.testing.assert_close(small(EXAMPLE), DPOLoss(0.5)(EXAMPLE))
    far = pair_logps(torch.tensor([2000.0], requires_grad=True), torch.tensor([1000.0]))
    loss = ChiPOLoss(beta=0.1, reward_bound=1.0)(far)
    loss.backward()
    assert torch.isfinite(loss).all()
    assert far.chosen_logps.grad is not None
    assert torch.isfinite(far.chosen_logps.grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CDPOLoss(0.1, 0.5),
            r"loss\.label_smoothing must be a finite number at least 0 and below 0\.5, not 0\.5",
        ),
        (lambda: RobustDPOLoss(0.1, -0.1), r"loss\.label_smoothing must be a finite number"),
        (lambda: RPOLoss(0.1, -1.0), r"loss\.eta must be a finite number at least 0, not -1\.0\.$"),
        (lambda: RPOLoss(0.1, math.inf), r"loss\.eta must be a finite number"),
        (lambda: IRPOLoss(0.1, -1.0), r"loss\.alpha must be a finite number at least 0"),
        (lambda: IRPOLoss(0.1, math.nan), r"loss\.alpha must be a finite number at least 0"),
        (lambda: ChiPOLoss(0.1, alpha=0.0), r"loss\.alpha must be a finite number above 0"),
        (lambda: ChiPOLoss(0.1, gamma=-1.0), r"loss\.gamma must be a finite number at least 0"),
        (lambda: ChiPOLoss(0.1, reward_bound=0.0), r"loss\.reward_bound must be a number above 0"),
        (lambda: LengthRegularizedDPOLoss(0.1, -1.0), r"loss\.alpha must be a finite number at least 0"),
        (lambda: SimPOLoss(2.0, -0.1), r"loss\.gamma_beta_ratio must be a finite number at least 0"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], PreferenceLoss], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [
        (DPOLoss(), {"beta": 0.1}),
        (IPOLoss("sum"), {"beta": 0.1, "logratio": "sum"}),
        (SLiCLoss(), {"beta": 0.1}),
        (CDPOLoss(), {"beta": 0.1, "label_smoothing": 0.1}),
        (RobustDPOLoss(), {"beta": 0.1, "label_smoothing": 0.1}),
        (RPOLoss(), {"beta": 0.1, "eta": 0.005}),
        (IRPOLoss(), {"beta": 0.1, "alpha": 1.0}),
        (ChiPOLoss(), {"beta": 0.1, "alpha": 1.0, "gamma": 1.0, "reward_bound": math.inf}),
        (LengthRegularizedDPOLoss(), {"beta": 0.1, "alpha": 0.01}),
        (SimPOLoss(), {"beta": 2.0, "gamma_beta_ratio": 0.25}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_defaults_are_those_that_are_documented(loss: PreferenceLoss, numbers: dict[str, object]) -> None:
    assert vars(loss) == numbers
    assert loss.needs_reference == (not isinstance(loss, SimPOLoss))


def test_bounds_that_are_allowed_themselves() -> None:
    """Where nothing is left of a method but DPO."""
    for loss in (CDPOLoss(0.5, 0.0), RobustDPOLoss(0.5, 0.0), RPOLoss(0.5, 0.0), IRPOLoss(0.5, 0.0)):
        torch.testing.assert_close(loss(EXAMPLE) + loss.auxiliary(EXAMPLE), DPOLoss(0.5)(EXAMPLE))
    torch.testing.assert_close(LengthRegularizedDPOLoss(0.5, 0.0)(EXAMPLE), DPOLoss(0.5)(EXAMPLE))
    assert ChiPOLoss(0.5, gamma=0.0).gamma == SimPOLoss(2.0, 0.0).gamma_beta_ratio == 0
