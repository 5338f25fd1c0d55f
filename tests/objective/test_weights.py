"""Importance weights against algebra, against theory on enumerable distributions, and at their limits."""

import itertools
import math

import pytest
import torch

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import DPOLoss
from lit_isdpo.objective.metrics import effective_sample_size
from lit_isdpo.objective.remedies import TemperedImportanceWeighting
from lit_isdpo.objective.weights import (
    BatchMeanImportanceWeighting,
    ImportanceWeighting,
    PairWeighting,
    ProductWeighting,
    ShuffledImportanceWeighting,
    UniformWeighting,
    WPOWeighting,
)
from lit_isdpo.types import InputError
from tests.conftest import pair_logps

CHOSEN = torch.tensor([0.5, 1.5, -3.0, 3.0])
REJECTED = torch.tensor([1.0, 2.0, -1.0, -2.0])
WEIGHTINGS = [
    UniformWeighting(),
    ImportanceWeighting(),
    ShuffledImportanceWeighting(),
    BatchMeanImportanceWeighting(),
    WPOWeighting(),
    TemperedImportanceWeighting(),
]
PAIRS = pair_logps(CHOSEN, REJECTED)  # log-probs of mu are 0, so these are the log-ratios


def test_joint_cap() -> None:
    out = ImportanceWeighting(epsilon=1.0)(PAIRS)
    torch.testing.assert_close(out.weights, torch.tensor([1.5, 2.0, -4.0, 1.0]).exp())
    assert out.clipped.tolist() == [0, 1, 0, 0]


def test_cap_for_each_response() -> None:
    out = ImportanceWeighting(epsilon=1.0, cap="response")(PAIRS)
    torch.testing.assert_close(out.weights, torch.tensor([1.5, 2.0, -4.0, -1.0]).exp())
    assert out.clipped.tolist() == [0, 1, 0, 0.5]


def test_floor() -> None:
    out = ImportanceWeighting(epsilon=1.0, floor=0.25)(PAIRS)
    torch.testing.assert_close(out.weights, torch.tensor([math.exp(1.5), math.exp(2), 0.25, math.e]))


def test_epsilon_zero_only_weighs_down_and_infinity_does_not_clip() -> None:
    assert ImportanceWeighting(epsilon=0.0)(PAIRS).weights.max() == 1
    unclipped = ImportanceWeighting(epsilon=math.inf)(PAIRS)
    torch.testing.assert_close(unclipped.log_weights, CHOSEN + REJECTED)
    assert not unclipped.clipped.any()


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0, 2.0])
def test_clipping_across_thresholds_on_synthetic_ratios(epsilon: float) -> None:
    """Joint log-ratios ~ N(0, 2): the clipped share is the Gaussian tail, and no weight passes exp(2 epsilon)."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 100_000, generator=generator)
    out = ImportanceWeighting(epsilon=epsilon)(pair_logps(chosen, rejected))
    tail = 0.5 * math.erfc(2 * epsilon / math.sqrt(2) / math.sqrt(2))
    assert out.clipped.mean().item() == pytest.approx(tail, abs=3 * math.sqrt(tail / 100_000))
    assert out.weights.max().item() <= math.exp(2 * epsilon) * (1 + 1e-6)


def test_a_wide_clip_trades_bias_for_variance() -> None:
    """The clip biases E[w] below 1 and shrinks the variance, each monotonically in epsilon."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(2, 200_000, generator=generator) * 0.7 - 0.245  # E exp = 1 for each
    means, variances = [], []
    for epsilon in (0.0, 0.25, 1.0, math.inf):
        weights = ImportanceWeighting(epsilon=epsilon)(pair_logps(*log_ratio)).weights
        means.append(weights.mean().item())
        variances.append(weights.var().item())
    assert means == sorted(means)
    assert variances == sorted(variances)
    assert means[-1] == pytest.approx(1, abs=0.02)


