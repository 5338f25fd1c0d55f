"""Remedies for weights that vanish: values by hand, and what each one's reason says of its gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import DPOLoss, RPOLoss
from lit_isdpo.objective.remedies import (
    CommonModeDPOLoss,
    ForwardKLDPOLoss,
    OneSidedDPOLoss,
    ReturningDPOLoss,
    TemperedImportanceWeighting,
)
from lit_isdpo.objective.weights import ImportanceWeighting
from lit_isdpo.types import InputError
from tests.conftest import pair_logps

CHOSEN = torch.tensor([-9.0, -14.0, -11.0])
REJECTED = torch.tensor([-13.0, -10.0, -12.5])
EXAMPLE = pair_logps(CHOSEN, REJECTED, ref=(-10.0, -12.0), mu=(-11.0, -11.5))
"""Log-ratios to the reference: s_w = 1, -4, -1 and s_l = -1, 2, -1/2; to mu: b_w = 2, -3, 0 and b_l = -3/2, 3/2, -1."""


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def in_float64(*, ref: tuple[float, float] = (-10.0, -12.0), mu: tuple[float, float] = (-11.0, -11.5)) -> PairLogps:
    """The example's log-probs as leaves."""
    return pair_logps(CHOSEN.double().requires_grad_(), REJECTED.double().requires_grad_(), ref=ref, mu=mu)


def slopes(loss: DPOLoss, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Gradients of each pair's whole loss by its chosen and its rejected log-prob."""
    total = (loss(pairs) + loss.auxiliary(pairs)).sum()
    chosen, rejected = torch.autograd.grad(total, (pairs.chosen_logps, pairs.rejected_logps))
    return chosen, rejected


LOSSES = [
    (OneSidedDPOLoss(0.5), [0.0, 0.0, 0.0]),
    # joint log-ratios to mu: 1/2, -3/2, -1; the first weighs more than 1, which wakes nothing
    (ReturningDPOLoss(0.5, 0.2), [0.0, 1.4 * (1 - math.exp(-1.5)), 1.1 * (1 - math.exp(-1))]),
    (ForwardKLDPOLoss(0.5, 0.2), [0.1 * 11, 0.1 * 12, 0.1 * 11.75]),
    # sums of the log-ratios: 0, -2, -3/2
    (CommonModeDPOLoss(0.5, 0.2), [0.0, 0.1 * 4 / 8, 0.1 * 2.25 / 8]),
]


@pytest.mark.parametrize(("loss", "auxiliary"), LOSSES)
def test_worked_algebra(loss: DPOLoss, auxiliary: list[float]) -> None:
    """Beside the logistic loss of h = 2, -6, -1/2."""
    torch.testing.assert_close(loss(EXAMPLE), torch.tensor([softplus(-1), softplus(3), softplus(0.25)]))
    torch.testing.assert_close(loss.auxiliary(EXAMPLE), torch.tensor(auxiliary))


@pytest.mark.parametrize(
    "loss", [OneSidedDPOLoss(0.5), ReturningDPOLoss(0.5, 0.0), ForwardKLDPOLoss(0.5, 0.0), CommonModeDPOLoss(0.5, 0.0)]
)
def test_without_its_remedy_each_is_dpo(loss: DPOLoss) -> None:
    """Where mu is the policy, the one-sided loss has none."""
    pairs = in_float64()
    as_mu = pairs._replace(mu_rejected_logps=pairs.rejected_logps.detach())
    assert torch.equal(loss(as_mu) + loss.auxiliary(as_mu), DPOLoss(0.5)(as_mu))
    torch.testing.assert_close(slopes(loss, as_mu), slopes(DPOLoss(0.5), as_mu), rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 5.0, -0.5])
