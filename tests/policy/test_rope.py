"""LongRoPE has two sets of frequencies; a run has one of them, whatever lengths share a batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, PhimoeConfig, PreTrainedModel

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.data.collation import collate_completions
from lit_isdpo.lab.posts import build_tokenizer
from lit_isdpo.policy.loading import PolicyConfig, as_one_function, pin_rope, switch_length
from lit_isdpo.policy.logprob_model import LogProbModel

SWITCH = 40  # tokens: the lab's posts lie on both sides
ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 8.0, 16.0]}
LONG, SHORT = list(range(3, 47)), [5, 9, 4, 3]


def build(vocab_size: int = 50, rope_length: int | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=160,
        original_max_position_embeddings=SWITCH,
        rope_parameters=dict(ROPE),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = as_one_function(config, PolicyConfig(rope_length=rope_length))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


@torch.no_grad()
def per_token(model: PreTrainedModel, *rows: list[int]) -> Tensor:
    """Log-probs of the first row's tokens but the first, in a batch with the others."""
    batch = collate_completions([row[:1] for row in rows], [row[1:] for row in rows], pad_token_id=0)
    values: Tensor = LogProbModel(model)(batch).per_token_logps[0, : len(rows[0]) - 1]
    return values


def test_without_a_length_a_row_depends_on_the_longest() -> None:
    """Transformers' own behaviour, which the others are about."""
    model = build()
    assert (per_token(model, SHORT) - per_token(model, SHORT, LONG)).abs().max() > 0.01


@pytest.mark.parametrize("rope_length", [SWITCH, SWITCH + 1])
def test_a_row_does_not_depend_on_the_longest(rope_length: int) -> None:
    model = build(rope_length=rope_length)
    assert switch_length(model.config) == SWITCH
    by_itself, beside = per_token(model, SHORT), per_token(model, SHORT, LONG)
    torch.testing.assert_close(by_itself, beside, atol=1e-5, rtol=0)
    # A token does not depend on how long the text goes on, either.
    torch.testing.assert_close(per_token(model, LONG[:10]), per_token(model, LONG)[:9], atol=1e-5, rtol=0)
    # The frequencies are the model's own for inputs of that length.
    kind = SHORT if rope_length <= SWITCH else LONG
    torch.testing.assert_close(per_token(model, kind), per_token(build(), kind), atol=1e-5, rtol=0)


def test_the_scales_of_phi_moe_are_those_of_its_frequencies() -> None:
    scales = {"short_mscale": 1.0, "long_mscale": 1.5}
    config = PhimoeConfig(rope_parameters={**ROPE, **scales, "original_max_position_embeddings": SWITCH})
    pin_rope(config, SWITCH + 1)
    assert config.rope_parameters["short_mscale"] == 1.5


@pytest.fixture(scope="module")
def long_rope_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("phi3")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build(len(tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("max_length", "kind"), [(64, "long"), (SWITCH, "short")])
def test_a_fit_says_which_one_and_keeps_the_configuration(
    max_length: int, kind: str, long_rope_dir: str, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a cache, whose rows had other neighbours than those of a step: the log-ratio at the first step is 0."""
    options: list[Any] = [f"--model.policy.path={long_rope_dir}", f"--data.max_length={max_length}"]
    options += ["--data.max_prompt_length=34", "--probe.num_prompts=0", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *tiny, *options, "--model.reference.cache=true", "--trainer.max_steps=2"])
    assert f"All inputs get those for {kind} ones, because data.max_length is {max_length}" in caplog.text
    run = next(tmp_path.glob("version_*"))
    saved = json.loads((run / "model" / "config.json").read_text())["rope_parameters"]
    assert {name: saved[name] for name in ROPE} == ROPE
    exported = load_policy(run / "checkpoints" / "last.ckpt")
    original = AutoConfig.from_pretrained(long_rope_dir)
    assert exported.config.rope_parameters == original.rope_parameters


def test_samples_stay_where_the_short_frequencies_are(
    long_rope_dir: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--model.policy.path={long_rope_dir}", f"--data.max_length={SWITCH}", "--data.max_prompt_length=34"]
    options += ["--probe.num_prompts=8", "--probe.max_new_tokens=36", f"--trainer.default_root_dir={tmp_path}"]
    options.append("--trainer.max_steps=1")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny, *options])
    assert f"more than the model's {SWITCH} positions" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny, *options, "--data.max_length=64", "--model.policy.rope_length=40", "--probe.num_prompts=0"])
    assert "64 tokens are more than the model's 40, as rope_length is 40" in capsys.readouterr().err
    main(["fit", *tiny, *options, f"--model.policy.rope_length={SWITCH + 1}"])
