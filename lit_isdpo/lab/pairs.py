"""Preference pairs: two samples of the reference for each post, with their log-probs, labelled by the gold reward."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_isdpo.data.collation import collate_completions, collate_prompts
from lit_isdpo.lab.posts import MAX_NEW_TOKENS, Split, first_wins, gold_reward, render_prompt, sample_post
from lit_isdpo.policy.generation import sample_responses
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import Response

_BATCH_SIZE = 512  # responses generated, or scored, at a time


class PairRow(TypedDict):
    """A row of a file of pairs. Log-probs are of the reference that wrote the responses: nats, summed, EOS included."""

    prompt: str
    chosen: str
    rejected: str
    chosen_behavior_logps: float
    rejected_behavior_logps: float
    chosen_gold: float
    rejected_gold: float


def sample_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, split: Split, num_prompts: int, seed: int
) -> tuple[list[PairRow], dict[str, int]]:
    """Draws posts of the split, and for each a pair: two samples of the model at temperature 1, labelled.

    Not every post gives a pair. What is left out, and counted under the first of these that applies: ``unfinished``, a
    response without EOS; ``not_round_tripping``, a response whose text is tokenized to other ids than were sampled, so
    that its log-probs would not be those of the text; ``identical``, two equal responses.

    Args:
        model: the reference.
        tokenizer: the reference's.
        split: where the posts come from.
        num_prompts: posts drawn, one pair each at most.
        seed: the rows are a function of it, given the model and the machine's arithmetic.

    Returns:
        The rows in the order of drawing, and the counts: ``prompts``, ``pairs`` and the three above.
    """
    rng = Random(f"posts/pairs/{split}/{seed}")
    prompts = [render_prompt(sample_post(rng, split)) for _ in range(num_prompts)]
    prompt_ids: list[list[int]] = [tokenizer.encode(prompt) for prompt in prompts]
    first, second = (_sample(model, tokenizer, prompt_ids, rng) for _ in range(2))

    counts = Counter(prompts=num_prompts, pairs=0, unfinished=0, not_round_tripping=0, identical=0)
    kept: list[int] = []
    for index, pair in enumerate(zip(first, second, strict=True)):
        outcome = _outcome(tokenizer, pair)
        counts[outcome] += 1
        if outcome == "pairs":
            kept.append(index)

    logps = _score(model, tokenizer, [prompt_ids[i] for i in kept] * 2, [r[i] for r in (first, second) for i in kept])
    rows = []
    for index, *pair_logps in zip(kept, logps[: len(kept)], logps[len(kept) :], strict=True):
        texts = [_text(tokenizer, responses[index]) for responses in (first, second)]
        golds = [gold_reward(prompts[index], text, finished=True) for text in texts]
        chosen = 0 if first_wins(rng, *golds) else 1
        rejected = 1 - chosen
        rows.append(
            PairRow(
                prompt=prompts[index],
                chosen=texts[chosen],
                rejected=texts[rejected],
                chosen_behavior_logps=pair_logps[chosen],
                rejected_behavior_logps=pair_logps[rejected],
                chosen_gold=golds[chosen],
                rejected_gold=golds[rejected],
            )
        )
    return rows, dict(counts)


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[list[int]], rng: Random
) -> list[Response]:
    responses: list[Response] = []
    for start in range(0, len(prompt_ids), _BATCH_SIZE):
        responses += sample_responses(
            model,
            collate_prompts(prompt_ids[start : start + _BATCH_SIZE], pad_token_id=tokenizer.pad_token_id),
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_ids=[tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            seed=rng.getrandbits(32),
        )
    return responses


@torch.no_grad()
def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    responses: Sequence[Response],
) -> list[float]:
    """Log-probs of the responses; not those of generation, whose arithmetic differs from a training step's."""
    scorer = LogProbModel(model)
    logps: list[float] = []
    for start in range(0, len(responses), _BATCH_SIZE):
        rows = slice(start, start + _BATCH_SIZE)
        completions = [response.token_ids for response in responses[rows]]
        tokens = collate_completions(prompt_ids[rows], completions, pad_token_id=tokenizer.pad_token_id)
        logps += scorer(tokens).logps.tolist()
    return logps


def _outcome(tokenizer: PreTrainedTokenizerBase, pair: tuple[Response, Response]) -> str:
    """What becomes of a pair: the name of its count."""
    if not all(response.finished for response in pair):
        return "unfinished"
    if not all(_round_trips(tokenizer, response) for response in pair):
        return "not_round_tripping"
    return "identical" if pair[0].token_ids == pair[1].token_ids else "pairs"


def _round_trips(tokenizer: PreTrainedTokenizerBase, response: Response) -> bool:
    ids = tokenizer.encode(_text(tokenizer, response), add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id] == response.token_ids


def _text(tokenizer: PreTrainedTokenizerBase, response: Response) -> str:
    text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
