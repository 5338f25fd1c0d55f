"""Intervals and win rates against hand-worked values and simulation."""

import math

import pytest
import torch

from lit_isdpo.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    length_controlled_win_rate,
    win_rate_interval,
    win_scores,
)


def test_the_mean_is_over_prompts_and_so_is_the_standard_error() -> None:
    """Prompt means 0.5, 1 and 0: their standard deviation is 0.5, and three prompts give 0.5 / sqrt(3)."""
    interval = bootstrap_interval(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert interval.mean == pytest.approx(0.5)
    assert interval.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert (interval.low, interval.high) == (0, 1)


def test_responses_are_no_prompts() -> None:
    """Each prompt's value eight times over tells nothing new."""
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(values[:, None].expand(-1, 8)))


def test_the_interval_is_the_normal_one_where_there_are_many_prompts() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1)) + 3
    interval = bootstrap_interval(values, level=0.9)
    half = 1.645 * values.std().item() / math.sqrt(4000)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)


def test_what_has_no_verdict_is_left_out() -> None:
    nan = math.nan
    values = torch.tensor([[1.0, nan], [nan, nan], [0.5, 0.0]])
    assert bootstrap_interval(values) == bootstrap_interval(torch.tensor([1.0, 0.25]))


def test_the_draws_are_seeded_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(2))
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert interval != bootstrap_interval(values, seed=1)
    monkeypatch.setattr("lit_isdpo.evaluation.statistics._ELEMENTS", 1000)
    assert interval == pytest.approx(bootstrap_interval(values))


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_where_all_agree_the_interval_is_a_point(score: float) -> None:
    scores = torch.full((10, 2), score)
    assert bootstrap_interval(scores) == Interval(score, 0, score, score)
    lengths = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    assert length_controlled_win_rate(scores, lengths) == pytest.approx((score, 0, score, score), abs=2e-6)


def test_one_prompt_says_nothing_about_others() -> None:
    assert bootstrap_interval(torch.tensor([[0.0, 1.0]])) == Interval(0.5, math.inf, -math.inf, math.inf)
    one = length_controlled_win_rate(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 3.0]]))
    assert one == pytest.approx((0.5, math.inf, -math.inf, math.inf))


def test_nothing_measured_is_no_number() -> None:
    nothing = torch.full((3, 2), math.nan)
    assert math.isnan(bootstrap_interval(nothing).mean)
    assert math.isnan(length_controlled_win_rate(nothing, torch.ones(3, 2)).mean)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Prompts differ (sd 1), responses to one of them too (sd 2): an interval over responses would cover far less."""
    generator = torch.Generator().manual_seed(3)
    trials = 400
    prompts = torch.randn(trials, 60, 1, generator=generator)
    values = prompts + 2 * torch.randn(trials, 60, 4, generator=generator)
    intervals = [bootstrap_interval(trial, num_resamples=400, seed=seed) for seed, trial in enumerate(values)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals) / trials
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_win_scores() -> None:
    """5 beats both; 2 beats 1 and ties with 2; 0 beats neither."""
    scores = win_scores(torch.tensor([[5.0, 2.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    assert scores.tolist() == [[1.0, 0.75, 0.0]]
    rewards = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).round()
    assert win_scores(rewards, rewards).mean().item() == pytest.approx(0.5)


def test_without_an_effect_of_length_it_is_the_plain_win_rate() -> None:
    """As many wins among the longer ones as among the shorter ones: phi is 0."""
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    lengths = torch.tensor([[5.0, 5.0], [5.0, 5.0], [-5.0, -5.0], [-5.0, -5.0]])
    assert length_controlled_win_rate(scores, lengths).mean == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("difference", [0.0, 7.0])
def test_lengths_that_do_not_differ_control_nothing(difference: float) -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    controlled = length_controlled_win_rate(scores, torch.full((2, 2), difference))
    assert controlled.mean == pytest.approx(0.75, abs=1e-6)


def test_what_is_preferred_for_its_length_alone_wins_half() -> None:
    """Preferences of the model itself with theta 0, phi 2, from a policy that is mostly longer."""
    lengths = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1.5
    scores = (2 * (lengths / lengths.std(correction=0)).tanh()).sigmoid()
    controlled = length_controlled_win_rate(scores, lengths, num_resamples=100)
    assert scores.mean() > 0.7
    assert controlled.mean == pytest.approx(0.5, abs=1e-6)
    assert (controlled.low, controlled.high) == pytest.approx((0.5, 0.5), abs=1e-6)


def test_quality_is_found_beneath_length() -> None:
    """With theta 0.8, phi -1.5: longer responses are disliked, and the policy's are longer."""
    lengths = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    probs = (0.8 - 1.5 * (lengths / lengths.std(correction=0)).tanh()).sigmoid()
    assert length_controlled_win_rate(probs, lengths, num_resamples=2).mean == pytest.approx(
        1 / (1 + math.exp(-0.8)), abs=1e-6
    )
    scores = torch.bernoulli(probs, generator=torch.Generator().manual_seed(1))
    controlled = length_controlled_win_rate(scores, lengths, num_resamples=200)
    assert controlled.low < 1 / (1 + math.exp(-0.8)) < controlled.high
    assert bootstrap_interval(scores).high < controlled.low


