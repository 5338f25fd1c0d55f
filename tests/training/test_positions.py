"""Responses that would grow beyond the positions that a model knows are refused before anything is loaded."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from lit_isdpo.cli import main
from lit_isdpo.lab.posts import build_tokenizer
from tests.runs import read_metrics

POSITIONS = 64
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": POSITIONS}


def save(folder: Path, learned: bool) -> str:
    """A tiny model with learned positions, or with rotary ones."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common = {"vocab_size": len(tokenizer), **special, **SIZES}
    config: PretrainedConfig = GPT2Config(**common) if learned else LlamaConfig(**common, intermediate_size=32)
    (GPT2LMHeadModel if learned else LlamaForCausalLM)(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "rotary"])
@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("fit", "probe.max_new_tokens"),
        ("validate", "probe.max_new_tokens"),
        ("test", "evaluation.max_new_tokens"),
        ("test", "evaluation.kl_max_new_tokens"),
        ("predict", "model.sampling.max_new_tokens"),
    ],
)
def test_each_verb_that_samples_refuses_them(
    verb: str,
    option: str,
    learned: bool,
    tiny: list[str],
    pairs_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*tiny, f"--model.policy.path={save(tmp_path / 'model', learned)}", f"--data.test={pairs_file}"]
    options += ["--trainer.max_steps=1"] if verb == "fit" else []
    with pytest.raises(SystemExit, match="2"):
        main([verb, *options, f"--{option}={POSITIONS}", f"--trainer.default_root_dir={tmp_path}"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {option}: {POSITIONS} tokens behind a prompt of "), error
    assert error.endswith(f"more than the model's {POSITIONS} positions; lower it or data.max_prompt_length."), error


def test_all_positions_may_be_used(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny, f"--model.policy.path={save(tmp_path / 'model', learned=True)}"]
    with pytest.raises(SystemExit):
        main(
            [
                "validate",
                *options,
                f"--trainer.default_root_dir={tmp_path / 'refused'}",
                f"--probe.max_new_tokens={POSITIONS}",
            ]
        )
    longest = int(capsys.readouterr().err.partition("behind a prompt of ")[2].partition(",")[0])
    options += [f"--probe.max_new_tokens={POSITIONS - longest}", f"--trainer.default_root_dir={tmp_path}"]
    main(["validate", *options])
    assert "val/kl/rao_blackwell" in read_metrics(tmp_path / "version_0")


@pytest.mark.parametrize("off", ["--probe.num_prompts=0", "--trainer.limit_val_batches=0"])
def test_a_probe_that_is_off_needs_no_positions(off: str, tiny: list[str], tmp_path: Path) -> None:
    options = [*tiny, f"--model.policy.path={save(tmp_path / 'model', learned=True)}", "--trainer.max_steps=1"]
    main(["fit", *options, f"--probe.max_new_tokens={POSITIONS}", off, f"--trainer.default_root_dir={tmp_path}"])
