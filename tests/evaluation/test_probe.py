"""Several responses a prompt: whose they are, and what the standard error is over."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from lit_isdpo.evaluation.probe import ProbeValues, run_probe, summarize
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference

PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 9, 10], [1, 11]]


def probe(
    policy: LogProbModel, num_responses: int, batch_size: int = 3, number: type[int] | type[float] = float
) -> ProbeValues:
    return run_probe(
        policy,
        ResidentReference(policy),
        PROMPTS,
        prompt_texts=[str(prompt) for prompt in PROMPTS],
        decode=str,
        eos_token_ids=[2],
        pad_token_id=0,
        max_new_tokens=6,
        batch_size=batch_size,
        seed=0,
        num_responses=num_responses,
        reward=lambda prompts, responses, finished: [number(prompt.strip("[]").split()[-1]) for prompt in prompts],
    )


def test_every_prompt_gets_its_responses_in_the_callers_order(tiny_llama: PreTrainedModel) -> None:
    values = probe(LogProbModel(tiny_llama), 5)
    assert values.kl is not None
    assert values.kl.shape == (4, 5, 3)
    assert values.num_tokens.shape == values.finished.shape == (4, 5)
    assert values.rewards is not None
    assert values.rewards.tolist() == [[prompt[-1]] * 5 for prompt in PROMPTS]
    assert [text.prompt for text in values.texts] == [str(prompt) for prompt in PROMPTS]
    assert values.num_tokens.std(dim=1).max() > 0, "the responses to a prompt are drawn independently"


def test_a_reward_may_give_whole_numbers(tiny_llama: PreTrainedModel) -> None:
    """Lengths and counts are such; their means are not."""
    of_int, of_float = (summarize(probe(LogProbModel(tiny_llama), 2, number=number), None) for number in (int, float))
    assert of_int == of_float


def test_prompts_are_the_sample() -> None:
    """Two prompts with means 1 and 2: the standard error is theirs, sqrt(1/2) / sqrt(2) = 1/2, however many responses.

    The first prompt's rewards 0 and 2 against the reference's 1 and 1: a loss and a win; the second's 2 and 2 against
    2 and 3: a tie and a loss each, a quarter.
    """
    values = ProbeValues(
        kl=torch.tensor([[0.0, 2.0], [1.0, 3.0]])[:, :, None].expand(2, 2, 3),
        num_tokens=torch.ones(2, 2),
        finished=torch.ones(2, 2),
        rewards=torch.tensor([[0.0, 2.0], [2.0, 2.0]]),
        proxy_rewards=torch.tensor([[4.0, 4.0], [6.0, 8.0]]),
        texts=[],
    )
    keys = summarize(values, torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    assert keys["reward"] == 5.5, "what is trained on, beside the gold reward"
    assert keys["kl/rao_blackwell"] == keys["gold_reward"] == 1.5
    assert keys["kl/k3_stderr"] == keys["gold_reward_stderr"] == pytest.approx(0.5)
    assert keys["win_rate"] == 0.375
    assert keys["win_rate_stderr"] == pytest.approx(math.sqrt(0.25**2 / 2) / math.sqrt(2))
