"""Tokens and work of a micro-batch, counted by hand, in every layout."""

import sys

import pytest
import torch

from lit_isdpo.data.collation import collate_examples, collate_pairs
from lit_isdpo.training.throughput import COUNTS, GIB, count_work, peak_memory_gib, reset_peak_memory
from lit_isdpo.types import TokenizedExample, TokenizedPair

PAIRS = [TokenizedPair([1, 5, 7], [6, 2], [7, 8, 9, 2]), TokenizedPair([1], [7, 2], [3])]
# Prompts of 3 and 1, responses of 2 and 4, 2 and 1. Each response token sees its prompt, and half of its response.
ATTENDED = (9 + 1) / 2 + (2 * 3 + 4 / 2) + (4 * 3 + 16 / 2) + (2 * 1 + 4 / 2) + (1 * 1 + 1 / 2)


@pytest.mark.parametrize(
    ("options", "tokens", "positions"),
    [
        ({}, 5 + 7 + 3 + 2, 4 * 7),  # prompts twice
        ({"layout": "shared"}, 9 + 4, 2 * 9),
        ({"layout": "shared", "row_budget": 13}, 13, 13),
    ],
)
def test_the_work_of_pairs_does_not_depend_on_the_layout(options: dict, tokens: int, positions: int) -> None:
    counts = count_work(collate_pairs(PAIRS, [0, 1], pad_token_id=0, **options)).tolist()
    assert dict(zip(COUNTS, counts, strict=True)) == {
        "rows": 2,
        "unique tokens": 13,
        "tokens": tokens,
        "positions": positions,
        "completion tokens": 9,
        "attended pairs of tokens": ATTENDED,
    }


def test_a_demonstration_is_one_prompt_and_one_response() -> None:
    batch = collate_examples([TokenizedExample([1, 5], [6, 2, 3])], [0], pad_token_id=0)
    assert count_work(batch).tolist() == [1, 5, 5, 5, 3, 4 / 2 + 3 * 2 + 9 / 2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_the_peak_begins_anew() -> None:
    """A quarter of a GiB that came and went is seen once; what is there after the reset is not forgotten."""
    cpu, size = torch.device("cpu"), 2**28
    reset_peak_memory(cpu)
    before = peak_memory_gib(cpu)
    torch.zeros(size, dtype=torch.uint8).fill_(1)
    with_it = peak_memory_gib(cpu)
    reset_peak_memory(cpu)
    after = peak_memory_gib(cpu)
    assert with_it - before > 0.9 * size / GIB
    assert 0 < after < before + 0.2 * size / GIB
