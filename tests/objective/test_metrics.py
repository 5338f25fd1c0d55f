"""What is logged: right under accumulation and with a short last batch; KL estimators against enumeration."""

import itertools
import math

import pytest
import torch

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import DPOLoss, SimPOLoss
from lit_isdpo.objective.metrics import (
    Estimate,
    PairMetrics,
    Ratio,
    RowMetrics,
    effective_sample_size,
    kl_values,
    pair_columns,
    token_kl,
)
from lit_isdpo.objective.weights import ImportanceWeighting, UniformWeighting
from tests.conftest import pair_logps


def feed(metrics: PairMetrics, pairs: PairLogps, num_counted: int | None = None) -> None:
    loss, weights = DPOLoss(0.1), ImportanceWeighting()(pairs)
    columns = pair_columns(loss.weighted(pairs, weights.weights), loss.rewards(pairs), pairs, weights)
    metrics.update(columns, len(pairs.chosen_logps) if num_counted is None else num_counted)


def random_pairs(number: int) -> PairLogps:
    return pair_logps(*torch.randn(2, number, generator=torch.Generator().manual_seed(0)), ref=(0.3, -0.2))


def test_worked_example() -> None:
    """Log-ratios (1, -1) and (-2, 0): the second pair is won by the wrong side, and its chosen one fell."""
    pairs = pair_logps(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 0.0]))
    metrics = PairMetrics()
    feed(metrics, pairs)
    values = {key: round(value.item(), 5) for key, value in metrics.compute().items()}
    weights = [1.0, math.exp(-2)]
    losses = [weights[0] * math.log(1 + math.exp(-0.2)), weights[1] * math.log(1 + math.exp(0.2))]
    assert values == {
        "loss": round(sum(losses) / 2, 5),
        "rewards/chosen": -0.05,
        "rewards/rejected": -0.05,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "logps/chosen": -0.5,
        "logps/rejected": -0.5,
        "logratios/chosen": -0.5,
        "logratios/rejected": -0.5,
        "logratios/chosen_fell": 0.5,
        "logratios/importance": -1.0,
        "weights/mean": round(sum(weights) / 2, 5),
        "weights/clip_fraction": 0.0,
        "weights/max": 1.0,
        "weights/ess": round(sum(weights) ** 2 / sum(w * w for w in weights) / 2, 5),
    }


@pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [1] * 10, [9, 1]])
def test_micro_batches_of_any_size_give_the_whole(sizes: list[int]) -> None:
    whole, parts = PairMetrics(), PairMetrics()
    pairs = random_pairs(10)
    feed(whole, pairs)
    for part in zip(*(field.split(sizes) for field in pairs), strict=True):
        feed(parts, PairLogps(*part))
    torch.testing.assert_close(parts.compute(), whole.compute())


def test_without_a_reference_what_is_measured_against_it_is_left_out() -> None:
    """SimPO's own reward is beta times the mean log-prob of a token."""
    pairs = pair_logps(torch.tensor([-4.0]), torch.tensor([-9.0]), ref=(math.nan, math.nan), num_tokens=(4, 3))
    loss, metrics, weights = SimPOLoss(2.0), PairMetrics(), UniformWeighting()(pairs)
    columns = pair_columns(loss(pairs), loss.rewards(pairs), pairs, weights, has_reference=False, has_mu=False)
    metrics.update(columns, 1)
    values = {key: value.item() for key, value in metrics.compute().items()}
    assert all(map(math.isfinite, values.values()))
    assert (values["rewards/chosen"], values["rewards/rejected"], values["rewards/accuracies"]) == (-2, -6, 1)
    assert not any(key.startswith("logratios") for key in values)


def test_fillers_are_not_counted() -> None:
    whole, filled = PairMetrics(), PairMetrics()
    pairs = random_pairs(10)
    feed(whole, PairLogps(*(field[:7] for field in pairs)))
    feed(filled, pairs, 7)
    torch.testing.assert_close(filled.compute(), whole.compute())


