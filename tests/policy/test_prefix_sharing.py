"""One row [prompt | chosen | rejected] against two rows: log-probs and gradients, on many architectures and layouts."""

import re
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.policy import attention
from lit_isdpo.policy.attention import why_not_shared
from lit_isdpo.policy.loading import PolicyConfig, as_one_function
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import PreferenceBatch, SequenceLogps, TokenizedPair

PAIRS = [
    TokenizedPair([1, 5, 7], [6, 2], [7, 8, 9, 2]),
    TokenizedPair([1], [7, 8, 9, 2], [3]),
    TokenizedPair([1, 9, 4, 4, 8, 9, 9, 7], [3, 3, 2], [4, 2]),
]
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 2}
SMALL |= {"bos_token_id": 1, "pad_token_id": 0}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "qwen3_moe": GATED | MOE,
    "mistral": GATED,  # its window of 4096 is longer than the rows
    "mixtral": GATED | MOE,
    "gemma": GATED,
    "gemma3_text": {**GATED, "final_logit_softcapping": 5.0},
    "cohere": GATED,
    "granite": {**GATED, "logits_scaling": 3.0},
    "olmo2": GATED,
    "phi": {**SMALL, "intermediate_size": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {**GATED, "resid_pdrop": 0.0},
    "gpt_neox": {**SMALL, "intermediate_size": 32},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 8, "dropout": 0.0},
}
WINDOWED: dict[str, dict[str, Any]] = {  # three positions, shorter than the rows
    "mistral": {**GATED, "sliding_window": 3},
    "qwen2": {**GATED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "gemma3_text": {**GATED, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**GATED, "resid_pdrop": 0.0, "sliding_window": 3},
}
CASES = [*ARCHITECTURES.items(), *WINDOWED.items()]
NAMES = [*ARCHITECTURES, *(f"{name} with a window" for name in WINDOWED)]


def make(architecture: str, options: dict[str, Any]) -> LogProbModel:
    torch.manual_seed(0)
    config = as_one_function(CONFIG_MAPPING[architecture](**options), PolicyConfig())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh model's, so that attention decides something
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LogProbModel(model)


def run(model: LogProbModel, batch: PreferenceBatch) -> tuple[SequenceLogps, dict[str, Tensor]]:
    """Values, and gradients of a sum that tells all sequences apart."""
    model.zero_grad()
    out: SequenceLogps = model(batch.tokens, alignment=True)
    (out.logps * torch.linspace(-1, 2, len(out.logps))).sum().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: LogProbModel, one: PreferenceBatch, other: PreferenceBatch) -> None:
    (out, gradients), (expected, expected_gradients) = run(model, one), run(model, other)
    for value, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5 * largest, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=NAMES)
def test_shared_rows_equal_plain_rows(architecture: str, options: dict[str, Any]) -> None:
    model = make(architecture, options)
    assert why_not_shared(model) is None
    plain = collate_pairs(PAIRS, range(3), pad_token_id=0)
    assert_same(model, collate_pairs(PAIRS, range(3), pad_token_id=0, layout="shared"), plain)


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=NAMES)
def test_prompts_are_attended_to_without_a_mask(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        masks.append(args[4])
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    pairs = [pair for pair in PAIRS if len(pair.prompt_ids) >= 3]
    shared = collate_pairs(pairs, range(2), pad_token_id=0, layout="shared")
    model = make(architecture, options)
    assert why_not_shared(model) is None
    model.split_from = 3
    masks.clear()
    model(shared.tokens)
    assert [None if mask is None else mask.shape[2] for mask in masks] == [
        None,
        shared.tokens.input_ids.shape[1] - 3,
    ] * 2
    assert_same(model, shared, collate_pairs(pairs, range(2), pad_token_id=0))


def test_a_prompt_longer_than_the_window_keeps_its_mask() -> None:
    pairs = [PAIRS[2], PAIRS[2]._replace(chosen_ids=[5, 2])]
    shared = collate_pairs(pairs, range(2), pad_token_id=0, layout="shared")
    assert shared.tokens.num_prompt_positions == 8
    model = make("gemma3_text", WINDOWED["gemma3_text"])  # a layer of each kind
    assert why_not_shared(model) is None
    model.split_from = 4
    assert_same(model, shared, collate_pairs(pairs, range(2), pad_token_id=0))


@pytest.mark.parametrize(("architecture", "options"), [("llama", GATED), ("gemma3_text", WINDOWED["gemma3_text"])])
@pytest.mark.parametrize("row_budget", [1, 15, 1000])
def test_packed_rows_equal_plain_rows(architecture: str, options: dict[str, Any], row_budget: int) -> None:
    plain = collate_pairs(PAIRS, range(3), pad_token_id=0)
    packed = collate_pairs(PAIRS, range(3), pad_token_id=0, layout="shared", row_budget=row_budget)
    assert len(packed.tokens.input_ids) == {1: 3, 15: 2, 1000: 1}[row_budget]
    assert_same(make(architecture, options), packed, plain)


def test_a_response_does_not_see_the_other(tiny_llama: PreTrainedModel) -> None:
    model = LogProbModel(tiny_llama)
    other = [pair._replace(chosen_ids=[13, 14, 15, 16]) for pair in PAIRS]
    before, after = (model(collate_pairs(p, range(3), pad_token_id=0, layout="shared").tokens) for p in (PAIRS, other))
    torch.testing.assert_close(before.logps[3:], after.logps[3:])
    assert not torch.isclose(before.logps[:3], after.logps[:3]).any()


@pytest.mark.slow  # compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled, on the CPU by a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own
@torch.no_grad()
def test_flex_attention_reads_the_same_rule() -> None:
    """Forward alone: FlexAttention has no backward on the CPU."""
    model = make("gemma3_text", WINDOWED["gemma3_text"])
    batch = collate_pairs(PAIRS, range(3), pad_token_id=0, layout="shared", row_budget=15)
    expected = model(batch.tokens).logps
    model.model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(batch.tokens).logps, expected, atol=1e-4, rtol=1e-4)


UNSERVED = {  # by its kernel, by its kinds of layers, by trial
    "eager": ("llama", GATED, "eager", "^attn_implementation 'eager' does not take such masks"),
    "recurrent": ("mamba", {**SMALL, "state_size": 4}, None, "^attn_implementation 'eager' does not take such masks"),
    "hybrid": ("qwen3_next", GATED | MOE, "sdpa", "^its layers of type 'linear_attention' do more than attend"),
    "alibi": ("falcon", {**SMALL, "alibi": True}, "sdpa", "^it takes no such masks|depend on more than their mask"),
}


@pytest.mark.parametrize(("architecture", "options", "kernel", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_what_cannot_share_says_why(
    architecture: str, options: dict[str, Any], kernel: str | None, reason: str
) -> None:
    config = CONFIG_MAPPING[architecture](**options)
    model = LogProbModel(AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval())
    assert re.search(reason, why_not_shared(model) or "")
    # Their rows are plain ones, and no mask tells them of the padding on the right.
    apart = [model(collate_pairs([pair], [0], pad_token_id=0).tokens).logps for pair in PAIRS]
    together = model(collate_pairs(PAIRS, range(3), pad_token_id=0).tokens).logps
    torch.testing.assert_close(together, torch.stack(apart, dim=1).flatten(), atol=1e-5, rtol=1e-5)
