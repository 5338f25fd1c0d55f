"""Win rates and repetition from literal values."""

import math

import pytest
import torch
from torch import Tensor

from lit_isdpo.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    flatten,
    repetition,
    win_rate_interval,
    win_rates,
    win_scores,
)


def test_repetition_counts_the_grams_that_came_before() -> None:
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1] * 12) == pytest.approx(0.9), "one of ten 3-grams is new"
    assert repetition([1, 2, 1, 2], size=2) == pytest.approx(1 / 3)


def compare(rewards: Tensor, lengths: Tensor, other_rewards: Tensor, other_lengths: Tensor) -> dict[str, Interval]:
    return win_rates(win_scores(rewards, other_rewards), lengths - other_lengths.mean(dim=1, keepdim=True))


def test_a_win_is_over_all_pairs_of_responses_to_a_prompt() -> None:
    """The first prompt: 1 beats 0 and ties 1, 0 ties 0 and loses; the second: wins alone. (3/4 + 1/4) / 2 and 1."""
    own = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[5.0, 5.0], [5.0, 5.0]])
    others = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[4.0, 6.0], [5.0, 5.0]])
    rates = compare(*own, *others)
    assert rates["win_rate"].mean == pytest.approx(0.75)
    assert rates["win_rate_lc"].mean == pytest.approx(0.75, abs=1e-6), "lengths do not differ on average"


def test_what_length_alone_wins_is_lost_at_equal_length() -> None:
    """The longer response wins in 32 of 40 prompts, whosever it is. The policy's is the longer one in 30 of them."""
    longer = torch.tensor([[1.0]] * 30 + [[0.0]] * 10)
    wins = torch.tensor([[1.0]] * 24 + [[0.0]] * 6 + [[1.0]] * 2 + [[0.0]] * 8)
    rates = compare(wins, 10 + 10 * longer, 1 - wins, 20 - 10 * longer)
    assert rates["win_rate"].mean == pytest.approx(26 / 40)
    assert rates["win_rate_lc"].mean == pytest.approx(0.5, abs=1e-6)


def test_prompts_are_the_sample() -> None:
    """Two prompts with means 1 and 2: the standard error is theirs, sqrt(1/2) / sqrt(2) = 1/2, however many responses.

    The first prompt's rewards 0 and 2 against the reference's 1 and 1: a loss and a win; the second's 2 and 2 against
    2 and 3: a tie and a loss each, a quarter.
    """
    rewards = torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    wins = win_rate_interval(win_scores(rewards, torch.tensor([[1.0, 1.0], [2.0, 3.0]])))
    keys = flatten({"gold_reward": bootstrap_interval(rewards), "win_rate": wins})
    assert keys["gold_reward"] == 1.5
    assert keys["gold_reward_stderr"] == pytest.approx(0.5)
    assert keys["win_rate"] == 0.375
    assert keys["win_rate_stderr"] == pytest.approx(math.sqrt(0.25**2 / 2) / math.sqrt(2))
    estimates = bootstrap_interval(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    assert estimates.mean == 1.5
    assert estimates.stderr == pytest.approx(0.5)


def test_each_key_has_its_mean_error_and_ends() -> None:
    keys = flatten({"response_characters": bootstrap_interval(torch.tensor([[3.0], [5.0]]))})
    assert set(keys) == {f"response_characters{suffix}" for suffix in ("", "_stderr", "_low", "_high")}
    assert keys["response_characters"] == 4
    assert keys["response_characters_low"] == 3
    assert keys["response_characters_high"] == 5
