"""Models that need another attention than the default, and configurations that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_isdpo.cli import main
from lit_isdpo.lab.posts import build_tokenizer
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import outline_logprob_model
from lit_isdpo.policy.reward_model import load_score_model, load_sequence_classifier, outline_score_model
from lit_isdpo.types import InputError

GATED: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED |= {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def write(folder: Path, family: str, *, scores: bool = False, **options: Any) -> str:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**GATED | options | {"vocab_size": len(tokenizer)}, num_labels=1)
    factory = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    factory.from_config(config, attn_implementation="eager").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mamba", "bloom"])
def test_a_model_without_sdpa_gets_its_own_attention(family: str, tmp_path: Path) -> None:
    config = PolicyConfig(path=write(tmp_path, family, **MOE))
    assert load_causal_lm(config).config._attn_implementation == "eager"
    assert outline_logprob_model(config).model.config._attn_implementation == "eager"


def test_a_fit_says_so(tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--probe.num_prompts=0", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"]
    main(["fit", *tiny, f"--model.policy.path={write(tmp_path / 'model', 'bloom')}", *options])
    sentence = "BloomForCausalLM has no sdpa attention, so its attn_implementation is eager."
    assert f"model.policy.path: {sentence}" in caplog.text
    assert f"model.reference.path: {sentence}" in caplog.text


def test_so_does_a_reward_model(tmp_path: Path) -> None:
    path = write(tmp_path / "scores", "gemma2", scores=True)
    backbone = PolicyConfig(path=path)
    models = [load_score_model(backbone), outline_score_model(backbone), load_sequence_classifier(backbone, option="o")]
    models.append(load_score_model(PolicyConfig(path=write(tmp_path / "policy", "gemma2"))))
    assert {model.config._attn_implementation for model in models} == {"eager"}


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        ("flex_attention", "MambaForCausalLM does not support"),
        ("flash", "Specified"),
        ("flash_attention_2", "MambaForCausalLM does not support"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(kernel: str, sentence: str, tmp_path: Path) -> None:
    config = PolicyConfig(path=write(tmp_path, "mamba"), attn_implementation=kernel)
    with pytest.raises(InputError, match=f"^model.policy.path: attn_implementation {kernel!r}: {sentence}"):
        load_causal_lm(config)


@pytest.mark.parametrize("change", [{"hidden_size": 15}, {"hidden_size": "wide"}])
def test_a_configuration_that_is_none_is_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        InputError, match=r"holds no loadable Hugging Face model: .*(hidden size|hidden_size|expected int)"
    ):
        load_causal_lm(PolicyConfig(path=str(tmp_path)))


def test_a_fit_says_that_experts_are_not_balanced(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write(tmp_path / "model", "mixtral", **MOE)
    options = [f"--model.policy.path={model}", "--probe.num_prompts=0", f"--trainer.default_root_dir={tmp_path}"]
    main(["validate", *tiny, *options])
    assert "load-balancing" not in caplog.text
    main(["fit", *tiny, *options, "--trainer.max_steps=1"])
    assert caplog.text.count("load-balancing loss (router_aux_loss_coef) is not part of the loss") == 1
