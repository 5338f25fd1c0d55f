"""The objective against ``numpy_formulas``: values and gradients, in float64 to 1e-12 and in fp32 to 1e-5.

The pairs are drawn on a grid of 1/1024 nat, so that differences and sums of log-probs are exact in fp32 too and what is
compared is the formula. Among them are log-ratios of 500 nats on either side, ties, weights on the cap, just below it
and just above, and responses of one token and of 4,096.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import Head, PairLogps, sequence_logps
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
    bradley_terry_losses,
)
from lit_isdpo.objective.metrics import (
    PairMetrics,
    RowMetrics,
    effective_sample_size,
    kl_values,
    pair_columns,
    score_columns,
    token_kl,
)
from lit_isdpo.objective.weights import (
    BatchMeanImportanceWeighting,
    ImportanceWeighting,
    PairWeighting,
    ProductWeighting,
    ShuffledImportanceWeighting,
    UniformWeighting,
    WPOWeighting,
)
from lit_isdpo.types import SequenceLogps, TokenBatch
from tests.objective import numpy_formulas as formulas
from tests.objective.numpy_formulas import Array, Loss, Pairs

GRID = 2**-10  # nats
EDGES = np.array(
    [  # log-ratios to the reference, to mu
        [0, 0, 0, 0],  # the start of every run
        [3, 3, 1, 1],  # a tie; on the joint cap of epsilon 1, and on both of a response
        [3, 3, 1, 1 + GRID],  # just above
        [3, 3, 1, 1 - GRID],  # just below
        [1, -1, 4, -3],  # one response above its cap, the pair below its own
        [3, -1, 4, -2],  # a hinge at beta 0.25 that is won just now, on the joint cap again
        [500, 500, 500, 500],
        [-500, -500, -500, -500],
        [500, -500, 500, -500],
        [-500, 500, -500, 500],
        [0, 25, -500, 3],  # beyond the bound of chi-PO's exponent
        [25, 0, 3, -500],
    ]
)


def draw(number: int = 64) -> Pairs:
    """The edges, and random pairs behind them."""
    rng = np.random.default_rng(0)

    def on_grid(values: Array) -> Array:
        return np.round(values / GRID) * GRID

    ratios = np.concatenate([EDGES, on_grid(rng.normal([0.5, -0.5, 0.2, 0], 2, (number - len(EDGES), 4)))])
    logps = on_grid(rng.uniform(-300, -1, (number, 2)))
    lengths = rng.choice([1, 2, 7, 60, 4096], (number, 2)).astype(float)
    margins = np.where(np.arange(number) % 4 == 3, on_grid(rng.uniform(-1, 1, number)), 0)
    alignment = on_grid(rng.normal(0, 1, (number, 2)))
    alignment[:2] = [[0.5, -0.5], [0.25, 0.25]]  # on WPO's cap and above it
    return Pairs(*logps.T, *(logps - ratios[:, :2]).T, *(logps - ratios[:, 2:]).T, *lengths.T, margins, *alignment.T)


PAIRS = draw()
DTYPES = [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]


def tensors(pairs: Pairs, dtype: torch.dtype) -> PairLogps:
    """With leaves of a graph for the policy's log-probs."""
    fields = [torch.tensor(field, dtype=dtype) for field in pairs]
    fields[0].requires_grad_()
    fields[1].requires_grad_()
    lengths = [torch.tensor(field, dtype=torch.int64) for field in (pairs.chosen_num_tokens, pairs.rejected_num_tokens)]
    return PairLogps(*fields)._replace(chosen_num_tokens=lengths[0], rejected_num_tokens=lengths[1])


def assert_equal(actual: Tensor, expected: Array | float, tolerance: float) -> None:
    # Relative to the value, and beside cancellation to the largest terms that a value is the sum of.
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


def nothing(p: Pairs) -> Loss:
    return Loss(*np.zeros((3, len(p.h))))


