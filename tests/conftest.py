"""What tests share: tiny models, and a quiet, single-threaded process."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A random Llama with a vocabulary of 50."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    return LlamaForCausalLM(config).eval()
