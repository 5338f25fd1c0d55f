"""Responses to many prompts: batches of like length, whatever order the caller has them in."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lit_isdpo.data.collation import collate_prompts
from lit_isdpo.policy.generation import sample_responses
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError, PromptBatch, Response


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ``predict`` samples responses; the probe's KL has its own, fixed at temperature 1 and top-p 1.

    Args:
        num_responses: to each row's prompt, drawn independently; rows with the same prompt get their own.
        max_new_tokens: longer responses are cut.
        temperature: divides the logits, above 0.
        top_p: nucleus, above 0 and at most 1.
        seed: the responses are a function of it, the weights and the batch size.
    """

    num_responses: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_responses < 1:
            raise InputError(f"sampling.num_responses must be at least 1, not {self.num_responses}.")
        if self.max_new_tokens < 1:
            raise InputError(f"sampling.max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise InputError(f"sampling.temperature must be above 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 10**9:
            raise InputError(f"sampling.seed must be at least 0 and less than 10^9, not {self.seed}.")


def sample_many(
    policy: LogProbModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_responses: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    apart: bool = False,
) -> list[list[Response]]:
    """Draws ``num_responses`` to each of P prompts, in the numerics that the policy is scored in.

    Args:
        policy: the model that is sampled.
        prompts: token ids of P prompts.
        num_responses: to each prompt, drawn independently.
        max_new_tokens: longer responses are cut.
        eos_token_ids: each ends a response.
        pad_token_id: padding.
        batch_size: responses sampled at a time.
        seed: the responses are a function of it, the weights and ``batch_size``.
        temperature: divides the logits.
        top_p: nucleus.
        apart: whether ranks that share the weights ask for different prompts, as many each; else all ask the same.

    Returns:
        P lists.

    Raises:
        InputError: the model cannot be sampled, or not by ranks that share its weights and have prompts of their own.
    """
    device, way = policy.device, policy.how_to_sample
    if apart and policy.is_sharded and not way.is_padded:  # ranks would make different numbers of calls
        raise InputError(
            f"trainer.strategy: {type(policy.model).__name__} is sampled in batches of equally long prompts, which a "
            "sharded model cannot do in training; use 'ddp' or one device."
        )
    responses: list[list[Response]] = [[] for _ in prompts]
    # Prompts of like length share a batch, so that little is padding.
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    order = [row for row in by_length for _ in range(num_responses)]
    groups = [order] if way.is_padded else [list(rows) for _, rows in groupby(order, lambda row: len(prompts[row]))]
    batches = [rows[start : start + batch_size] for rows in groups for start in range(0, len(rows), batch_size)]
    for number, rows in enumerate(batches):
        batch = collate_prompts([prompts[row] for row in rows], pad_token_id=pad_token_id)
        drawn = sample_responses(
            policy.model,
            PromptBatch(*(field.to(device) for field in batch)),
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            temperature=temperature,
            top_p=top_p,
            seed=seed * 100_003 + number,
            num_tokens=policy.num_tokens,
            compute_dtype=policy.compute_dtype,
            use_cache=way.is_cached,
            generate=policy.generate_apart if apart else policy.generate,
        )
        for row, response in zip(rows, drawn, strict=True):
            responses[row].append(response)
    return responses