LOSSES: dict[str, tuple[PreferenceLoss, Callable[[Pairs], Loss], Callable[[Pairs], Loss]]] = {
    # the loss, the preference's part of it, the auxiliary part
    "dpo": (DPOLoss(0.1), partial(formulas.dpo, beta=0.1), nothing),
    "ipo": (IPOLoss("sum", 0.1), partial(formulas.ipo, beta=0.1), nothing),
    "ipo_mean": (IPOLoss("mean", 0.1), partial(formulas.ipo_per_token, beta=0.1), nothing),
    "slic": (SLiCLoss(0.25), partial(formulas.slic, beta=0.25), nothing),
    "cdpo": (CDPOLoss(0.1, 0.2), partial(formulas.cdpo, beta=0.1, e=0.2), nothing),
    "robust_dpo": (RobustDPOLoss(0.1, 0.2), partial(formulas.robust_dpo, beta=0.1, e=0.2), nothing),
    "rpo": (RPOLoss(0.1, 0.3), partial(formulas.dpo, beta=0.1), partial(formulas.likelihood, factor=0.1 * 0.3)),
    "irpo": (IRPOLoss(0.1, 0.7), partial(formulas.dpo, beta=0.1), partial(formulas.mean_likelihood, alpha=0.7)),
    "chi_po": (
        ChiPOLoss(0.1),
        partial(formulas.chi_po, beta=0.1, alpha=1.0, gamma=1.0, bound=math.inf),
        nothing,
    ),
    "chi_po_bounded": (
        ChiPOLoss(0.1, alpha=1.25, gamma=0.1, reward_bound=0.5),
        partial(formulas.chi_po, beta=0.1, alpha=1.25, gamma=0.1, bound=0.5),
        nothing,
    ),
    "r_dpo": (LengthRegularizedDPOLoss(0.1, 0.01), partial(formulas.r_dpo, beta=0.1, alpha=0.01), nothing),
    "simpo": (SimPOLoss(2.0, 0.25), partial(formulas.simpo, beta=2.0, gamma=0.5), nothing),
}

WEIGHTINGS: dict[str, tuple[PairWeighting, Callable[[Pairs], tuple[Array, Array]]]] = {
    "uniform": (UniformWeighting(), lambda p: (np.ones_like(p.h), np.zeros_like(p.h))),
    "is": (ImportanceWeighting(1.0), partial(formulas.importance, epsilon=1.0)),
    "is_quarter": (ImportanceWeighting(0.25), partial(formulas.importance, epsilon=0.25)),
    "is_zero": (ImportanceWeighting(0.0), partial(formulas.importance, epsilon=0.0)),
    "is_below_zero": (ImportanceWeighting(-1.0), partial(formulas.importance, epsilon=-1.0)),
    "is_response": (ImportanceWeighting(1.0, cap="response"), partial(formulas.importance_by_response, epsilon=1.0)),
    "wpo": (WPOWeighting(), formulas.wpo),
}


def floored(p: Pairs) -> tuple[Array, Array]:
    weights, clipped = formulas.importance(p, 1.0)
    return np.maximum(weights, 0.25), clipped


def shuffled(p: Pairs) -> tuple[Array, Array]:
    weights, clipped = formulas.importance(p, 1.0)
    return weights[np.arange(len(weights)) - 1], clipped  # pair i has the weight of pair i - 1


def batch_mean(p: Pairs) -> tuple[Array, Array]:
    weights, clipped = formulas.importance(p, 1.0)
    return np.full_like(weights, weights.mean()), clipped


def is_wpo(p: Pairs) -> tuple[Array, Array]:
    (weights, clipped), (others, others_clipped) = formulas.importance(p, 1.0), formulas.wpo(p)
    return weights * others, np.maximum(clipped, others_clipped)


