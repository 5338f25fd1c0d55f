"""Token ids in, padded tensors out: the only place that pads.

A pair travels as two rows of the plain layout, ``[prompt | chosen]`` and ``[prompt | rejected]``, all chosen first.
For two pairs with prompt ``[1, 5]`` / ``[1]`` and responses ``[6, 2]``, ``[7, 8, 2]`` / ``[9, 2]``, ``[2]``:

    input_ids            completion_ids   logit_positions
    [1, 5, 6, 2, 0]      [6, 2, 0]        [ 1,  2, 0]      pair 0, chosen
    [1, 9, 2, 0, 0]      [9, 2, 0]        [ 5,  6, 0]      pair 1, chosen
    [1, 5, 7, 8, 2]      [7, 8, 2]        [11, 12, 13]     pair 0, rejected
    [1, 2, 0, 0, 0]      [2, 0, 0]        [15,  0, 0]      pair 1, rejected

The first response token is predicted at the prompt's last position, so a prompt has at least one token. In the shared
layout a pair is one row, ``[prompt | chosen | rejected]``, whose prompt is computed once; a row may hold several pairs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_isdpo.types import PreferenceBatch, SFTBatch, TokenBatch, TokenizedExample, TokenizedPair

Layout = Literal["plain", "shared"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Who reads the rows: what a data module must know of the model and of the run, which hands this over.

    Without a run it is one process that reads everything, in the plain layout.

    Attributes:
        tokenizer: the model's own.
        first_without_row: the first token id that the model's embedding has no row for, if there is one.
        mixes_pairs: whether a pair's weight depends on the others of its micro-batch, which must then be random.
        shares_prompts: whether the model wants one row per pair; known once the model is loaded.
        stage: fit, validate, test or predict.
        world_size: number of ranks.
        rank: of this process; known once the processes are.
        step: optimizer steps that were taken.
        limits: of the batches of a split's evaluation: an integer is a number of them, a float a share.
        pin_memory: whether batches go to a GPU.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    first_without_row: int | None = None
    mixes_pairs: bool = False
    shares_prompts: Callable[[], bool] = lambda: False
    stage: str = "fit"
    world_size: int = 1
    rank: Callable[[], int] = lambda: 0
    step: Callable[[], int] = lambda: 0
    limits: Mapping[str, int | float] = field(default_factory=dict)
    pin_memory: bool = False

    @property
    def layout(self) -> Layout:
        """How the model that is trained or tested wants its rows."""
        return "shared" if self.shares_prompts() else "plain"


def collate_completions(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, pad_token_id: int
) -> TokenBatch:
    """Pads S prompts with their completions on the right, to the longest row of the batch.

    Args:
        prompts: token ids of each prompt, at least one token each.
        completions: token ids of each completion.
        pad_token_id: fills ``input_ids``; the masks, not this id, say what is padding.

    Returns:
        The plain layout: one row a sequence, R = S.

    >>> batch = collate_completions([[1, 5], [1]], [[6, 2], [9]], pad_token_id=0)
    >>> batch.input_ids.tolist()
    [[1, 5, 6, 2], [1, 9, 0, 0]]
    >>> batch.completion_ids.tolist(), batch.logit_positions.tolist()
    ([[6, 2], [9, 0]], [[1, 2], [4, 0]])
    """
    rows = [[(prompt, [completion])] for prompt, completion in zip(prompts, completions, strict=True)]
    batch = _lay_out(rows, [[sequence] for sequence in range(len(rows))], pad_token_id)
    position_ids = torch.arange(batch.input_ids.shape[1]).expand(batch.input_ids.shape).contiguous()
    return batch._replace(position_ids=position_ids, segment_ids=None)


def collate_shared(
    pairs: Sequence[TokenizedPair], *, pad_token_id: int, rows: Sequence[Sequence[int]] | None = None
) -> TokenBatch:
    """Lays pairs out so that both responses share one prompt: ``[prompt | chosen | rejected]``.

    Args:
        pairs: B pairs.
        pad_token_id: as in :func:`collate_completions`.
        rows: which pairs each row holds, one after another; by default a row a pair.

    Returns:
        R rows with segment ids; S = 2B completions, all chosen first.

    >>> batch = collate_shared([TokenizedPair([1, 5], [6, 2], [7, 8, 2])], pad_token_id=0)
    >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.segment_ids.tolist()
    ([[1, 5, 6, 2, 7, 8, 2]], [[0, 1, 2, 3, 2, 3, 4]], [[0, 0, 1, 1, 2, 2, 2]])
    >>> batch.completion_ids.tolist(), batch.logit_positions.tolist()  # both responses begin after position 1
    ([[6, 2, 0], [7, 8, 2]], [[1, 2, 0], [1, 4, 5]])
    """
    rows = [[pair] for pair in range(len(pairs))] if rows is None else rows
    blocks = [
        [(pairs[pair].prompt_ids, [pairs[pair].chosen_ids, pairs[pair].rejected_ids]) for pair in row] for row in rows
    ]
    batch = _lay_out(blocks, [[pair + side for pair in row for side in (0, len(pairs))] for row in rows], pad_token_id)
    return batch._replace(num_prompt_positions=min(len(row[0][0]) for row in blocks))


def _lay_out(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]],
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
) -> TokenBatch:
    """Lays out rows of prompts, each followed by its responses; ``sequences`` numbers the responses of each row."""
    lengths = [sum(len(prompt) + sum(map(len, responses)) for prompt, responses in row) for row in rows]
    width = max(len(ids) for row in rows for _, responses in row for ids in responses)
    input_ids = torch.full((len(rows), max(lengths)), pad_token_id)
    segment_ids = torch.full_like(input_ids, -1)
    position_ids = torch.zeros_like(input_ids)
    completion_ids = torch.zeros(sum(map(len, sequences)), width, dtype=torch.long)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    logit_positions = torch.zeros_like(completion_ids)
    places: dict[int, Tensor] = {}  # of each response's tokens in the flattened completion_ids
    for row, blocks in enumerate(rows):
        numbers, start = iter(sequences[row]), 0
        for place, (prompt, responses) in enumerate(blocks):
            assert prompt, "the first completion token is predicted at the prompt's last position"
            last = row * max(lengths) + start + len(prompt) - 1
            for segment, ids in enumerate((prompt, *responses)):
                part = slice(start, start + len(ids))
                begin = len(prompt) if segment else 0
                input_ids[row, part] = torch.tensor(ids, dtype=torch.long)
                segment_ids[row, part] = (1 + len(responses)) * place + segment
                position_ids[row, part] = torch.arange(begin, begin + len(ids))
                if segment:
                    sequence, first = next(numbers), row * max(lengths) + start
                    completion_ids[sequence, : len(ids)] = input_ids[row, part]
                    completion_mask[sequence, : len(ids)] = True
                    places[sequence] = torch.arange(sequence * width, sequence * width + len(ids))
                    logit_positions[sequence, : len(ids)] = torch.arange(first - 1, first - 1 + len(ids))
                    logit_positions[sequence, : min(1, len(ids))] = last
                start = part.stop
    return TokenBatch(
        input_ids,
        segment_ids >= 0,
        position_ids,
        completion_ids,
        completion_mask,
        logit_positions,
        torch.cat([places[sequence] for sequence in sorted(places)]),
        segment_ids,
    )


def num_positions(pair: TokenizedPair) -> int:
    """Positions of a pair whose responses share the prompt."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Shares items out over bins of at most ``budget``, the longest first, each into the first bin with room for it.

    An item that is longer than the budget has a bin of its own.

    >>> pack([3, 9, 4, 2, 6], budget=10)
    [[1], [4, 2], [0, 3]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = next((place for place, left in enumerate(room) if left >= lengths[item]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(budget)
        bins[place].append(item)
        room[place] -= lengths[item]
    return bins


def collate_pairs(
    pairs: Sequence[TokenizedPair],
    row_ids: Sequence[int],
    *,
    pad_token_id: int,
    layout: Layout = "plain",
    row_budget: int | None = None,
) -> PreferenceBatch:
    """Stacks B pairs as ``[chosen; rejected]``.

    A response whose behavior log-prob is not known gets NaN.

    Args:
        pairs: to be stacked.
        row_ids: one a pair.
        pad_token_id: fills rows up.
        layout: ``plain`` has a row a response, ``shared`` a row a pair, with one prompt for both responses.
        row_budget: positions of a row in which several pairs are packed; only where the prompt is shared.
    """
    if layout == "shared":
        rows = None if row_budget is None else pack([num_positions(pair) for pair in pairs], row_budget)
        tokens = collate_shared(pairs, pad_token_id=pad_token_id, rows=rows)
    else:
        assert row_budget is None, "packed rows need segment ids"
        tokens = collate_completions(
            [pair.prompt_ids for pair in pairs] * 2,
            [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs],
            pad_token_id=pad_token_id,
        )
    rows = list(zip(*(pair[3:-1] for pair in pairs), strict=True))  # all between the ids and the changes
    numbers = {
        name: torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
        for name, values in zip(pairs[0]._fields[3:-1], rows, strict=True)
    }
    return PreferenceBatch(tokens, numbers, torch.tensor(row_ids), num_counted=_num_counted(row_ids))


def collate_examples(examples: Sequence[TokenizedExample], row_ids: Sequence[int], *, pad_token_id: int) -> SFTBatch:
    """Pads S demonstrations."""
    tokens = collate_completions(
        [example.prompt_ids for example in examples],
        [example.completion_ids for example in examples],
        pad_token_id=pad_token_id,
    )
    return SFTBatch(tokens, torch.tensor(row_ids), num_counted=_num_counted(row_ids))


def _num_counted(row_ids: Sequence[int]) -> int:
    """How many rows come before those that only fill up the batch."""
    number = sum(row_id >= 0 for row_id in row_ids)
    assert all(row_id < 0 for row_id in row_ids[number:]), "what fills up a batch stands at its end"
    return number


def batch_prompts(batch: PreferenceBatch | SFTBatch) -> list[tuple[int, list[int]]]:
    """Row id and prompt token ids of each row of a padded batch, padding and responses left out."""
    tokens, length = batch.tokens, batch.tokens.input_ids.shape[1]
    # The last prompt token predicts the first response token.
    ends = (tokens.logit_positions[:, 0] % length + 1).tolist()
    return [(row_id, tokens.input_ids[row, : ends[row]].tolist()) for row, row_id in enumerate(batch.row_ids.tolist())]


def stack_rows(rows: Sequence[tuple[int, Any]], *, collate: Callable[..., Any]) -> Any:
    """The batch of ``(row id, item)``."""
    row_ids, items = zip(*rows, strict=True)
    return collate(items, row_ids)