def test_a_window_outlives_resets() -> None:
    metrics = PairMetrics(window=5)
    pairs = random_pairs(8)
    for part in zip(*(field.split(4) for field in pairs), strict=True):
        metrics.reset()
        feed(metrics, PairLogps(*part))
    weights = ImportanceWeighting()(pairs)
    assert metrics.totals()["loss"].denominator == 4
    torch.testing.assert_close(metrics.recent_log_weights, weights.log_weights[-5:])


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.zeros(5)).item() == pytest.approx(5)
    assert effective_sample_size(torch.tensor([0.0, -1e5])).item() == pytest.approx(1)
    assert effective_sample_size(torch.tensor([1.0, 3.0]).log()).item() == pytest.approx(16 / 10)


def test_standard_error() -> None:
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0]))
    assert (estimate.mean.item(), estimate.stderr.item()) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert Estimate.of(torch.tensor([1.0])).stderr == math.inf


def test_kl_estimators_have_the_enumerated_mean() -> None:
    """All responses of 2 tokens over 4 symbols: the probability-weighted mean of each estimator is the exact KL."""
    generator = torch.Generator().manual_seed(1)
    pi, ref = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)  # last token (4: start) -> logits of next
    responses = list(itertools.product(range(4), repeat=2))
    contexts = torch.tensor([[4, first] for first, _ in responses])
    tokens = torch.tensor(responses)
    logps = pi.log_softmax(-1)[contexts, tokens].sum(1)
    ref_logps = ref.log_softmax(-1)[contexts, tokens].sum(1)
    mask = torch.ones(16, 2, dtype=torch.bool)
    values = kl_values(
        logps - ref_logps, token_kl(*(table[contexts].flatten(0, 1).log_softmax(-1) for table in (pi, ref))), mask
    )
    exact = (logps.exp() * (logps - ref_logps)).sum().item()
    for name, estimate in values._asdict().items():
        assert (logps.exp() * estimate).sum().item() == pytest.approx(exact, abs=1e-12), name


def test_kl_estimators_agree_within_their_standard_errors_on_samples() -> None:
    generator = torch.Generator().manual_seed(2)
    pi, ref = torch.randn(2, 5, 4, generator=generator) * 0.7
    first = torch.multinomial(pi[4].softmax(-1), 20_000, replacement=True, generator=generator)
    second = torch.multinomial(pi[first].softmax(-1), 1, generator=generator)[:, 0]
    contexts, tokens = torch.stack([torch.full_like(first, 4), first], 1), torch.stack([first, second], 1)
    logratios = (pi.log_softmax(-1) - ref.log_softmax(-1))[contexts, tokens].sum(1)
    exact_tokens = token_kl(*(table[contexts].flatten(0, 1).log_softmax(-1) for table in (pi, ref)))
    values = kl_values(logratios, exact_tokens, torch.ones_like(tokens, dtype=torch.bool))
    all_responses = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    all_contexts = torch.stack([torch.full((16,), 4), all_responses[:, 0]], 1)
    logps, ref_logps = (table.log_softmax(-1)[all_contexts, all_responses].sum(1) for table in (pi, ref))
    exact = (logps.exp() * (logps - ref_logps)).sum()
    for estimate in map(Estimate.of, values):
        assert abs(estimate.mean - exact) < 4 * estimate.stderr
    assert Estimate.of(values.rao_blackwell).stderr < Estimate.of(values.k1).stderr


