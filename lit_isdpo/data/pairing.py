"""Which pairs are made of several scored responses to one prompt."""

import hashlib
import json
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from lit_isdpo.types import Message

Pairing = Literal["best_worst", "best_random", "all"]


def by_score(prompt: str | list[Message], responses: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Indices of the responses, the best first.

    Responses with the same score are ordered by a hash of their text and the prompt, not by their place in the row: a
    data set may list its models by name, so that the place is the model's.

    >>> by_score("2 + 2 =", [" 5", " 4", " 22"], [1.0, 9.0, 3.0])
    [1, 2, 0]
    """
    return sorted(range(len(responses)), key=lambda index: (-scores[index], _digest(prompt, responses[index])))


def choose_pairs(
    prompt: str | list[Message], responses: Sequence[str], scores: Sequence[float], pairing: Pairing
) -> list[tuple[int, int]]:
    """Chooses pairs, as indices of (better, worse); responses with the same score make none.

    Args:
        prompt: what the responses are to.
        responses: their texts.
        scores: one each, higher is better.
        pairing: ``best_worst``; ``best_random``: the best and a worse one, picked by a hash of the texts, so that it is
            the same one in every run and wherever the row stands; ``all``: every pair with different scores.

    >>> choose_pairs("2 + 2 =", [" 5", " 4", " 22"], [1.0, 9.0, 3.0], "best_worst")
    [(1, 0)]
    >>> choose_pairs("2 + 2 =", [" 5", " 4", " 22"], [1.0, 9.0, 3.0], "all")
    [(1, 2), (1, 0), (2, 0)]
    """
    order = by_score(prompt, responses, scores)
    if pairing == "all":
        return [(better, worse) for better, worse in combinations(order, 2) if scores[better] > scores[worse]]
    worse = [index for index in order if scores[index] < scores[order[0]]]
    if not worse:
        return []
    if pairing == "best_worst":
        return [(order[0], worse[-1])]
    return [(order[0], min(worse, key=lambda index: _digest(responses[order[0]], responses[index])))]


def _digest(*content: object) -> bytes:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