def test_the_one_sided_push_alone_is_weighed_and_capped(epsilon: float) -> None:
    """Log-ratios of the rejected responses to mu are -3/2, 3/2 and -1."""
    pairs = in_float64()
    chosen, rejected = slopes(OneSidedDPOLoss(0.5, epsilon), pairs)
    of_dpo = slopes(DPOLoss(0.5), pairs)
    weights = torch.tensor([min(ratio, epsilon) for ratio in (-1.5, 1.5, -1.0)], dtype=torch.float64).exp()
    torch.testing.assert_close(chosen, of_dpo[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(rejected, weights * of_dpo[1], rtol=1e-12, atol=0)
    assert (chosen < 0).all()
    assert (rejected > 0).all()


def test_the_one_sided_weight_is_taken_to_mu_and_not_to_the_reference() -> None:
    """Both references give the same h; the weight does not move with them, and moves with mu."""
    ratios = []
    for ref, mu in (((-10.0, -12.0), (-11.0, -11.5)), ((-20.0, -22.0), (-11.0, -11.5)), ((-10.0, -12.0), (-9.0, -9.5))):
        pairs = in_float64(ref=ref, mu=mu)
        ratios.append((slopes(OneSidedDPOLoss(0.5), pairs)[1] / slopes(DPOLoss(0.5), pairs)[1]).log())
    torch.testing.assert_close(ratios[0], torch.tensor([-1.5, 0.0, -1.0]).double())
    torch.testing.assert_close(ratios[1], ratios[0])
    torch.testing.assert_close(ratios[2], torch.tensor([-3.5, -0.5, -3.0]).double())


def test_the_returning_term_sleeps_where_mu_is_the_policy_and_is_rpos_where_the_weight_is_gone() -> None:
    loss, rpo = ReturningDPOLoss(0.5, 0.2), RPOLoss(0.5, 0.2)
    asleep = in_float64()
    asleep = asleep._replace(
        mu_chosen_logps=asleep.chosen_logps.detach(), mu_rejected_logps=asleep.rejected_logps.detach()
    )
    assert not loss.auxiliary(asleep).any()
    torch.testing.assert_close(slopes(loss, asleep), slopes(DPOLoss(0.5), asleep), rtol=1e-12, atol=0)
    gone = in_float64(mu=(1000.0, 1000.0))
    assert torch.equal(loss.auxiliary(gone), rpo.auxiliary(gone))
    torch.testing.assert_close(slopes(loss, gone), slopes(rpo, gone), rtol=1e-12, atol=0)


def test_the_returning_weight_has_no_gradient() -> None:
    """Else the term would be lowered by leaving the rejected response too."""
    pairs = in_float64()
    chosen, rejected = torch.autograd.grad(
        ReturningDPOLoss(0.5, 0.2).auxiliary(pairs).sum(), (pairs.chosen_logps, pairs.rejected_logps), allow_unused=True
    )
    weights = torch.tensor([1.0, math.exp(-1.5), math.exp(-1.0)], dtype=torch.float64)
    torch.testing.assert_close(chosen, -0.1 * (1 - weights), rtol=1e-12, atol=1e-15)
    assert rejected is None


def test_the_forward_term_is_the_kl_from_mu_and_its_entropy() -> None:
    """Over all pairs of five responses, drawn independently from mu."""
    generator = torch.Generator().manual_seed(0)
    pi, mu = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    probabilities = (mu[first] + mu[second]).exp()
    expected = probabilities @ ForwardKLDPOLoss(0.5, 0.2).auxiliary(pair_logps(pi[first], pi[second]))
    kl, entropy = mu.exp() @ (mu - pi), -(mu.exp() @ mu)
    torch.testing.assert_close(expected, 0.5 * 0.2 * (kl + entropy), rtol=1e-12, atol=0)
    assert kl > 0.1


def test_the_common_mode_is_nothing_at_the_reference() -> None:
    pairs = in_float64()
    at_reference = pairs._replace(
        ref_chosen_logps=pairs.chosen_logps.detach(), ref_rejected_logps=pairs.rejected_logps.detach()
    )
    term = CommonModeDPOLoss(0.5, 0.2).auxiliary(at_reference)
    assert not term.any()
    for gradient in torch.autograd.grad(term.sum(), (pairs.chosen_logps, pairs.rejected_logps)):
        assert not gradient.any()


def test_the_common_mode_completes_the_square() -> None:
    """At a strength of ``beta`` it is to the sum what DPO's second order, ``beta^2 h^2 / 8``, is to h."""
    pairs = in_float64()
    s_w, s_l = pairs.chosen_logratios, pairs.rejected_logratios
    beta = 0.01
    of_sum = CommonModeDPOLoss(beta, beta).auxiliary(pairs)
    of_difference = DPOLoss(beta)(pairs) - math.log(2) + beta * (s_w - s_l) / 2  # but for 4th order
    torch.testing.assert_close(of_difference, beta**2 * (s_w - s_l).square() / 8, rtol=1e-3, atol=0)
    completed = beta**2 * (s_w.square() + s_l.square()) / 4
    torch.testing.assert_close(of_sum + of_difference, completed, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [ForwardKLDPOLoss(0.5, 0.2), CommonModeDPOLoss(0.5, 0.2)])
def test_gradients(loss: DPOLoss) -> None:
    """Of those whose gradient is that of their value."""
    pairs = in_float64()

    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        given = pairs._replace(chosen_logps=chosen, rejected_logps=rejected)
        return loss(given) + loss.auxiliary(given)

    assert torch.autograd.gradcheck(of, (pairs.chosen_logps, pairs.rejected_logps))


def test_power_one_is_the_importance_weight_bit_for_bit() -> None:
    chosen, rejected = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    pairs = pair_logps(chosen, rejected)
    for ours, own in zip(TemperedImportanceWeighting(0.5, 1.0)(pairs), ImportanceWeighting(0.5)(pairs), strict=True):
        assert torch.equal(ours, own)


def test_power_zero_weighs_alike_and_a_half_is_the_root_of_the_capped_weight() -> None:
    """Joint log-ratios to mu: 1/2, -3/2, -1; the cap is at 1/4, and would be at 1/8 if it came last."""
    assert TemperedImportanceWeighting(0.125, 0.0)(EXAMPLE).weights.tolist() == [1, 1, 1]
    half, own = TemperedImportanceWeighting(0.125, 0.5)(EXAMPLE), ImportanceWeighting(0.125)(EXAMPLE)
    torch.testing.assert_close(half.log_weights, torch.tensor([0.125, -0.75, -0.5]))
    torch.testing.assert_close(half.weights, own.weights.sqrt())
    assert half.clipped.tolist() == own.clipped.tolist() == [1, 0, 0]


def test_tempered_weights_have_no_gradient() -> None:
    weights = TemperedImportanceWeighting()(EXAMPLE._replace(chosen_logps=CHOSEN.clone().requires_grad_())).weights
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("made", "numbers"),
    [
        (OneSidedDPOLoss(), {"beta": 0.1, "epsilon": 0.0}),
        (ReturningDPOLoss(), {"beta": 0.1, "eta": 0.15}),
        (ForwardKLDPOLoss(), {"beta": 0.1, "eta": 0.15}),
        (CommonModeDPOLoss(), {"beta": 0.1, "strength": 0.1}),
        (TemperedImportanceWeighting(), {"epsilon": 1.0, "cap": "joint", "floor": 0.0, "power": 0.5}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_defaults_are_those_that_are_documented(made: object, numbers: dict[str, object]) -> None:
    assert vars(made) == numbers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneSidedDPOLoss(0.0), r"^model\.loss\.beta must be a finite number above 0, not 0\.0\.$"),
        (lambda: OneSidedDPOLoss(0.1, math.nan), r"^model\.loss\.epsilon must be a finite number, not nan\.$"),
        (lambda: OneSidedDPOLoss(0.1, math.inf), r"^model\.loss\.epsilon must be a finite number, not inf\.$"),
        (lambda: ReturningDPOLoss(0.1, -1.0), r"^model\.loss\.eta must be a finite number at least 0, not -1\.0\.$"),
        (lambda: ReturningDPOLoss(0.1, math.inf), r"^model\.loss\.eta must be a finite number at least 0, not inf\.$"),
        (lambda: ForwardKLDPOLoss(0.1, -1.0), r"^model\.loss\.eta must be a finite number at least 0, not -1\.0\.$"),
        (lambda: ForwardKLDPOLoss(0.1, math.nan), r"^model\.loss\.eta must be a finite number at least 0, not nan\.$"),
        (lambda: CommonModeDPOLoss(0.1, -1.0), r"^model\.loss\.strength must be a finite number at least 0, not -1\.0"),
        (lambda: CommonModeDPOLoss(0.1, math.inf), r"^model\.loss\.strength must be a finite number at least 0"),
        (lambda: TemperedImportanceWeighting(math.nan), r"^model\.weighting\.epsilon must be a number of nats"),
        (
            lambda: TemperedImportanceWeighting(1.0, -0.1),
            r"^model\.weighting\.power must lie between 0 and 1, not -0\.1",
        ),
        (lambda: TemperedImportanceWeighting(1.0, 1.1), r"^model\.weighting\.power must lie between 0 and 1, not 1\.1"),
        (lambda: TemperedImportanceWeighting(1.0, math.nan), r"^model\.weighting\.power must lie between 0 and 1"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_one_loss_alone_weighs_responses_itself() -> None:
    """So it is the one that a weighting must not be laid over."""
    others = [DPOLoss(), ReturningDPOLoss(), ForwardKLDPOLoss(), CommonModeDPOLoss()]
    assert [loss.is_weighed for loss in (OneSidedDPOLoss(), *others)] == [True, *[False] * len(others)]