def test_the_ratio_against_theory_on_an_enumerable_distribution() -> None:
    """All 27 responses of 3 tokens over 3 symbols, under two policies: E_ref[w f] = E_pi[f], E[w] = 1."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).log_softmax(
        dim=-1
    )  # policy, last token, next

    def logp(policy: int, response: tuple[int, ...]) -> torch.Tensor:
        return torch.stack(
            [table[policy, last, token] for last, token in zip((3, *response), response, strict=False)]
        ).sum()

    responses = list(itertools.product(range(3), repeat=3))
    pi, ref = (torch.stack([logp(policy, response) for response in responses]) for policy in (0, 1))
    index = torch.cartesian_prod(torch.arange(27), torch.arange(27))  # every pair, drawn independently from ref
    probability = (ref[index[:, 0]] + ref[index[:, 1]]).exp()
    weights = ImportanceWeighting(epsilon=math.inf)(pair_logps(*(pi - ref)[index].T)).weights.double()
    assert (probability * weights).sum().item() == pytest.approx(1, abs=1e-6)
    f = torch.randn(27 * 27, generator=generator, dtype=torch.float64)
    under_pi = ((pi[index[:, 0]] + pi[index[:, 1]]).exp() * f).sum().item()
    assert (probability * weights * f).sum().item() == pytest.approx(under_pi, abs=1e-6)
    clipped = ImportanceWeighting(epsilon=0.25)(pair_logps(*(pi - ref)[index].T)).weights.double()
    assert (probability * clipped).sum().item() < 1


def test_policy_is_reference() -> None:
    zeros = torch.zeros(7)
    for weighting in (ImportanceWeighting(), UniformWeighting(), ImportanceWeighting(cap="response")):
        out = weighting(pair_logps(zeros, zeros))
        assert torch.equal(out.weights, torch.ones(7))
        assert effective_sample_size(out.log_weights).item() == pytest.approx(7)


def test_weights_of_one_are_dpo_bit_for_bit() -> None:
    chosen, rejected = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    pairs = pair_logps(chosen, rejected)
    loss = DPOLoss(beta=0.1)(pairs)
    assert torch.equal(UniformWeighting()(pairs).weights * loss, loss)


@pytest.mark.parametrize("weighting", [UniformWeighting(), ImportanceWeighting(), BatchMeanImportanceWeighting()])
def test_no_gradient_and_fp32(weighting: UniformWeighting | ImportanceWeighting) -> None:
    pairs = PAIRS._replace(chosen_logps=CHOSEN.clone().requires_grad_())
    weights = weighting(pairs).weights
    assert not weights.requires_grad
    assert weights.dtype == torch.float32


def test_ratios_are_taken_to_fp32_before_they_are_summed() -> None:
    """257 is no bfloat16 number."""
    pairs = PairLogps(*(field.bfloat16() for field in pair_logps(torch.tensor([256.0]), torch.tensor([1.0]))))
    assert ImportanceWeighting(math.inf)(pairs).log_weights.tolist() == [257]
    assert ImportanceWeighting(math.inf)(pairs).log_weights.dtype == torch.float32


def test_extremes_stay_finite() -> None:
    out = ImportanceWeighting(epsilon=1.0)(pair_logps(*torch.tensor([[1e4, -1e4]] * 2)))
    assert torch.isfinite(out.weights).all()
    assert out.weights[1] == 0


def test_shuffled_weights_are_the_same_ones_elsewhere() -> None:
    own = ImportanceWeighting()(PAIRS).log_weights
    shuffled = ShuffledImportanceWeighting()(PAIRS).log_weights
    torch.testing.assert_close(shuffled.sort().values, own.sort().values)
    assert not (shuffled == own).any()


def test_batch_mean() -> None:
    own = ImportanceWeighting()(PAIRS).weights
    torch.testing.assert_close(BatchMeanImportanceWeighting()(PAIRS).weights, own.mean().expand(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": float("nan")}, "epsilon must be a number of nats"),
        ({"epsilon": -math.inf}, "epsilon must be a number of nats"),
        ({"epsilon": 2e38}, "epsilon"),  # the cap is at twice that
        ({"cap": "token"}, "'joint' or 'response'"),
        ({"floor": -1.0}, "floor must lie between"),
        ({"epsilon": 0.0, "floor": 1.5}, "floor must lie between"),
        ({"epsilon": 0.5, "floor": 2.8}, "floor must lie between"),  # e is 2.718...
    ],
)
def test_out_of_range_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImportanceWeighting(**arguments)  # type: ignore[arg-type]


def test_the_largest_cap_is_what_float32_holds() -> None:
    assert ImportanceWeighting(epsilon=1.5e38).epsilon == 1.5e38


def test_mu_is_what_the_ratio_is_taken_against() -> None:
    """The reference plays no part where mu is another."""
    pairs = pair_logps(CHOSEN, REJECTED, ref=(7.0, 7.0), mu=(0.5, -0.25))
    torch.testing.assert_close(ImportanceWeighting(math.inf)(pairs).log_weights, CHOSEN + REJECTED - 0.25)


def test_wpo_caps_the_product_at_one() -> None:
    pairs = pair_logps(torch.zeros(1), torch.zeros(1), alignment=(0.5, -0.75))
    assert WPOWeighting()(pairs).log_weights.tolist() == [-0.25]
    assert WPOWeighting()(pairs).clipped.tolist() == [0]
    above = pair_logps(torch.zeros(1), torch.zeros(1), alignment=(0.5, -0.25))
    assert WPOWeighting()(above).weights.tolist() == [1]
    assert WPOWeighting()(above).clipped.tolist() == [1]


def test_a_product_multiplies_and_asks_for_what_its_factors_need() -> None:
    product = ProductWeighting([ImportanceWeighting(epsilon=1.0), WPOWeighting()])
    assert (product.needs_mu, product.needs_alignment, product.min_pairs) == (True, True, 1)
    pairs = pair_logps(CHOSEN, REJECTED, alignment=(-0.5, -0.25))
    torch.testing.assert_close(product(pairs).weights, torch.tensor([0.75, 1.25, -4.75, 0.25]).exp())
    assert product(pairs).clipped.tolist() == [0, 1, 0, 0]
    nested = ProductWeighting([product, WPOWeighting()])
    assert [type(factor) for factor in nested.factors] == [ImportanceWeighting, WPOWeighting, WPOWeighting]
    torch.testing.assert_close(nested(pairs).log_weights, product(pairs).log_weights - 0.75)
    with pytest.raises(InputError, match="at least two weightings, not 1"):
        ProductWeighting([WPOWeighting()])


def test_what_weightings_ask_for() -> None:
    def asked(weighting: PairWeighting) -> tuple[int, bool, bool]:
        return weighting.min_pairs, weighting.needs_mu, weighting.needs_alignment

    importance, wpo, shuffled = ImportanceWeighting(), WPOWeighting(), ShuffledImportanceWeighting()
    assert shuffled.mixes_pairs
    assert BatchMeanImportanceWeighting().mixes_pairs
    assert ProductWeighting([wpo, ProductWeighting([shuffled, wpo])]).mixes_pairs
    assert not any(one.mixes_pairs for one in (importance, wpo, ProductWeighting([wpo, importance])))
    assert vars(importance) == {"epsilon": 1.0, "cap": "joint", "floor": 0.0}
    assert asked(UniformWeighting()) == (1, False, False)
    assert asked(importance) == (1, True, False)
    assert asked(shuffled) == asked(BatchMeanImportanceWeighting()) == (2, True, False)
    assert asked(wpo) == (1, False, True)
    assert asked(ProductWeighting([wpo, shuffled])) == (2, True, True)
    assert asked(ProductWeighting([importance, UniformWeighting()])) == (1, True, False)
    assert asked(ProductWeighting([wpo, UniformWeighting()])) == (1, False, True)


def test_the_floors_bounds_are_allowed_themselves() -> None:
    """At its upper bound every pair weighs ``exp(2 epsilon)``; to fp32, in which the bound is computed."""
    assert ImportanceWeighting(0.5, floor=0.0).floor == 0
    highest = torch.tensor(1.0).exp().item()
    weights = ImportanceWeighting(0.5, floor=highest)(PAIRS).weights
    torch.testing.assert_close(weights, torch.full((4,), math.e))


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, ProductWeighting([UniformWeighting(), ImportanceWeighting()])])
def test_a_weighting_that_says_so_mixes_pairs_and_no_other(weighting: PairWeighting) -> None:
    """A weight does not depend on the other pairs, or the weighting has the data keep micro-batches random."""
    pairs = pair_logps(CHOSEN, REJECTED, alignment=(-0.5, -0.25))
    one_by_one = [
        weighting(PairLogps(*(field[row : row + 1] for field in pairs))).log_weights for row in range(len(CHOSEN))
    ]
    assert torch.equal(torch.cat(one_by_one), weighting(pairs).log_weights) is not weighting.mixes_pairs