WEIGHTINGS |= {
    "floor": (ImportanceWeighting(1.0, floor=0.25), floored),
    "shuffled": (ShuffledImportanceWeighting(1.0), shuffled),
    "batch_mean": (BatchMeanImportanceWeighting(1.0), batch_mean),
    "product": (ProductWeighting([ImportanceWeighting(1.0), WPOWeighting()]), is_wpo),
}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    loss, formula, auxiliary = LOSSES[name]
    for compute, expected in ((loss, formula(PAIRS)), (loss.auxiliary, auxiliary(PAIRS))):
        pairs = tensors(PAIRS, dtype)
        values = compute(pairs)
        assert values.dtype == dtype
        assert_equal(values, expected.value, tolerance)
        if values.requires_grad:
            gradients = torch.autograd.grad(values.sum(), (pairs.chosen_logps, pairs.rejected_logps), allow_unused=True)
        else:
            gradients = (None, None)
        for gradient, by in zip(gradients, expected[1:], strict=True):
            assert_equal(torch.zeros(len(by)) if gradient is None else gradient, by, tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivatives_worked_out_by_hand_are_central_differences(name: str) -> None:
    """Between the kinks: of the edges and their neighbours nothing is asked here."""
    _, formula, auxiliary = LOSSES[name]
    pairs = Pairs(*(field[len(EDGES) :] for field in PAIRS))
    step = 1e-5
    for of in (formula, auxiliary):
        for field, by in (("chosen_logps", of(pairs).by_chosen), ("rejected_logps", of(pairs).by_rejected)):
            there, back = (pairs._replace(**{field: getattr(pairs, field) + sign * step}) for sign in (1, -1))
            differences = (of(there).value - of(back).value) / (2 * step)
            np.testing.assert_allclose(by, differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights(name: str) -> None:
    """The ratios are taken in fp32 whatever comes in, so only fp32 is asked for."""
    weighting, formula = WEIGHTINGS[name]
    weights, clipped = formula(PAIRS)
    out = weighting(tensors(PAIRS, torch.float32))
    assert not out.log_weights.requires_grad
    assert out.log_weights.dtype == out.clipped.dtype == torch.float32
    assert_equal(out.weights, weights, 1e-5)
    assert out.clipped.tolist() == clipped.tolist()
    positive = weights > 0
    assert_equal(out.log_weights[torch.tensor(positive)], np.log(weights[positive]), 1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_weighted_loss_and_its_gradient(loss: str, weighting: str) -> None:
    """``w f + auxiliary``: no gradient flows through w, and w does not touch the likelihood."""
    (compute, formula, auxiliary), (weigh, weights_formula) = LOSSES[loss], WEIGHTINGS[weighting]
    weights, _ = weights_formula(PAIRS)
    part, added = formula(PAIRS), auxiliary(PAIRS)
    pairs = tensors(PAIRS, torch.float64)
    values = weigh(pairs).weights.double() * compute(pairs) + compute.auxiliary(pairs)
    gradients = torch.autograd.grad(values.sum(), (pairs.chosen_logps, pairs.rejected_logps))
    assert_equal(values, weights * part.value + added.value, 1e-5)
    assert_equal(gradients[0], weights * part.by_chosen + added.by_chosen, 1e-5)
    assert_equal(gradients[1], weights * part.by_rejected + added.by_rejected, 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("window", [None, 40])
def test_what_is_logged(loss: str, window: int | None) -> None:
    """In three uneven parts, the last of which holds fillers; the formulas see the whole."""
    compute, formula, auxiliary = LOSSES[loss]
    metrics = PairMetrics(window)
    counted = np.arange(len(PAIRS.h)) < 59
    for rows in (slice(0, 30), slice(30, 31), slice(31, None)):
        pairs = tensors(Pairs(*(field[rows] for field in PAIRS)), torch.float32)
        weights = ImportanceWeighting(1.0)(pairs)
        columns = pair_columns(compute.weighted(pairs, weights.weights), compute.rewards(pairs), pairs, weights)
        metrics.update(columns, int(counted[rows].sum()))
    p = Pairs(*(field[counted] for field in PAIRS))
    weights, clipped = formulas.importance(p, 1.0)
    beta = compute.beta
    r_w, r_l = {
        "ipo_mean": (beta * p.s_w / p.chosen_num_tokens, beta * p.s_l / p.rejected_num_tokens),
        "simpo": (beta * p.chosen_logps / p.chosen_num_tokens, beta * p.rejected_logps / p.rejected_num_tokens),
        "chi_po": tuple(beta * (np.exp(np.minimum(s, 20)) + s) for s in (p.s_w, p.s_l)),
        "chi_po_bounded": tuple(beta * (np.exp(np.minimum(1.25 * s, 20)) + 0.1 * s) for s in (p.s_w, p.s_l)),
    }.get(loss, (beta * p.s_w, beta * p.s_l))
    expected = {
        "loss": (weights * formula(p).value + auxiliary(p).value).mean(),
        "rewards/chosen": r_w.mean(),
        "rewards/rejected": r_l.mean(),
        "rewards/accuracies": (r_w > r_l).mean() + (r_w == r_l).mean() / 2,
        "rewards/margins": (r_w - r_l).mean(),
        "logps/chosen": p.chosen_logps.mean(),
        "logps/rejected": p.rejected_logps.mean(),
        "logratios/chosen": p.s_w.mean(),
        "logratios/rejected": p.s_l.mean(),
        "logratios/chosen_fell": (p.s_w < 0).mean(),
        "logratios/importance": (p.b_w + p.b_l).mean(),
        "weights/mean": weights.mean(),
        "weights/clip_fraction": clipped.mean(),
        "weights/max": weights.max(),
        "weights/ess": formulas.effective_sample_size(weights[-(window or 59) :]) / (window or 59),
    }
    values = {key: value.item() for key, value in metrics.compute().items()}
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_effective_sample_size() -> None:
    """Of fp32 log-weights, beyond what fp32 has exponentials of."""
    for scale in (0, -600, 600):
        log_weights = (np.random.default_rng(1).normal(0, 2, 500) + scale).astype(np.float32)
        relative = np.exp(log_weights.astype(np.float64) - scale)
        ess = effective_sample_size(torch.tensor(log_weights))
        assert ess.dtype == torch.float32
        assert_equal(ess, formulas.effective_sample_size(relative), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_bradley_terry(dtype: torch.dtype, tolerance: float, centering: float) -> None:
    rewards = [torch.tensor(values, dtype=dtype, requires_grad=True) for values in (PAIRS.s_w, PAIRS.s_l)]
    losses = bradley_terry_losses(*rewards, torch.tensor(PAIRS.margins, dtype=dtype), centering=centering)
    expected = formulas.bradley_terry(PAIRS.s_w, PAIRS.s_l, PAIRS.margins, centering)
    assert_equal(losses, expected.value, tolerance)
    for gradient, by in zip(torch.autograd.grad(losses.sum(), rewards), expected[1:], strict=True):
        assert_equal(gradient, by, tolerance)
    metrics = RowMetrics()
    metrics.update(score_columns(losses, *rewards), 43)
    r_w, r_l, values = (column[:43] for column in (PAIRS.s_w, PAIRS.s_l, expected.value))
    assert {key: value.item() for key, value in metrics.compute().items()} == pytest.approx(
        {
            "loss": values.mean(),
            "rewards/chosen": r_w.mean(),
            "rewards/rejected": r_l.mean(),
            "rewards/accuracies": (r_w > r_l).mean() + (r_w == r_l).mean() / 2,
            "rewards/margins": (r_w - r_l).mean(),
            "rewards/mean": (r_w.mean() + r_l.mean()) / 2,
        },
        rel=1e-5,
    )


IDS = [[3], [10, 0, 4, 4, 1], [2, 8], [5, 6, 7]]
"""Completion tokens: chosen and rejected responses of two pairs, stacked."""
POSITIONS = [[0], [2, 3, 4, 5, 6], [8, 9], [11, 12, 13]]
"""Where in 2 rows of 7 positions each of them is predicted."""


def completion_batch() -> TokenBatch:
    mask = torch.tensor([[column < len(ids) for column in range(5)] for ids in IDS])
    ids, positions = (torch.tensor([[*row, *[0] * (5 - len(row))] for row in table]) for table in (IDS, POSITIONS))
    rows = torch.zeros(2, 7, dtype=torch.long)
    return TokenBatch(rows, rows > -1, rows, ids, mask, positions, mask.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["small", "large"])
@pytest.mark.parametrize(
    ("scale", "softcap", "with_bias"), [(1.0, None, False), (2.0, None, True), (0.5, 2.0, True)], ids=str
)
def test_sequence_logps_and_their_gradients(
    chunk_size: int, size: float, scale: float, softcap: float | None, with_bias: bool
) -> None:
    """From hidden states and a head; logits up to some hundred, of which fp32 has no exponentials."""
    rng = np.random.default_rng(2)
    hidden, weight, bias = rng.normal(0, size, (14, 6)), rng.normal(0, 2, (11, 6)), rng.normal(0, 1, 11)
    hidden, weight, bias = (values.astype(np.float32).astype(np.float64) for values in (hidden, weight, bias))
    upstream = rng.normal(0, 1, 4)

    plain = scale * (hidden @ weight.T + (bias if with_bias else 0))
    logits = plain if softcap is None else softcap * np.tanh(plain / softcap)
    expected = formulas.completions([logits[positions] for positions in POSITIONS], IDS)
    by_plain = np.zeros_like(plain)
    for positions, by_logits, factor in zip(POSITIONS, expected.by_logits, upstream, strict=True):
        by_plain[positions] = factor * by_logits
    if softcap is not None:
        by_plain *= 1 - np.tanh(plain / softcap) ** 2
    by_plain *= scale

    inputs = [torch.tensor(values, dtype=torch.float32, requires_grad=True) for values in (hidden, weight, bias)]
    options = {key: value for key, value in (("scale", scale), ("softcap", softcap)) if value not in (1.0, None)}
    head = Head(inputs[1], inputs[2] if with_bias else None, **options)
    out = sequence_logps(
        inputs[0].unflatten(0, (2, 7)), completion_batch(), head, chunk_size=chunk_size, alignment=True
    )
    largest = max(1.0, float(np.abs(logits).max()))
    assert_equal(out.logps, expected.logps, 1e-5 * largest)
    assert_equal(out.alignment, expected.alignment, 1e-5 * largest)
    assert not out.alignment.requires_grad
    assert out.num_tokens.tolist() == [1, 5, 2, 3]
    assert [row[:count].tolist() for row, count in zip(out.per_token_logps, out.num_tokens, strict=True)] == [
        pytest.approx(row.tolist(), rel=1e-5 * largest, abs=1e-5 * largest) for row in expected.token_logps
    ]
    assert not out.per_token_logps[~completion_batch().completion_mask].any()

    by = [by_plain @ weight, by_plain.T @ hidden, *([by_plain.sum(axis=0)] if with_bias else [])]
    gradients = torch.autograd.grad(out.logps @ torch.tensor(upstream).float(), inputs[: len(by)])
    for gradient, values in zip(gradients, by, strict=True):
        np.testing.assert_allclose(gradient, values, rtol=1e-4, atol=1e-5 * largest * np.abs(values).max())


def test_pairs_come_apart_as_they_were_stacked() -> None:
    """``[chosen; rejected]``: of each field the first half is the chosen responses'."""
    policy = SequenceLogps(
        torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True),
        torch.tensor([1, 2, 3, 4]),
        torch.zeros(4, 5),
        -torch.arange(4.0),
    )
    ref, mu, margins = torch.tensor([10.0, 20, 30, 40]), torch.tensor([0.5, 0.25, 4, 8]), torch.tensor([7.0, 9])
    pairs = PairLogps.unstack(policy, ref, mu, margins)
    assert [field.tolist() for field in pairs] == [
        [1, 2], [3, 4], [10, 20], [30, 40], [0.5, 0.25], [4, 8], [1, 2], [3, 4], [7, 9], [0, -1], [-2, -3],
    ]  # fmt: skip
    assert [ratios.tolist() for ratios in pairs.importance_logratios] == [[0.5, 1.75], [-1, -4]]
    assert pairs.chosen_logratios.requires_grad
    assert not any(field.requires_grad for field in pairs.detach())
    at_reference = pairs.at_reference()
    assert not at_reference.chosen_logratios.any()
    assert not at_reference.rejected_logratios.any()


def test_kl_of_a_response() -> None:
    rng = np.random.default_rng(3)
    logits, ref_logits = rng.normal(0, 2, (2, 5, 6))
    p, q = (np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True) for rows in (logits, ref_logits))
    exact = (p * np.log(p / q)).sum(axis=1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    of_tokens = token_kl(*(torch.tensor(rows).log_softmax(dim=1) for rows in (logits, ref_logits)))
    assert_equal(of_tokens, exact, 1e-12)
    ratio = np.array([0.3, 4.0])  # ref over policy
    values = kl_values(torch.tensor(-np.log(ratio)), of_tokens, mask)
    assert_equal(values.rao_blackwell, np.array([exact[:2].sum(), exact[2:].sum()]), 1e-12)
    assert_equal(values.k1, -np.log(ratio), 1e-12)
    assert_equal(values.k3, ratio - 1 - np.log(ratio), 1e-12)
