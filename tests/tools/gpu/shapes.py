"""Models with random weights and rows of random tokens. Speed and numerics do not need trained ones."""

import math
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import PreferenceBatch, TokenizedPair
from tests.tools.benchmarks.workload import ModelSize

TINY = ModelSize(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, vocabulary=4096
)  # of a CPU
MODELS = {
    "34m": ModelSize(
        hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=4, vocabulary=16_384
    ),
    "135m": ModelSize(  # SmolLM2-135M
        hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, vocabulary=49_152
    ),
    "1b": ModelSize(  # Llama-3.2-1B
        hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, vocabulary=128_256
    ),
    "3b": ModelSize(  # Llama-3.2-3B
        hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, num_kv_heads=8, vocabulary=128_256
    ),
    "8b": ModelSize(  # Llama-3.1-8B
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        vocabulary=128_256,
        tied=False,
    ),
}


def drawn_model(
    size: ModelSize, device: str, *, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype = torch.float32
) -> LogProbModel:
    """Draws the same weights at every call. They are larger than a fresh model's, so that attention matters."""
    config = size.config
    config.initializer_range = 1.5 / math.sqrt(size.hidden_size)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
    return LogProbModel(model, compute_dtype=compute_dtype)


def drawn_pairs(number: int, prompts: Sequence[int], responses: Sequence[int], vocabulary: int) -> list[TokenizedPair]:
    """Draws the same pairs at every call. Lengths lie between the two given numbers, both included."""
    random = Random(0)

    def ids(lengths: Sequence[int]) -> list[int]:
        return [random.randrange(2, vocabulary) for _ in range(random.randint(*lengths))]

    return [TokenizedPair(ids(prompts), ids(responses), ids(responses)) for _ in range(number)]


def logps_and_gradient(model: LogProbModel, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of all weights of a sum in which every sequence has another factor."""
    model.zero_grad()
    logps = model(batch.tokens).logps
    (logps * torch.linspace(-1, 2, len(logps), device=logps.device)).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logps.detach(), torch.cat(gradients)
