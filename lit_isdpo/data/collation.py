"""Token ids in, padded tensors out: the only place that pads.

A pair travels as two rows of the plain layout, ``[prompt | chosen]`` and ``[prompt | rejected]``, all chosen first.
For two pairs with prompt ``[1, 5]`` / ``[1]`` and responses ``[6, 2]``, ``[7, 8, 2]`` / ``[9, 2]``, ``[2]``:

    input_ids            completion_ids   logit_positions
    [1, 5, 6, 2, 0]      [6, 2, 0]        [ 1,  2, 0]      pair 0, chosen
    [1, 9, 2, 0, 0]      [9, 2, 0]        [ 5,  6, 0]      pair 1, chosen
    [1, 5, 7, 8, 2]      [7, 8, 2]        [11, 12, 13]     pair 0, rejected
    [1, 2, 0, 0, 0]      [2, 0, 0]        [15,  0, 0]      pair 1, rejected

The first response token is predicted at the prompt's last position, so a prompt has at least one token.
"""

import math
from collections.abc import Sequence

import torch

from lit_isdpo.types import (
    PreferenceBatch,
    PromptBatch,
    SFTBatch,
    TokenBatch,
    TokenizedExample,
    TokenizedPair,
)


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
    num_rows = len(prompts)
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    width = max(len(c) for c in completions)
    input_ids = torch.full((num_rows, length), pad_token_id)
    attention_mask = torch.zeros(num_rows, length, dtype=torch.bool)
    completion_ids = torch.zeros(num_rows, width, dtype=torch.long)
    completion_mask = torch.zeros(num_rows, width, dtype=torch.bool)
    logit_positions = torch.zeros(num_rows, width, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert prompt, "the first completion token is predicted at the prompt's last position"
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :start] = torch.tensor(prompt)
        input_ids[row, start:end] = torch.tensor(completion, dtype=torch.long)
        attention_mask[row, :end] = True
        completion_ids[row, : len(completion)] = input_ids[row, start:end]
        completion_mask[row, : len(completion)] = True
        first = row * length + start - 1
        logit_positions[row, : len(completion)] = torch.arange(first, first + len(completion))
    position_ids = torch.arange(length).expand(num_rows, length).contiguous()
    return TokenBatch(input_ids, attention_mask, position_ids, completion_ids, completion_mask, logit_positions)


def collate_pairs(pairs: Sequence[TokenizedPair], row_ids: Sequence[int], *, pad_token_id: int) -> PreferenceBatch:
    """Stacks B pairs as ``[chosen; rejected]``.

    A response whose behavior log-prob is not known gets NaN.
    """
    tokens = collate_completions(
        [pair.prompt_ids for pair in pairs] * 2,
        [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs],
        pad_token_id=pad_token_id,
    )
    behavior = [pair.chosen_behavior_logps for pair in pairs] + [pair.rejected_behavior_logps for pair in pairs]
    behavior_logps = torch.tensor([math.nan if logps is None else logps for logps in behavior])
    pair_weights = torch.tensor([pair.weight for pair in pairs], dtype=torch.float32)
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float32)
    return PreferenceBatch(tokens, behavior_logps, pair_weights, margins, torch.tensor(row_ids))


def collate_examples(examples: Sequence[TokenizedExample], row_ids: Sequence[int], *, pad_token_id: int) -> SFTBatch:
    """Pads S demonstrations."""
    tokens = collate_completions(
        [example.prompt_ids for example in examples],
        [example.completion_ids for example in examples],
        pad_token_id=pad_token_id,
    )
    return SFTBatch(tokens, torch.tensor(row_ids))


def collate_prompts(prompts: Sequence[Sequence[int]], *, pad_token_id: int) -> PromptBatch:
    """Pads P prompts on the left, where generation wants it.

    >>> collate_prompts([[1, 5], [1]], pad_token_id=0).input_ids.tolist()
    [[1, 5], [0, 1]]
    """
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_token_id)
    attention_mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = True
    return PromptBatch(input_ids, attention_mask)


def batch_prompts(batch: PreferenceBatch | SFTBatch) -> list[tuple[int, list[int]]]:
    """Row id and prompt token ids of each row of a padded batch, padding and responses left out."""
    tokens, length = batch.tokens, batch.tokens.input_ids.shape[1]
    ends = (
        tokens.logit_positions[:, 0] % length + 1
    ).tolist()  # the last prompt token predicts the first response token
    return [(row_id, tokens.input_ids[row, : ends[row]].tolist()) for row, row_id in enumerate(batch.row_ids.tolist())]
