"""Log-probs against the model's own logits, on many architectures and layouts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_isdpo.data.collation import collate_completions, collate_pairs
from lit_isdpo.policy.loading import PolicyConfig, as_one_function
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference
from lit_isdpo.types import InputError, TokenizedPair

PROMPTS = [[1, 5, 7], [1], [1, 9, 4, 4, 8]]
COMPLETIONS = [[6, 2], [7, 8, 9, 2], [3]]

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 2}
SMALL |= {"bos_token_id": 1, "pad_token_id": 0}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "gemma": GATED,
    "gemma3_text": {**GATED, "final_logit_softcapping": 5.0},  # caps its logits
    "cohere": GATED,  # scales its logits
    "granite": {**GATED, "logits_scaling": 3.0},  # divides its logits
    "phi3": {**GATED, "resid_pdrop": 0.0},
    "gpt_neox": {**SMALL, "intermediate_size": 32},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 8},
}


def direct_logps(model: PreTrainedModel) -> tuple[list[float], list[list[float]]]:
    """One sequence at a time, unpadded, from the full logits."""
    sums, per_token = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].double().log_softmax(-1)
        values = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
        sums.append(sum(values))
        per_token.append(values)
    return sums, per_token


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_equals_the_models_own_logits(architecture: str) -> None:
    torch.manual_seed(0)
    config = as_one_function(CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture]), PolicyConfig())
    model = AutoModelForCausalLM.from_config(config).eval()
    out = LogProbModel(model)(collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0))
    sums, per_token = direct_logps(model)
    torch.testing.assert_close(out.logps, torch.tensor(sums), atol=2e-5, rtol=1e-5)
    assert out.num_tokens.tolist() == [2, 4, 1]
    for row, values in enumerate(per_token):
        torch.testing.assert_close(out.per_token_logps[row, : len(values)], torch.tensor(values), atol=2e-5, rtol=1e-5)
        assert not out.per_token_logps[row, len(values) :].any()


def test_chunks_and_recomputation_change_nothing(tiny_llama: PreTrainedModel) -> None:
    tokens = collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0)
    results = []
    for chunk_size in (1, 3, 1000):
        tiny_llama.zero_grad()
        out = LogProbModel(tiny_llama, chunk_size=chunk_size)(tokens)
        (out.logps * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        results.append((out.logps.detach(), [p.grad.clone() for p in tiny_llama.parameters() if p.grad is not None]))
    for logps, gradients in results[:-1]:
        torch.testing.assert_close(logps, results[-1][0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients, results[-1][1], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_padding_and_batch_order_change_nothing(tiny_llama: PreTrainedModel) -> None:
    model = LogProbModel(tiny_llama)
    together = model(collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0)).logps
    other_padding = model(collate_completions(PROMPTS, COMPLETIONS, pad_token_id=33)).logps
    backwards = model(collate_completions(PROMPTS[::-1], COMPLETIONS[::-1], pad_token_id=0)).logps
    alone = [
        model(collate_completions([p], [c], pad_token_id=0)).logps for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert torch.equal(together, other_padding)
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_probabilities_of_all_responses_sum_to_one(tiny_llama: PreTrainedModel) -> None:
    """Every response is EOS now, or one of 49 tokens and then any of 50: the completions of two tokens or fewer."""
    completions = [[2]] + [[first, second] for first in range(50) if first != 2 for second in range(50)]
    out = LogProbModel(tiny_llama)(collate_completions([[1, 5]] * len(completions), completions, pad_token_id=0))
    assert out.logps.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_gradient_reaches_the_policy_and_not_the_reference(tiny_llama: PreTrainedModel) -> None:
    batch = collate_pairs([TokenizedPair([1, 5], [6, 2], [7, 2])], [0], pad_token_id=0)
    reference = ResidentReference(LogProbModel(tiny_llama))
    assert not reference.logps(batch, "train").requires_grad
    assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_the_reference_moves_when_told(tiny_llama: PreTrainedModel) -> None:
    """Nobody else moves it: it is no submodule of anything."""
    reference = ResidentReference(LogProbModel(tiny_llama)).to(torch.device("meta"))
    assert {parameter.device.type for parameter in reference.model.parameters()} == {"meta"}


def test_bfloat16_compute_keeps_fp32_weights_and_logps(tiny_llama: PreTrainedModel) -> None:
    tokens = collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0)
    exact = LogProbModel(tiny_llama)(tokens).logps
    rounded = LogProbModel(tiny_llama, compute_dtype=torch.bfloat16)(tokens).logps
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.02)


def test_an_unknown_change_of_the_logits_is_refused(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.lm_head.register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(InputError, match="changes its logits"):
        LogProbModel(tiny_llama)


def test_a_model_that_sees_what_comes_is_refused() -> None:
    """Its log-probs would be no language model's, and padding on the right would change them."""
    config = CONFIG_MAPPING["bert-generation"](**SMALL, intermediate_size=32, is_decoder=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="BertGenerationDecoder is not causal"):
        LogProbModel(model)
    model.config.is_decoder = True
