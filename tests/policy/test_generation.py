"""Sampled responses: their distribution, their end, their seed, and what a token costs."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.generation import Sampling, Vocabulary, generating, sample, seed_of
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError

VOCABULARY = Vocabulary(str, [2], 0)
BF16 = torch.bfloat16
NUM_TOKENS = 20


def test_samples_follow_the_models_distribution(tiny_llama: PreTrainedModel) -> None:
    """Frequencies of 20,000 first tokens, behind a padded prompt, against the model's probabilities."""
    number = 20_000
    policy = LogProbModel(tiny_llama)
    prompts = [[1, 5]] * number + [[1, 5, 6, 7]]
    drawn = sample(policy, prompts, Sampling(max_new_tokens=1, batch_size=number + 1), VOCABULARY)[:number]
    counts = torch.bincount(torch.tensor([response.token_ids[0] for (response,) in drawn]), minlength=50)
    with torch.no_grad():
        logps = policy(collate_completions([[1, 5]] * 50, [[t] for t in range(50)], pad_token_id=0)).logps
    probability = logps.exp()
    spread = (probability * (1 - probability) / number).sqrt()
    assert ((counts / number - probability).abs() < 4.5 * spread).all()


def test_a_response_ends_with_eos_or_is_unfinished(tiny_llama: PreTrainedModel) -> None:
    sampling = Sampling(num_responses=200, max_new_tokens=20, batch_size=200)
    (responses,) = sample(LogProbModel(tiny_llama), [[1, 5]], sampling, VOCABULARY)
    assert {response.finished for response in responses} == {True, False}
    for response in responses:
        assert response.finished == (response.token_ids[-1] == 2)
        assert 2 not in response.token_ids[:-1]
        assert response.finished or len(response.token_ids) == 20


def test_a_function_of_seed_and_place_that_leaves_the_global_state(tiny_llama: PreTrainedModel) -> None:
    policy = LogProbModel(tiny_llama)
    state = torch.get_rng_state()

    def draw(seed: int, *place: object) -> object:
        sampling = Sampling(num_responses=10, max_new_tokens=5, batch_size=4, seed=seed)
        return sample(policy, [[1, 5]], sampling, VOCABULARY, *place)

    calls = [(0,), (1,), (0, "probe", 0), (0, "probe", 1), (1, "probe", 0)]
    drawn = [draw(*call) for call in calls]
    assert [draw(*call) for call in calls] == drawn
    assert all(one != other for number, one in enumerate(drawn) for other in drawn[:number])
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_of_different_parts_are_different() -> None:
    parts = [(seed, place, rank) for seed in range(20) for place in ("policy", "reference") for rank in range(20)]
    seeds = {seed_of(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**40 for seed in seeds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_responses": 0}, "model.sampling.num_responses must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "model.sampling.max_new_tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "model.sampling.batch_size must be at least 1, not 0"),
        ({"temperature": 0.0}, "model.sampling.temperature must be above 0, not 0.0"),
        ({"temperature": float("inf")}, "model.sampling.temperature must be above 0, not inf"),
        ({"top_p": 1.5}, "model.sampling.top_p must be above 0 and at most 1, not 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(("dtype", "compute_dtype"), [(torch.float32, BF16), (BF16, torch.float32), (BF16, BF16)])
def test_what_is_sampled_in_bfloat16_has_the_logits_that_are_scored(
    tiny_llama: PreTrainedModel, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    """Sums of the head are fp32 in both; the model's own would be rounded to 8 bits."""
    tiny_llama.to(dtype)
    policy = LogProbModel(tiny_llama, compute_dtype=compute_dtype)
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad(), generating(tiny_llama, GenerationConfig(), policy.device, compute_dtype):
        seen = tiny_llama(input_ids=ids).logits
    tokens = collate_completions([[1]], [[5, 7]], pad_token_id=0)
    torch.testing.assert_close(seen[0, :2], policy.token_logits(policy.completion_states(tokens)), atol=1e-5, rtol=1e-5)
    assert seen.dtype == torch.float32
    with torch.autocast("cpu", dtype=BF16):
        assert tiny_llama(input_ids=ids).logits.dtype == BF16, "the head is the model's own again"


class Casts(TorchDispatchMode):
    """Counts casts by the shape of what is cast, and products with the head."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.shapes, self.products = tuple(head.weight.shape), list[tuple[int, ...]](), 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = function.overloadpacket.__name__
        if name == "_to_copy" and options.get("dtype", arguments[0].dtype) != arguments[0].dtype:
            self.shapes.append(tuple(arguments[0].shape))
        is_product = name in ("mm", "addmm", "linear", "matmul", "bmm")
        self.products += is_product and any(
            isinstance(value, Tensor) and tuple(value.shape) in (self.head, self.head[::-1]) for value in arguments
        )
        return function(*arguments, **options)


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    return model.requires_grad_(False)


def with_lora(model: PreTrainedModel) -> LogProbModel:
    config = parse_adapter({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    return LogProbModel(model, compute_dtype=BF16, adapter=Adapter(model, config))


def trainable(model: PreTrainedModel) -> LogProbModel:
    return LogProbModel(model, compute_dtype=BF16)


@pytest.mark.parametrize(
    "make", [trainable, lambda model: trainable(frozen(model)), with_lora], ids=["trained", "frozen", "lora"]
)
def test_a_loop_casts_each_matrix_once_and_keys_when_they_are_made(
    make: Callable[[PreTrainedModel], LogProbModel], tiny_llama: PreTrainedModel
) -> None:
    policy = make(tiny_llama)
    names = {name: p.requires_grad for name, p in policy.named_parameters()}
    assert policy.how_to_sample.is_cached
    head = cast(nn.Linear, tiny_llama.get_output_embeddings())
    sampling = Sampling(num_responses=2, max_new_tokens=NUM_TOKENS)
    with Casts(head) as casts:
        (responses,) = sample(policy, [[1, 5]], sampling, Vocabulary(str, [], 0))
    assert [len(response.token_ids) for response in responses] == [NUM_TOKENS] * 2
    matrices = [p for p in policy.parameters() if p.dim() == 2]
    of_weights = [shape for shape in casts.shapes if len(shape) == 2 and shape in {tuple(p.shape) for p in matrices}]
    assert len(of_weights) <= len(matrices), "once each, however many tokens"
    assert casts.products == NUM_TOKENS, "the head is asked once for each token"
    # (batch, heads, positions, size): what grows with the text is not cast again.
    assert max(shape[2] for shape in casts.shapes if len(shape) == 4) <= 2
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == names


def test_a_frozen_model_is_sampled_as_a_trained_one(tiny_llama: PreTrainedModel) -> None:
    """With casts kept and without: the same tokens."""
    drawn = []
    for grad in (True, False):
        policy = trainable(tiny_llama.requires_grad_(grad))
        drawn.append(sample(policy, [[1, 5], [1, 7, 8]], Sampling(num_responses=8, max_new_tokens=8), VOCABULARY))
    assert drawn[0] == drawn[1]
