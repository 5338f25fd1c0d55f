"""Families of models that differ from the others in ways that no configuration tells: they are tried, and found out."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_isdpo.policy.attention import layer_windows, why_not_shared
from lit_isdpo.policy.generation import HowToSample, Sampling, Vocabulary, how_to_sample, sample
from lit_isdpo.policy.loading import PolicyConfig, as_one_function, enable_gradient_checkpointing, with_attention
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
BART = {"vocab_size": 50, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
    "bart": {**BART, "max_position_embeddings": 64},  # positions count what is padding
    "rwkv": {**SMALL, "attention_hidden_size": 16, "intermediate_size": 32},  # a state that padding enters
    "bloom": {**SMALL, "n_layer": 2, "n_head": 2},  # no sdpa
    "mamba": {**SMALL, "state_size": 4, "intermediate_size": 32},  # no sdpa
    "gemma2": GATED,
}
UNPADDED = {"bart", "rwkv"}


def make(family: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = as_one_function(CONFIG_MAPPING[family](**FAMILIES.get(family, {}) | options), PolicyConfig())
    load = partial(AutoModelForCausalLM.from_config, config)
    model: PreTrainedModel = with_attention(load, "sdpa", "model.policy.path").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_what_is_scored(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a temperature near 0 a response is the chain of the likeliest tokens, one forward of the whole text each."""
    model = LogProbModel(make(family))
    draw, masks = model.generate, []

    def watched(**options: Any) -> Any:
        masks.append(options["attention_mask"])
        return draw(**options)

    prompts = [[5, 9, 6, 8, 11], [7], [12, 13, 14], [5, 9, 4, 8, 11, 10, 6, 3, 3]]
    with pytest.warns(UserWarning, match="equally long") if family in UNPADDED else nullcontext():
        assert model.how_to_sample.is_padded == (family not in UNPADDED)
    monkeypatch.setattr(model, "generate", watched)  # the trial has its own calls
    settings = Sampling(num_responses=2, max_new_tokens=6, temperature=1e-4, batch_size=8)
    drawn = sample(model, prompts, settings, Vocabulary(str, [2], 0))
    for prompt, responses in zip(prompts, drawn, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and expected[-1:] != [2]:
            with torch.no_grad():
                logits = model.model(torch.tensor([prompt + expected]), use_cache=False).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert [response.token_ids for response in responses] == [expected] * 2
    is_padded = not all(mask.all() for mask in masks)
    assert is_padded == (family not in UNPADDED)
    assert len(masks) == (4 if family in UNPADDED else 1)


def test_an_offset_of_all_logits_hides_nothing() -> None:
    """Logits of published models lie around -100, and bfloat16 rounds those to halves."""
    for family, is_padded in (("rwkv", False), ("llama", True)):
        for offset in (0.0, -100.0):
            model = make(family).to(torch.bfloat16)
            head = cast(nn.Linear, model.get_output_embeddings())
            head.bias = nn.Parameter(torch.full((50,), offset, dtype=torch.bfloat16))
            own = model.generation_config
            assert how_to_sample(LogProbModel(model)).is_padded == is_padded
            assert model.generation_config is own


def test_diverged_weights_say_nothing_of_the_architecture(tiny_llama: PreTrainedModel) -> None:
    model = LogProbModel(tiny_llama)
    nn.init.constant_(tiny_llama.get_input_embeddings().weight, torch.nan)
    assert how_to_sample(model) == HowToSample(is_padded=True, is_cached=True)


def test_training_mode_is_no_hindrance(tiny_llama: PreTrainedModel) -> None:
    """With gradient checkpointing a model in training mode keeps no cache."""
    enable_gradient_checkpointing(tiny_llama)
    model = LogProbModel(tiny_llama)
    model.train()
    assert how_to_sample(model) == HowToSample(is_padded=True, is_cached=True)
    assert all(module.training for module in tiny_llama.modules())


def test_a_cache_that_is_not_exact_is_left_out(tiny_llama: PreTrainedModel) -> None:
    generate: Callable[..., Any] = tiny_llama.generate

    def wrong_with_cache(**arguments: Any) -> Any:
        generated = generate(**arguments)
        if arguments["generation_config"].use_cache:
            generated.logits[-1][:] += torch.arange(50)
        return generated

    tiny_llama.generate = wrong_with_cache  # type: ignore[method-assign, assignment]
    assert how_to_sample(LogProbModel(tiny_llama)) == HowToSample(is_padded=False, is_cached=False)


def test_a_model_whose_generate_adds_tokens_is_refused() -> None:
    options = {"vocab_size": 50, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "causal": True}
    with pytest.raises(InputError, match="XLMWithLMHeadModel cannot be sampled"):
        how_to_sample(LogProbModel(make("xlm", **options)))


def test_a_model_that_cannot_be_sampled_is_refused(tiny_llama: PreTrainedModel) -> None:
    def no_generate(**_: Any) -> None:
        raise ValueError("does not generate")

    tiny_llama.generate = no_generate  # type: ignore[method-assign, assignment]
    with pytest.raises(InputError, match="LlamaForCausalLM cannot be sampled"):
        how_to_sample(LogProbModel(tiny_llama))


def test_a_window_that_the_model_ignores_is_found_out() -> None:
    options = {**GATED, "ffn_dim": 32, "sliding_window": 3000, "num_codebooks": 2}
    assert "depend on more than their mask" in str(why_not_shared(LogProbModel(make("moshi", **options))))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_window_longer_than_the_trial_is_shared(family: str) -> None:
    model = LogProbModel(make(family, **GATED, sliding_window=4096))
    assert why_not_shared(model) is None
    assert model.model.config.sliding_window == 4096


def test_a_window_that_no_position_measures_is_not_shared() -> None:
    with pytest.raises(ValueError, match="see no further than local_attention"):
        layer_windows(CONFIG_MAPPING["modernbert-decoder"](local_attention=4))


def test_an_evaluation_leaves_the_weights_as_they_are() -> None:
    model = make("rwkv", num_hidden_layers=7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LogProbModel(model)
    model(torch.tensor([[5, 6]]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _Noisy(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + torch.randn_like(inputs) if self.training else inputs)


def test_noise_that_no_option_names_is_refused(tiny_llama: PreTrainedModel) -> None:
    layer: Any = tiny_llama.model.layers[0].mlp
    layer.up_proj = _Noisy(16, 32, bias=False).eval()
    with pytest.raises(InputError, match="computes something else in training, by noise"):
        LogProbModel(tiny_llama)
    assert not any(module.training for module in tiny_llama.modules())


class _Mixing(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + inputs.mean(dim=0, keepdim=True))


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(tiny_llama: PreTrainedModel) -> None:
    layer: Any = tiny_llama.model.layers[0].mlp
    layer.up_proj = _Mixing(16, 32, bias=False).eval()
    nn.init.normal_(layer.up_proj.weight)
    with pytest.raises(InputError, match=r"computes a row from the other rows|not causal"):
        LogProbModel(tiny_llama)


def test_all_rates_of_noise_are_set_to_0() -> None:
    nested = CONFIG_MAPPING["gemma3"](text_config={"attention_dropout": 0.1}, vision_config={"attention_dropout": 0.2})
    as_one_function(nested, PolicyConfig())
    assert nested.text_config.attention_dropout == nested.vision_config.attention_dropout == 0
    assert as_one_function(CONFIG_MAPPING["phimoe"](router_jitter_noise=0.5), PolicyConfig()).router_jitter_noise == 0
