"""TRL's side of ``test_trl_parity``: ``python -m tests.training.trl_steps '{...}'`` takes steps with ``DPOTrainer``.

For each method of the job one optimizer step from the same weights; what TRL logged of it is printed as a JSON line,
and the weights after it are saved. In a process of its own: TRL changes what Transformers' models compute.
"""

import json
import logging
import os
import sys
import warnings
from typing import Any


def take_step(job: dict[str, Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step of one method."""
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=job["output"],
        gradient_accumulation_steps=job["batch_size"] // options["per_device_train_batch_size"],
        max_steps=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # not clipped
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=job["max_length"],
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32"},
        seed=0,
        **options,
    )
    trainer = DPOTrainer(
        model=job["model"],
        ref_model=AutoModelForCausalLM.from_pretrained(job["reference"]),
        args=config,
        train_dataset=datasets.load_dataset("json", data_files=job["pairs"], split="train"),
    )
    trainer.train()
    trainer.save_model(f"{job['output']}/{name}")
    logged: dict[str, Any] = next(entry for entry in trainer.state.log_history if "loss" in entry)
    if config.precompute_ref_log_probs:
        for side in ("ref_chosen_logps", "ref_rejected_logps"):
            logged[side] = [float(value) for value in trainer.train_dataset[side]]
    return logged


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    line = os.dup(1)
    os.dup2(2, 1)  # what trainers print is not the result
    result = {name: take_step(job, name, options) for name, options in job["methods"].items()}
    os.write(line, json.dumps(result).encode())
