"""Models in parts, on two ranks: every way in which weights get there, on several architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.policy.test_prefix_sharing import ARCHITECTURES, GATED
from tests.ranks import run_on_ranks

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def save(
    folder: Path, architecture: str, options: dict[str, Any], *, dtype: torch.dtype = torch.float32, **how: Any
) -> str:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**options)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **how)
    return str(folder)


@pytest.mark.slow
def test_models_in_parts_are_the_whole_ones(tmp_path: Path) -> None:
    untied = save(tmp_path / "untied", "llama", GATED | {"tie_word_embeddings": False})
    tied = save(tmp_path / "tied", "llama", GATED | {"tie_word_embeddings": True})
    many = save(tmp_path / "many", "llama", GATED | {"tie_word_embeddings": False}, max_shard_size="5KB")
    half = save(tmp_path / "half", "qwen3", GATED, dtype=torch.bfloat16)
    assert len(list(Path(many).glob("*.safetensors"))) > 2
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("untied", {"path": untied}, "slices"),
        ("tied", {"path": tied}, "slices"),
        ("many files", {"path": many}, "slices"),
        ("widened", {"path": half}, "slices"),
        ("checkpointed", {"path": untied, "gradient_checkpointing": True}, "slices"),
        ("LoRA", {"path": untied, "peft": LORA}, "rank 0"),
        ("random", {"path": untied, "init": "random"}, "rank 0"),
    ]
    for architecture in ("gemma3_text", "gpt2", "opt", "phi", "mixtral", "granite"):
        folder = save(tmp_path / architecture, architecture, ARCHITECTURES[architecture])
        # Checkpoints of experts are not named as the model's tensors are.
        cases.append((architecture, {"path": folder}, "rank 0" if architecture == "mixtral" else "slices"))
    printed = run_on_ranks(cases, module="tests.policy.sharded_ranks")
    assert printed.count("the same") == len(cases) + 1
