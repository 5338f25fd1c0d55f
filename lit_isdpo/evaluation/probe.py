"""What the policy would say now: sampled responses, their KL to the reference, their reward and win rate.

The probe draws its own responses at temperature 1 and top-p 1, the only setting in which the KL's estimators are
unbiased. Prompts are its sample: standard errors are those of the mean over prompts of each prompt's mean.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_isdpo.evaluation.kl import ESTIMATORS, sampled_kl
from lit_isdpo.evaluation.rewards import Reward, score
from lit_isdpo.evaluation.sampling import sample_many
from lit_isdpo.evaluation.statistics import win_scores
from lit_isdpo.objective.metrics import Estimate
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import Prompt


class SampledText(NamedTuple):
    """A response to read."""

    prompt: str
    response: str
    finished: bool
    reward: float | None


class ProbeValues(NamedTuple):
    """Values of n sampled responses to each of P prompts.

    Attributes:
        kl: ``(P, n, 3)`` Rao-Blackwell, k1 and k3 in nats; ``None`` without a reference.
        num_tokens: ``(P, n)`` response length, EOS included.
        finished: ``(P, n)`` 1 where the response ended by itself.
        rewards: ``(P, n)`` gold rewards; ``None`` where none is known.
        proxy_rewards: ``(P, n)`` of the reward that the policy is trained on; ``None`` where it is trained on none.
        texts: the prompts, each with its first response.
    """

    kl: Tensor | None
    num_tokens: Tensor
    finished: Tensor
    rewards: Tensor | None
    proxy_rewards: Tensor | None
    texts: list[SampledText]


def run_probe(
    policy: LogProbModel,
    reference: Reference | None,
    prompts: Sequence[Sequence[int]],
    *,
    prompt_texts: Sequence[str],
    sources: Sequence[Prompt] | None = None,
    decode: Callable[[list[int]], str],
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    num_responses: int = 1,
    reward: Reward | None = None,
    proxy: Reward | None = None,
) -> ProbeValues:
    """Samples responses from ``policy`` and measures them.

    Args:
        policy: the model that is sampled.
        reference: what the KL is taken to; ``None`` skips the KL.
        prompts: token ids of P prompts.
        prompt_texts: the same as text.
        sources: the same as the data has them, for the reward. Default: ``prompt_texts``.
        decode: token ids to text, special tokens left out.
        eos_token_ids: each ends a response.
        pad_token_id: padding.
        max_new_tokens: longer responses are cut; KL is then that of the cut responses.
        batch_size: responses sampled at a time.
        seed: the responses are a function of it.
        num_responses: to each prompt.
        reward: scores the responses: the gold reward, where it is known.
        proxy: likewise: what the policy is trained on.
    """
    drawn = sample_many(
        policy,
        prompts,
        num_responses=num_responses,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        batch_size=batch_size,
        seed=seed,
    )
    shape = (len(prompts), num_responses)
    # Flat, responses of like prompt length side by side, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    rows = [row for row in order for _ in range(num_responses)]
    back = torch.tensor(order).argsort()
    responses = [response for row in order for response in drawn[row]]

    def shaped(values: Tensor) -> Tensor:
        in_order: Tensor = values.unflatten(0, shape)[back]
        return in_order

    kl = None
    if reference is not None:
        kl = sampled_kl(policy, reference, [prompts[row] for row in rows], responses, pad_token_id=pad_token_id)
    texts = [decode(response.token_ids) for response in responses]
    finished = [response.finished for response in responses]
    asked = [(sources or prompt_texts)[row] for row in rows]
    rewards, proxy_rewards = (
        None if source is None else torch.tensor(score(source, asked, texts, finished, option="model.reward"))
        for source in (reward, proxy)
    )
    first = [int(place) * num_responses for place in back]  # of each prompt's responses, in the flat order
    return ProbeValues(
        kl=None if kl is None else shaped(kl),
        num_tokens=shaped(torch.tensor([len(response.token_ids) for response in responses], dtype=torch.float32)),
        finished=shaped(torch.tensor(finished, dtype=torch.float32)),
        rewards=None if rewards is None else shaped(rewards),
        proxy_rewards=None if proxy_rewards is None else shaped(proxy_rewards),
        texts=[
            SampledText(prompt, texts[i], finished[i], None if rewards is None else rewards[i].item())
            for prompt, i in zip(prompt_texts, first, strict=True)
        ],
    )


def summarize(values: ProbeValues, ref_rewards: Tensor | None) -> dict[str, float]:
    """Log keys of n responses to each of P prompts, without the stage prefix.

    Args:
        values: of all ranks.
        ref_rewards: ``(P, m)`` rewards of the reference's responses to the same prompts. A response's win is the share
            of them that it beats; ties count one half.
    """
    keys = {
        "response_length": values.num_tokens.mean().item(),
        "finished_fraction": values.finished.mean().item(),
    }
    estimates = {}
    if values.kl is not None:
        for name, column in zip(ESTIMATORS, values.kl.unbind(dim=2), strict=True):
            estimates[f"kl/{name}"] = column
    if values.rewards is not None:
        estimates["gold_reward"] = values.rewards
        if ref_rewards is not None:
            estimates["win_rate"] = win_scores(values.rewards, ref_rewards)
    if values.proxy_rewards is not None:
        estimates["reward"] = values.proxy_rewards
    for key, per_response in estimates.items():
        estimate = Estimate.of(per_response.mean(dim=1))
        keys[key] = estimate.mean.item()
        keys[f"{key}_stderr"] = estimate.stderr.item()
    return keys
