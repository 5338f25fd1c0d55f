"""Sampled responses: their distribution, their end, their seed."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_isdpo.data.collation import collate_completions, collate_prompts
from lit_isdpo.policy.generation import sample_responses
from lit_isdpo.policy.logprob_model import LogProbModel

OPTIONS = {"eos_token_ids": [2], "pad_token_id": 0}


def test_samples_follow_the_models_distribution(tiny_llama: PreTrainedModel) -> None:
    """Frequencies of 20,000 first tokens, behind a padded prompt, against the model's probabilities."""
    number = 20_000
    prompts = collate_prompts([[1, 5]] * number + [[1, 5, 6, 7]], pad_token_id=0)
    responses = sample_responses(tiny_llama, prompts, max_new_tokens=1, seed=0, **OPTIONS)[:number]
    counts = torch.bincount(torch.tensor([response.token_ids[0] for response in responses]), minlength=50)
    with torch.no_grad():
        logps = LogProbModel(tiny_llama)(
            collate_completions([[1, 5]] * 50, [[t] for t in range(50)], pad_token_id=0)
        ).logps
    probability = logps.exp()
    spread = (probability * (1 - probability) / number).sqrt()
    assert ((counts / number - probability).abs() < 4.5 * spread).all()


def test_a_response_ends_with_eos_or_is_unfinished(tiny_llama: PreTrainedModel) -> None:
    prompts = collate_prompts([[1, 5]] * 200, pad_token_id=0)
    responses = sample_responses(tiny_llama, prompts, max_new_tokens=20, seed=0, **OPTIONS)
    assert {response.finished for response in responses} == {True, False}
    for response in responses:
        assert response.finished == (response.token_ids[-1] == 2)
        assert 2 not in response.token_ids[:-1]
        assert response.finished or len(response.token_ids) == 20


def test_a_function_of_the_seed_that_leaves_the_global_state(tiny_llama: PreTrainedModel) -> None:
    prompts = collate_prompts([[1, 5]] * 10, pad_token_id=0)
    state = torch.get_rng_state()
    first, again, other = (
        sample_responses(tiny_llama, prompts, max_new_tokens=5, seed=seed, **OPTIONS) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_what_is_sampled_in_bfloat16_has_the_logits_that_are_scored(
    tiny_llama: PreTrainedModel, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    """Sums of the head are fp32 in both; the model's own would be rounded to 8 bits."""
    tiny_llama.to(dtype)
    policy = LogProbModel(tiny_llama, compute_dtype=compute_dtype)
    seen = []

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        seen.append(tiny_llama(input_ids=input_ids).logits)
        return input_ids

    prompts = collate_prompts([[1, 5, 7]], pad_token_id=0)
    options = {"max_new_tokens": 1, "seed": 0, "compute_dtype": compute_dtype, **OPTIONS}
    sample_responses(tiny_llama, prompts, generate=generate, **options)
    tokens = collate_completions([[1]], [[5, 7]], pad_token_id=0)
    torch.testing.assert_close(seen[0][0, :2], policy.completion_logits(tokens), atol=1e-5, rtol=1e-5)
    assert seen[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny_llama(input_ids=prompts.input_ids).logits.dtype == torch.bfloat16, "the hook is gone"
