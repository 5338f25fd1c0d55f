"""One training run in a process of its own: ``python -m tests.tools.benchmarks.contenders '{...}'`` prints a JSON line.

Both sides take the same steps: AdamW (fused) at a constant rate, gradients clipped at norm 1, DPO without weights, no
dropout, no evaluation, no checkpoints on the way, the loss of each step logged.

A job says what is trained and how: see ``__main__.py``. Four keys are optional. ``in_memory`` draws the weights on the
device from a seed, equal on both sides, and saves no checkpoints. ``seconds`` ends the run that long after its first
step. ``peft`` has the options of an adapter. ``learning_rate`` replaces the default one.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from lit_isdpo.policy import logprob_model
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.training.checkpoints import LastCheckpoint
from tests.tools.benchmarks.measure import Meter
from tests.tools.benchmarks.workload import Workload

LEARNING_RATE, BETA, CLIP_NORM = 1e-4, 0.1, 1.0
RESULT = "RESULT "


def drawn(config: PolicyConfig, device: str, *, option: str = "path") -> PreTrainedModel:
    """Draws a model's weights on the device, the same at every call."""
    with torch.device(device):
        torch.manual_seed(0)
        return load_causal_lm(replace(config, init="random", peft=None), option=option)


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's ``DPOTrainer``, as one would set it up for speed on this device.

    Against its defaults: no gradient checkpointing (the model fits), fp32 on the CPU, whose bfloat16 products are slow,
    no columns or metrics but the loss each step, data order ``sequential`` because the rows are in order already.
    ``padding_free`` is left alone: TRL 1.16 warns and ignores it. Its head is chunked by default.
    """
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    workload, meter = Workload(**job["workload"]), Meter(job["device"])

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            meter.step(model.parameters())
            control.should_training_stop |= meter.seconds >= job.get("seconds", float("inf"))

    bf16 = job["device"] == "cuda"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["micro_batch_size"],
        gradient_accumulation_steps=job["batch_size"] // job["micro_batch_size"],
        max_steps=job["steps"],
        learning_rate=job.get("learning_rate", LEARNING_RATE),
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_NORM,
        optim="adamw_torch_fused",
        beta=BETA,
        bf16=bf16,
        use_cpu=job["device"] == "cpu",
        gradient_checkpointing=job["gradient_checkpointing"],
        precompute_ref_log_probs=job["cache"],
        max_length=workload.max_length,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=bf16,
        model_init_kwargs={"dtype": job["weights"], "attn_implementation": job["trl_attention"]},
        seed=0,
    )
    rows = datasets.load_dataset("json", data_files=workload.ordered, split="train")
    models: dict[str, Any] = {"model": workload.model}
    if job.get("in_memory"):
        numerics = PolicyConfig(path=workload.model, dtype=job["weights"], attn_implementation=job["trl_attention"])
        live = not (job["cache"] or job.get("peft"))
        models = {"model": drawn(numerics, job["device"])}
        models |= {"ref_model": drawn(numerics, job["device"])} if live else {}
        config.model_init_kwargs = None  # the model is there
    if job.get("peft"):
        from peft import get_peft_config

        models["peft_config"] = get_peft_config({**job["peft"], "task_type": "CAUSAL_LM"})
    trainer = DPOTrainer(**models, args=config, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return meter.result() | {"losses": losses}


class Clock(Callback):
    """Reads the meter after each optimizer step, and keeps its loss; ends the fit after so many seconds."""

    def __init__(self, meter: Meter, seconds: float) -> None:
        self.meter = meter
        self.seconds = seconds
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where Lightning has taken a step."""
        if trainer.global_step > len(self.meter.times):
            self.meter.step(pl_module.parameters())
            self.losses.append(trainer.logged_metrics["train/loss"].item())
            trainer.should_stop |= self.meter.seconds >= self.seconds


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """This project's command line, with its own logging."""
    from lit_isdpo import cli

    workload, meter = Workload(**job["workload"]), Meter(job["device"])
    clock = Clock(meter, job.get("seconds", float("inf")))
    if job.get("in_memory"):
        LastCheckpoint._save = lambda self, trainer: None  # type: ignore[method-assign]  # the others save nothing either
        logprob_model.load_causal_lm = lambda config, *, option="": drawn(config, job["device"], option=option)
    plain_trainer = cli.IsdpoCLI.instantiate_trainer

    def with_clock(self: Any, **kwargs: Any) -> Trainer:
        trainer = plain_trainer(self, **kwargs)
        trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]  # before another lets the peak begin anew
        return trainer

    cli.IsdpoCLI.instantiate_trainer = with_clock  # type: ignore[method-assign]
    options = {
        "seed_everything": workload.seed,
        "trainer.accelerator": "gpu" if job["device"] == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": job["steps"],
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.gradient_clip_val": CLIP_NORM,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tempfile.mkdtemp(),
        "model.policy.path": workload.model,
        "model.policy.dtype": job["weights"],
        "model.policy.compute_dtype": "bfloat16" if job["device"] == "cuda" else "float32",
        "model.policy.gradient_checkpointing": str(job["gradient_checkpointing"]).lower(),
        "model.loss": "DPOLoss",
        "model.loss.beta": BETA,
        "model.weighting": "UniformWeighting",
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": job.get("learning_rate", LEARNING_RATE),
        "model.optimizer.weight_decay": 0.0,
        "model.optimizer.fused": "true",
        "model.prefix_sharing": str(job["sharing"]).lower(),
        "data.train": workload.pairs,
        "data.val": workload.validation,
        "data.batch_size": job["batch_size"],
        "data.micro_batch_size": job["micro_batch_size"],
        "data.max_length": workload.max_length,
        "data.max_prompt_length": workload.max_length - 1,
        "probe.num_prompts": 0,
        "checkpoint.monitor": "null",
        **({"model.reference.cache": "true"} if job["cache"] else {}),
        **({"model.policy.peft": json.dumps(job["peft"])} if job.get("peft") else {}),
        **job["options"],
    }
    cli.main(["fit", *(f"--{key}={value}" for key, value in options.items())])
    return meter.result() | {"losses": clock.losses}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(job["threads"])
    sys.stdout.flush()
    line = os.dup(1)
    os.dup2(2, 1)  # what trainers print is not the result
    result = {"trl": run_trl, "ours": run_ours}[job["side"]](job)
    os.write(line, (RESULT + json.dumps(result) + "\n").encode())
