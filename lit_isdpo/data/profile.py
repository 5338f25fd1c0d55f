"""What is in the rows of a split, in numbers: how long they are, and what their labels prefer."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lit_isdpo.data.rows import Rows


class LabelProfile(NamedTuple):
    """What the labels of N pairs prefer, besides what they mean.

    Attributes:
        chosen_longer: pairs whose chosen response has more tokens.
        rejected_longer: pairs whose rejected response has.
        mean_difference: tokens, chosen minus rejected, mean over pairs.
        chosen_cut: pairs whose chosen response has no terminator, as it was cut.
        rejected_cut: likewise.
        num_prompts: different prompts.
        most_pairs: of one prompt.
        both_ways: responses that are chosen in one pair and rejected in another of the same prompt.
        contradicted: pairs whose two responses stand in another one the other way round.
    """

    chosen_longer: int
    rejected_longer: int
    mean_difference: float
    chosen_cut: int
    rejected_cut: int
    num_prompts: int
    most_pairs: int
    both_ways: int
    contradicted: int


def profile_labels(rows: Rows, terminator_ids: list[int]) -> LabelProfile:
    """Reads all pairs of a split once.

    Args:
        rows: at least one pair.
        terminator_ids: tokens that end a response.
    """
    lengths = rows.num_tokens()
    difference = (lengths["chosen"] - lengths["rejected"]).double()
    prompts = rows.prompt_keys().tolist()
    sides = [list(_responses(rows, f"{name}_ids")) for name in ("chosen", "rejected")]
    cut = [sum(last not in terminator_ids for _, last in side) for side in sides]
    texts = ([key for key, _ in side] for side in sides)
    pairs = list(zip(prompts, *texts, strict=True))
    known = set(pairs)
    return LabelProfile(
        chosen_longer=int((difference > 0).sum()),
        rejected_longer=int((difference < 0).sum()),
        mean_difference=float(difference.mean()),
        chosen_cut=cut[0],
        rejected_cut=cut[1],
        num_prompts=len(set(prompts)),
        most_pairs=max(Counter(prompts).values()),
        both_ways=len({(prompt, text) for prompt, text, _ in pairs} & {(prompt, text) for prompt, _, text in pairs}),
        contradicted=sum((prompt, worse, better) in known for prompt, better, worse in pairs),
    )


def num_shared_prompts(rows: Rows, others: Rows) -> int:
    """Rows of a split whose prompt is one of another split's."""
    return int(torch.isin(rows.prompt_keys(), others.prompt_keys()).sum())


def _responses(rows: Rows, column: str) -> Iterator[tuple[bytes, int]]:
    """A hash of each row's tokens, and the last one."""
    start = 0
    for chunk in rows.table.data.column(column).chunks:  # one by one: a table may hold more tokens than one array can
        values: NDArray[np.int32] = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy()
        inside = rows.positions[(rows.positions >= start) & (rows.positions < start + len(chunk))] - start
        for at in inside.tolist():
            tokens = values[offsets[at] : offsets[at + 1]]
            yield hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), int(tokens[-1])
        start += len(chunk)
