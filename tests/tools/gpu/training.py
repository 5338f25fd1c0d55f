"""Fits through the command line, as users give them, on drawn models and rows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_isdpo import cli
from lit_isdpo.training.run_folder import run_dir
from tests.tools.benchmarks.workload import SHAPES, ModelSize, Workload, make_workload
from tests.tools.gpu.shapes import MODELS, TINY
from tests.tools.gpu.sheet import Sheet

Metrics = dict[str, dict[int, float]]


def small_workload(sheet: Sheet, model: str = "34m", *, num_pairs: int = 64) -> Workload:
    """HH-shaped rows and a model, tiny on a CPU. Every epoch ends with a checkpoint: more pairs, fewer of them."""
    size: ModelSize = MODELS[model] if sheet.is_gpu else TINY
    return make_workload(sheet.folder / "workload", SHAPES["hh"], size, num_pairs=num_pairs, batch_size=8)


def options(sheet: Sheet, workload: Workload, *more: str) -> list[str]:
    """IS-DPO in bfloat16 on such a workload: batches of 8 pairs in micro-batches of 4, no validation."""
    given = {
        "trainer.accelerator": "gpu" if sheet.is_gpu else "cpu",
        "trainer.devices": 1,
        "trainer.max_epochs": -1,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.gradient_clip_val": 1.0,
        "trainer.enable_progress_bar": "false",
        "model": "PreferenceModule",
        "model.policy.path": workload.model,
        "model.policy.compute_dtype": "bfloat16",
        "model.loss": "DPOLoss",
        "model.loss.beta": 0.1,
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-4,
        "model.optimizer.fused": "true",
        "data.train": workload.pairs,
        "data.val": workload.validation,
        "data.batch_size": 8,
        "data.micro_batch_size": 4,
        "data.max_length": workload.max_length,
        "data.max_prompt_length": workload.max_length - 1,
        "probe.num_prompts": 0,
        "checkpoint.monitor": "null",
    }
    return [*(f"--{key}={value}" for key, value in given.items()), *more]


def fit(arguments: Sequence[str], root: Path, *callbacks: Callback) -> Path:
    """Runs a fit with the callbacks before all others, and returns its folder."""
    folders: list[Path] = []
    plain = cli.IsdpoCLI.instantiate_trainer

    def observed(self: Any, **kwargs: Any) -> Trainer:
        trainer = plain(self, **kwargs)
        trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
        folders.append(run_dir(trainer))
        return trainer

    cli.IsdpoCLI.instantiate_trainer = observed  # type: ignore[method-assign]
    try:
        cli.main(["fit", *arguments, f"--trainer.default_root_dir={root}"])
    finally:
        cli.IsdpoCLI.instantiate_trainer = plain  # type: ignore[method-assign]
    return folders[0]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint that is one file."""
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    return state


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference between two weights of the same name; infinite if the names differ."""
    if one.keys() != other.keys():
        return math.inf
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def difference(one: Metrics, other: Metrics, keys: Sequence[str], first: int = 0) -> float:
    """Largest difference between the logs of two runs from an optimizer step on; infinite if steps are missing.

    For values above 1, such as gradient norms, it is the relative difference.
    """
    found = 0.0
    for key in keys:
        steps = [step for step in one[key] if step >= first]
        if not steps or any(step not in other[key] for step in steps):
            return math.inf
        found = max(found, *(abs(one[key][step] - other[key][step]) / max(1, abs(one[key][step])) for step in steps))
    return found


def adapter(rank: int = 16) -> str:
    """LoRA on all linear layers, as an option."""
    return json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"})