def test_sums_are_kept_in_float64_without_gradient_and_added_up_over_ranks() -> None:
    """2^24 + 1 is no fp32 number: within a batch, over batches, and over ranks the ones are not lost."""
    rank, other = PairMetrics(), PairMetrics()
    for number, metrics in enumerate((rank, rank, other)):
        pairs = pair_logps(torch.full((4,), -number / 2, requires_grad=True), torch.zeros(4, requires_grad=True))
        losses = torch.tensor([2.0**24 if number == 0 else 1.0, 1.0, 1.0, 1.0], requires_grad=True)
        rewards = DPOLoss(0.1).rewards(pairs)
        metrics.update(pair_columns(losses, rewards, pairs, ImportanceWeighting()(pairs)), 4)
    assert not rank.sums.requires_grad
    assert other.max_log_weight == -1
    other.merge_state(rank)
    values = other.compute()
    assert other.totals()["loss"] == (2**24 + 11, 12)
    assert {value.dtype for value in values.values()} == {torch.float32}
    log_weights = [-0.0] * 4 + [-0.5] * 4 + [-1.0] * 4
    assert sorted(other.recent_log_weights.tolist(), reverse=True) == log_weights
    assert values["weights/max"] == 1
    assert values["weights/ess"] == pytest.approx(effective_sample_size(torch.tensor(log_weights)).item() / 12)


def test_a_batch_of_fillers_alone_adds_nothing() -> None:
    metrics = PairMetrics()
    feed(metrics, random_pairs(3))
    before = metrics.compute()
    feed(metrics, random_pairs(5), 0)
    assert metrics.compute() == before


def test_without_a_window_a_reset_forgets_all() -> None:
    metrics = PairMetrics()
    feed(metrics, random_pairs(3))
    metrics.reset()
    assert len(metrics.recent_log_weights) == 0
    assert not metrics.totals()
    assert not metrics.sums.numel()


def test_what_is_left_out_where_it_is_not_known() -> None:
    pairs = random_pairs(2)
    given = (torch.zeros(2), DPOLoss(0.1).rewards(pairs), pairs, UniformWeighting()(pairs))
    every = set(pair_columns(*given))
    assert every - set(pair_columns(*given, has_reference=False)) == {
        "logratios/chosen",
        "logratios/rejected",
        "logratios/chosen_fell",
    }
    assert every - set(pair_columns(*given, has_mu=False)) == {"logratios/importance"}


def test_a_metric_is_one_more_column_in_any_place() -> None:
    """No list of keys has to know it, nor the order of the others."""
    pairs = random_pairs(4)
    weights = ImportanceWeighting()(pairs)
    columns = pair_columns(DPOLoss(0.1)(pairs), DPOLoss(0.1).rewards(pairs), pairs, weights)
    plain, more = PairMetrics(), PairMetrics()
    plain.update(columns, 3)
    more.update({"length": torch.arange(4.0)} | columns, 3)
    assert more.compute() == plain.compute() | {"length": 1.0}


def test_a_ratio_is_divided_once_over_all_micro_batches() -> None:
    """Nats a token: 6 nats of 3 tokens and 1 nat of 4, in two micro-batches, with a filler behind."""
    metrics = RowMetrics()
    metrics.update({"nll": Ratio(torch.tensor([6.0, 9.0]), torch.tensor([3, 9])), "one": torch.ones(2)}, 1)
    metrics.update({"nll": Ratio(torch.tensor([1.0]), torch.tensor([4])), "one": torch.zeros(1)}, 1)
    assert metrics.compute() == {"nll": 1.0, "one": 0.5}
    assert metrics.totals()["nll"] == (7, 7)


@pytest.mark.parametrize("window", [None, 3])
def test_what_is_forgotten_was_never_there(window: int | None) -> None:
    """After a reset, as an optimizer step logs first and looks at its gradient then."""
    metrics, expected = PairMetrics(window), PairMetrics(window)
    for one in (metrics, expected):
        feed(one, random_pairs(2))
        one.reset()
    feed(metrics, random_pairs(8))
    metrics.compute()
    metrics.forget()
    assert len(metrics.recent_log_weights) == len(expected.recent_log_weights)
    for one in (metrics, expected):
        feed(one, random_pairs(2))
    assert metrics.compute() == expected.compute()


def test_two_values_have_a_standard_error_and_one_has_none() -> None:
    one = Estimate.of(torch.tensor([1.0]))
    assert one.mean.shape == one.stderr.shape == ()
    assert Estimate.of(torch.tensor([1.0, 3.0])).stderr == pytest.approx(1.0)
