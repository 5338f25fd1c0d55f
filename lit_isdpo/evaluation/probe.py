"""What the policy would say now: sampled responses, their KL to the reference, their reward and win rate.

A log-ratio averaged over the data set is not a KL: the data is not the policy's. So the probe draws its own responses,
at temperature 1 and top-p 1, the only setting in which the estimators are unbiased.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_isdpo.data.collation import collate_completions, collate_prompts
from lit_isdpo.objective.metrics import Estimate, kl_values, token_kl
from lit_isdpo.policy.generation import sample_responses
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import Response

LOGITS_BUDGET = 2**26  # values of a batch's logits for the exact next-token KL: 0.25 GiB in fp32, some six times over


class Reward(Protocol):
    """Scores responses; the lab's gold reward is one."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> Sequence[float]:
        """One number a response, higher is better; ``finished`` is false where the token limit cut a response."""
        ...


class SampledText(NamedTuple):
    """A response to read."""

    prompt: str
    response: str
    finished: bool
    reward: float | None


class ProbeValues(NamedTuple):
    """Per-response values of P sampled responses; average them over ranks before you average over responses.

    Attributes:
        kl: ``(P, 3)`` Rao-Blackwell, k1 and k3 in nats; ``None`` without a reference.
        num_tokens: ``(P,)`` response length, EOS included.
        finished: ``(P,)`` 1 where the response ended by itself.
        rewards: ``(P,)``; ``None`` without a reward.
        texts: the P prompts and responses.
    """

    kl: Tensor | None
    num_tokens: Tensor
    finished: Tensor
    rewards: Tensor | None
    texts: list[SampledText]


def run_probe(
    policy: LogProbModel,
    reference: Reference | None,
    prompts: Sequence[Sequence[int]],
    *,
    prompt_texts: Sequence[str],
    decode: Callable[[list[int]], str],
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    reward: Reward | None = None,
) -> ProbeValues:
    """Samples one response a prompt from ``policy`` and measures it.

    Args:
        policy: the model that is sampled.
        reference: what the KL is taken to; ``None`` skips the KL.
        prompts: token ids of P prompts.
        prompt_texts: the same as text, for the reward.
        decode: token ids to text, special tokens left out.
        eos_token_ids: each ends a response.
        pad_token_id: padding.
        max_new_tokens: longer responses are cut; KL is then that of the cut responses.
        batch_size: prompts sampled at a time.
        seed: the responses are a function of it.
        reward: scores the responses.
    """
    device = policy.model.device
    responses: list[Response] = []
    # Prompts of like length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        batch = collate_prompts([prompts[row] for row in rows], pad_token_id=pad_token_id)
        responses += sample_responses(
            policy.model,
            type(batch)(*(field.to(device) for field in batch)),
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            seed=seed * 100_003 + number,
            compute_dtype=policy.compute_dtype,
        )
    ids = [prompts[row] for row in order]
    kl = None if reference is None else sampled_kl(policy, reference, ids, responses, pad_token_id=pad_token_id)
    texts = [decode(response.token_ids) for response in responses]
    finished = [response.finished for response in responses]
    shown = [prompt_texts[row] for row in order]
    rewards = None if reward is None else list(reward(shown, texts, finished))
    back = sorted(range(len(order)), key=order.__getitem__)  # from the order of lengths to the caller's
    return ProbeValues(
        kl=None if kl is None else kl[back],
        num_tokens=torch.tensor([len(responses[i].token_ids) for i in back], dtype=torch.float32),
        finished=torch.tensor([finished[i] for i in back], dtype=torch.float32),
        rewards=None if rewards is None else torch.tensor([rewards[i] for i in back]),
        texts=[SampledText(shown[i], texts[i], finished[i], None if rewards is None else rewards[i]) for i in back],
    )


@torch.no_grad()
def sampled_kl(
    policy: LogProbModel,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    *,
    pad_token_id: int,
) -> Tensor:
    """KL(policy || reference) estimated on each of P responses that the policy sampled, ``(P, 3)``, in nats.

    The columns are the fields of :class:`~lit_isdpo.objective.metrics.KLValues`.
    """
    longest = max(len(response.token_ids) for response in responses)
    rows_at_a_time = max(1, LOGITS_BUDGET // (policy.vocabulary_size * longest))
    values = []
    for start in range(0, len(prompts), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        tokens = collate_completions(
            prompts[rows], [response.token_ids for response in responses[rows]], pad_token_id=pad_token_id
        )
        tokens = type(tokens)(*(field.to(policy.model.device) for field in tokens))
        logits = policy.completion_logits(tokens)  # (N, V)
        with reference.scoring() as model:
            ref_logits = model.completion_logits(tokens)  # (N, V)
        logps, ref_logps = logits.log_softmax(dim=1), ref_logits.log_softmax(dim=1)
        targets = tokens.completion_ids[tokens.completion_mask][:, None]  # (N, 1)
        token_logratios = (logps.gather(1, targets) - ref_logps.gather(1, targets))[:, 0]
        per_token = torch.zeros_like(tokens.completion_mask, dtype=torch.float32)
        logratios = per_token.masked_scatter(tokens.completion_mask, token_logratios).sum(dim=1)
        estimates = kl_values(logratios, token_kl(logps, ref_logps), tokens.completion_mask)
        values.append(torch.stack(estimates, dim=1).cpu())
    return torch.cat(values)


def summarize(values: ProbeValues, ref_rewards: Tensor | None) -> dict[str, float]:
    """Log keys of P responses, without the stage prefix.

    Args:
        values: of all ranks.
        ref_rewards: ``(P,)`` rewards of the reference's responses to the same prompts; ties count one half.
    """
    keys = {
        "response_length": values.num_tokens.mean().item(),
        "finished_fraction": values.finished.mean().item(),
    }
    if values.kl is not None:
        for name, column in zip(("rao_blackwell", "k1", "k3"), values.kl.T, strict=True):
            estimate = Estimate.of(column)
            keys[f"kl/{name}"] = estimate.mean.item()
            keys[f"kl/{name}_stderr"] = estimate.stderr.item()
    if values.rewards is not None:
        gold = Estimate.of(values.rewards)
        keys["gold_reward"] = gold.mean.item()
        keys["gold_reward_stderr"] = gold.stderr.item()
        if ref_rewards is not None:
            wins = (values.rewards > ref_rewards).float() + (values.rewards == ref_rewards).float() / 2
            win_rate = Estimate.of(wins)
            keys["win_rate"] = win_rate.mean.item()
            keys["win_rate_stderr"] = win_rate.stderr.item()
    return keys
