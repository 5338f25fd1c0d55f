"""From values of single responses to what is reported: means over prompts, win rates, intervals."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lit_isdpo.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    length_controlled_win_rate,
    win_rate_interval,
    win_scores,
)


class ResponseValues(NamedTuple):
    """Values of n responses to each of P prompts; one that is not known is ``None``.

    Attributes:
        num_characters: ``(P, n)`` length of the text.
        num_tokens: ``(P, n)`` length in tokens, EOS included.
        finished: ``(P, n)`` 1 where the response ended by itself.
        repetition: ``(P, n)`` as :func:`repetition` has it.
        rewards: ``(P, n)``.
    """

    num_characters: Tensor
    num_tokens: Tensor | None = None
    finished: Tensor | None = None
    repetition: Tensor | None = None
    rewards: Tensor | None = None


def repetition(token_ids: Sequence[int], size: int = 3) -> float:
    """The share of a response's n-grams that repeat an earlier one of it (seq-rep-n of arXiv 1908.04319).

    >>> repetition([1, 2, 3, 1, 2, 3])
    0.25
    >>> repetition([1, 2])
    0.0
    """
    grams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def describe(values: ResponseValues, reward_key: str) -> dict[str, Interval]:
    """Means of a set of responses, by log key; ``reward_key`` is that of the reward."""
    columns = {
        "response_length": values.num_tokens,
        "response_characters": values.num_characters,
        "finished_fraction": values.finished,
        "repetition": values.repetition,
        reward_key: values.rewards,
    }
    return {key: bootstrap_interval(column) for key, column in columns.items() if column is not None}


def compare(values: ResponseValues, others: ResponseValues) -> dict[str, Interval]:
    """``win_rate`` by reward, over all pairs of responses to a prompt, and length-controlled ``win_rate_lc``.

    Ties count one half. Length is that in characters, which is what a reader sees, and no tokenizer's.
    """
    if values.rewards is None or others.rewards is None:
        return {}
    return win_rates(
        win_scores(values.rewards, others.rewards),
        values.num_characters - others.num_characters.mean(dim=1, keepdim=True),
    )


def win_rates(scores: Tensor, length_differences: Tensor) -> dict[str, Interval]:
    """The win rate of ``(P, n)`` scores, NaN where there is none, and the length-controlled one."""
    return {
        "win_rate": win_rate_interval(scores),
        "win_rate_lc": length_controlled_win_rate(scores, length_differences),
    }


def flatten(values: dict[str, Interval]) -> dict[str, float]:
    """Plain numbers: each key's mean, and beside it ``_stderr``, ``_low`` and ``_high``."""
    flat = {}
    for key, interval in values.items():
        flat[key] = interval.mean
        for part in ("stderr", "low", "high"):
            flat[f"{key}_{part}"] = getattr(interval, part)
    return flat