def test_separable_data_stays_finite() -> None:
    """Every longer response wins, every shorter one loses: phi has no maximum but for the ridge."""
    lengths = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]])
    controlled = length_controlled_win_rate((lengths > 0).float(), lengths)
    assert controlled == pytest.approx((0.5, 0, 0.5, 0.5), abs=1e-6)


def test_each_prompt_weighs_the_same() -> None:
    """The second prompt's one verdict counts as much as the first one's two."""
    scores = torch.tensor([[1.0, 0.0], [1.0, math.nan]])
    lengths = torch.tensor([[1.0, 1.0], [1.0, 9.0]])
    assert length_controlled_win_rate(scores, lengths).mean == pytest.approx(0.75, abs=1e-6)


def wins(num_prompts: int, num_responses: int, logit: float, ties: float, trials: int) -> tuple[torch.Tensor, float]:
    """Scores ``(trials, P, n)`` of prompts that differ by a normal draw in their logit, and the true win rate."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(trials, num_prompts, 1, generator=generator) + logit
    scores = torch.bernoulli(logits.sigmoid().expand(-1, -1, num_responses), generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < ties] = 0.5
    normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(10_000) + 0.5) / 10_000)
    return scores, (1 - ties) * (normal + logit).sigmoid().mean().item() + ties / 2


@pytest.mark.parametrize("num_prompts", [3, 10, 30, 100])
@pytest.mark.parametrize(
    ("num_responses", "logit", "ties"),
    [(1, 0.0, 0.0), (4, 0.0, 0.0), (1, 2.7, 0.0), (4, 2.7, 0.0), (4, 5.0, 0.0), (4, -5.0, 0.0), (4, 0.5, 0.3)],
    ids=["half", "half_of_4", "0.91", "0.91_of_4", "0.99_of_4", "0.01_of_4", "ties"],
)
def test_a_win_rates_interval_covers_at_least_as_often_as_it_says(
    num_prompts: int, num_responses: int, logit: float, ties: float
) -> None:
    trials = 600
    scores, rate = wins(num_prompts, num_responses, logit, ties, trials)
    intervals = [win_rate_interval(trial) for trial in scores]
    covered = sum(interval.low <= rate <= interval.high for interval in intervals) / trials
    # 3 standard errors of a share of 600, and 1 % for what lattices of a few scores do
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) - 0.01
    if num_prompts == 100 and abs(logit) < 5 and not ties:
        assert covered < 0.95 + 3 * math.sqrt(0.95 * 0.05 / trials)  # nor is it wide for nothing


def test_a_bootstrap_of_win_rates_near_one_covers_far_too_seldom() -> None:
    """Why win rates have an interval of their own: most samples of 30 comparisons hold no loss, and so no spread."""
    scores, rate = wins(30, 1, 5.0, 0.0, trials=200)
    intervals = [bootstrap_interval(trial, num_resamples=100) for trial in scores]
    assert sum(interval.low <= rate <= interval.high for interval in intervals) / 200 < 0.4
    wilson = [win_rate_interval(trial) for trial in scores]
    assert sum(interval.low <= rate <= interval.high for interval in wilson) / 200 > 0.9


def test_a_win_rates_interval_against_wilsons_by_hand() -> None:
    """8 wins of 10, t of 9 degrees 2.2622: n = 0.8 * 0.2 / (s^2 / 10) = 9, as s^2 = 1.6 / 9."""
    scores = torch.tensor([1.0] * 8 + [0.0] * 2)
    t2 = 2.2621572**2
    middle = (0.8 + t2 / 18) / (1 + t2 / 9)
    half = math.sqrt(t2 * 0.16 / 9 + t2**2 / 324) / (1 + t2 / 9)
    interval = win_rate_interval(scores)
    assert interval == pytest.approx((0.8, math.sqrt(1.6 / 90), middle - half, middle + half), rel=1e-6)
    narrower = win_rate_interval(scores, level=0.8)
    assert interval.low < narrower.low < 0.8 < narrower.high < interval.high


def test_a_win_rates_interval_counts_prompts_and_verdicts() -> None:
    eight_times = win_rate_interval(torch.tensor([1.0, 0.0, 1.0])[:, None].expand(-1, 8))
    assert eight_times == pytest.approx(win_rate_interval(torch.tensor([1.0, 0.0, 1.0])))
    nan = math.nan
    unknown = torch.tensor([[1.0, nan], [nan, nan], [0.5, 0.0]])
    assert win_rate_interval(unknown).mean == 0.625
    # Ties have little spread, but there are no more than 4 comparisons: n is 4, and not 0.5 * 0.5 / stderr^2 = 36.
    ties = win_rate_interval(torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.5, 1.0]])[:, :1])
    assert ties.low == pytest.approx(win_rate_interval(torch.tensor([0.5, 0.75, 0.75, 0.5])).low)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_where_all_verdicts_agree_a_win_rate_is_still_not_certain(rate: float) -> None:
    """10 of 10: with t^2 = 5.117, ``1 / (1 + 5.117 / 10)`` from the end; within 0 and 1."""
    interval = win_rate_interval(torch.full((10, 1), rate))
    assert (interval.mean, interval.stderr) == (rate, 0)
    reach = 1 / (1 + 2.2621572**2 / 10)
    if rate == 0.5:
        assert interval.low == pytest.approx(1 - interval.high)
        assert 0.1 < interval.low < 0.25
    else:
        assert (interval.low, interval.high) == pytest.approx((reach, 1) if rate else (0, 1 - reach), abs=1e-6)


def test_a_win_rate_of_one_prompt_or_none() -> None:
    assert win_rate_interval(torch.tensor([[0.0, 1.0]])) == Interval(0.5, math.inf, -math.inf, math.inf)
    assert math.isnan(win_rate_interval(torch.full((3, 2), math.nan)).mean)


def test_the_length_controlled_interval_covers_as_often_as_it_says() -> None:
    """60 prompts of the model itself, theta 0.8 and phi -1.5; the bootstrap fits anew in each draw."""
    generator = torch.Generator().manual_seed(5)
    trials, covered = 100, 0
    for seed in range(trials):
        lengths = torch.randn(60, 2, generator=generator, dtype=torch.float64) + 1
        scores = torch.bernoulli((0.8 - 1.5 * lengths.tanh()).sigmoid(), generator=generator)
        interval = length_controlled_win_rate(scores, lengths, num_resamples=150, seed=seed)
        covered += interval.low <= 1 / (1 + math.exp(-0.8)) <= interval.high
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)
