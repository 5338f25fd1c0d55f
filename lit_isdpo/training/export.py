"""A checkpoint in, a Hugging Face folder out."""

import csv
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from lit_isdpo import __version__
from lit_isdpo.types import InputError

WEIGHTS_PREFIX = "policy.model."

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- lit-isdpo
- preference-optimization
---

# {name}

A language model trained with lit_isdpo {version}, exported from optimizer step {step}.
Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

## Measured on the validation set, at step {metrics_step}

{metrics}

Rewards are beta times the log-ratio, policy over reference; KL is sampled, in nats a response; gold reward and win rate
are there only where the true reward is known.

## Configuration of the run

```yaml
{config}```
"""


def export(ckpt_path: str, output_dir: str, run_dir: str | None = None, trust_remote_code: bool = False) -> None:
    """Writes the policy of a checkpoint as a Hugging Face folder: safetensors, tokenizer, chat template, model card.

    Args:
        ckpt_path: the checkpoint, ``RUN/checkpoints/last.ckpt`` say.
        output_dir: the folder to write; it must be new or empty.
        run_dir: the run's folder, with its ``model`` and ``config.yaml``, where the checkpoint was moved away from it.
        trust_remote_code: run Python code that came with the model.

    Raises:
        InputError: a path is missing, is not what it should be, or would be overwritten.
    """
    checkpoint_file, output = Path(ckpt_path), Path(output_dir)
    run = find_run(checkpoint_file, run_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output_dir: {output_dir!r} exists and is not an empty folder; name a new one.")
    checkpoint = _load(checkpoint_file)
    model = _model(run / "model", checkpoint["state_dict"], checkpoint_file, trust_remote_code)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(run / "model", trust_remote_code=trust_remote_code).save_pretrained(output)
    (output / "README.md").write_text(_card(run, output.name, int(checkpoint["global_step"])))
    print(f"Wrote {output} ({sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}).")


def load_policy(ckpt_path: str | Path, run_dir: str | Path | None = None) -> PreTrainedModel:
    """The policy of a checkpoint, in memory; arguments and errors as those of ``export``."""
    checkpoint_file = Path(ckpt_path)
    run = find_run(checkpoint_file, run_dir)
    model = _model(run / "model", _load(checkpoint_file)["state_dict"], checkpoint_file)
    model.eval()
    return model


def find_run(checkpoint_file: Path, run_dir: str | Path | None) -> Path:
    """The folder of the run that a checkpoint is from.

    Raises:
        InputError: the checkpoint is missing, or the folder does not hold the model's configuration.
    """
    if not checkpoint_file.is_file():
        raise InputError(f"ckpt_path: no such checkpoint: {str(checkpoint_file)!r}.")
    run = Path(run_dir) if run_dir else checkpoint_file.resolve().parent.parent
    if not (run / "model" / "config.json").is_file():
        raise InputError(f"{str(run)!r} is not the run's folder (it has no model/config.json): name it with --run_dir.")
    return run


def _load(path: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its parts raise
        raise InputError(f"ckpt_path: {str(path)!r} cannot be read as a checkpoint; it may be cut short.") from error
    if not any(key.startswith(WEIGHTS_PREFIX) for key in checkpoint.get("state_dict", {})):
        raise InputError(f"ckpt_path: {str(path)!r} holds no policy of this project.")
    return checkpoint


def _model(
    folder: Path, state_dict: dict[str, torch.Tensor], path: Path, trust_remote_code: bool = False
) -> PreTrainedModel:
    weights = {key.removeprefix(WEIGHTS_PREFIX): v for key, v in state_dict.items() if key.startswith(WEIGHTS_PREFIX)}
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"ckpt_path: the weights in {str(path)!r} do not fit the model of {str(folder)!r}.") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _card(run: Path, name: str, step: int) -> str:
    config_file = run / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
    metrics_step, metrics = _validation(run / "metrics.csv", step)
    rows = ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in metrics.items())]
    return CARD.format(
        name=name,
        version=__version__,
        step=step,
        metrics_step=metrics_step,
        metrics="\n".join(rows) if metrics else "(none in metrics.csv)",
        config=yaml.safe_dump(config, sort_keys=False),
    )


def _validation(file: Path, step: int) -> tuple[str, dict[str, float]]:
    """The step and values of the validation at ``step``, or else of the last one before it."""
    if not file.is_file():
        return "-", {}
    with file.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("val/loss") and int(row["step"]) <= step]
    if not rows:
        return "-", {}
    last = rows[-1]
    return last["step"], {key: float(value) for key, value in last.items() if key.startswith("val/") and value}
