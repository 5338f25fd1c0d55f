"""Win rates and lengths from literal values."""

import pytest
import torch

from lit_isdpo.evaluation.measures import ResponseValues, compare, describe, flatten, repetition


def test_repetition_counts_the_grams_that_came_before() -> None:
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1] * 12) == pytest.approx(0.9), "one of ten 3-grams is new"
    assert repetition([1, 2, 1, 2], size=2) == pytest.approx(1 / 3)


def test_a_win_is_over_all_pairs_of_responses_to_a_prompt() -> None:
    """The first prompt: 1 beats 0 and ties 1, 0 ties 0 and loses; the second: wins alone. (3/4 + 1/4) / 2 and 1."""
    own = ResponseValues(torch.tensor([[5.0, 5.0], [5.0, 5.0]]), rewards=torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    others = ResponseValues(torch.tensor([[4.0, 6.0], [5.0, 5.0]]), rewards=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    rates = compare(own, others)
    assert rates["win_rate"].mean == pytest.approx(0.75)
    assert rates["win_rate_lc"].mean == pytest.approx(0.75, abs=1e-6), "lengths do not differ on average"


def test_what_length_alone_wins_is_lost_at_equal_length() -> None:
    """The longer response wins in 32 of 40 prompts, whosever it is. The policy's is the longer one in 30 of them."""
    longer = torch.tensor([[1.0]] * 30 + [[0.0]] * 10)
    wins = torch.tensor([[1.0]] * 24 + [[0.0]] * 6 + [[1.0]] * 2 + [[0.0]] * 8)
    own = ResponseValues(10 + 10 * longer, rewards=wins)
    others = ResponseValues(20 - 10 * longer, rewards=1 - wins)
    rates = compare(own, others)
    assert rates["win_rate"].mean == pytest.approx(26 / 40)
    assert rates["win_rate_lc"].mean == pytest.approx(0.5, abs=1e-6)


def test_what_is_not_known_has_no_key() -> None:
    keys = flatten(describe(ResponseValues(torch.tensor([[3.0], [5.0]])), "reward"))
    assert set(keys) == {f"response_characters{suffix}" for suffix in ("", "_stderr", "_low", "_high")}
    assert keys["response_characters"] == 4
    assert keys["response_characters_low"] == 3
    assert keys["response_characters_high"] == 5
    assert compare(ResponseValues(torch.ones(1, 1)), ResponseValues(torch.ones(1, 1))) == {}
