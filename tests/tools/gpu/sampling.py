"""Measures the speed of sampling, of the probe, and of training steps that sample."""

from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from lit_isdpo.evaluation.evaluator import Evaluator
from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference
from lit_isdpo.types import ProbePrompt
from tests.tools.benchmarks.contenders import Clock
from tests.tools.benchmarks.measure import Meter
from tests.tools.gpu.shapes import MODELS, TINY, drawn_model, drawn_pairs
from tests.tools.gpu.sheet import Sheet
from tests.tools.gpu.training import fit

CONFIGS = Path(__file__).parents[3] / "configs"
LORA = {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}


def run(sheet: Sheet) -> None:
    """Uses fp32 weights and bfloat16 compute."""
    size, number, length = (MODELS["1b"], 64, 64) if sheet.is_gpu else (TINY, 4, 8)
    prompts = [pair.prompt_ids for pair in drawn_pairs(number, (20, 160), (1, 1), size.vocabulary)]

    def drawn() -> LogProbModel:
        return drawn_model(size, sheet.device, compute_dtype=torch.bfloat16)

    reference = ResidentReference(drawn())
    models = {"policy": drawn(), "reference": reference.model}
    sampling, vocabulary = Sampling(max_new_tokens=length, batch_size=number), Vocabulary(lambda ids: "", [1], 0)
    for name in ("policy", "reference", "LoRA policy"):
        if name == "LoRA policy":
            bare = drawn().model
            models[name] = LogProbModel(
                bare, compute_dtype=torch.bfloat16, adapter=Adapter(bare, parse_adapter(LORA), revision=None)
            ).to(sheet.device)
        sample(models[name], prompts[:2], replace(sampling, max_new_tokens=2), vocabulary)
        start = perf_counter()
        drawn_responses = sample(models[name], prompts, sampling, vocabulary)
        seconds = perf_counter() - start
        tokens = sum(len(response.token_ids) for responses in drawn_responses for response in responses)
        sheet.row(
            f"Sampling, {number} responses of up to {length} tokens",
            model=name,
            **{"tokens/s": tokens / seconds, "ms per token of all": 1e3 * seconds / length},
        )
    start = perf_counter()
    shown = [ProbePrompt(prompt, "", "", row, "") for row, prompt in enumerate(prompts)]
    Evaluator(shown, vocabulary, sampling, kl_prompts=number)(models["policy"], reference)
    sheet.row("The probe", prompts=number, tokens=length, seconds=perf_counter() - start)
    del models, reference
    if sheet.is_gpu:
        torch.cuda.empty_cache()
    for name, files in {
        "HyPO": ("quickstart.yaml", "model/hypo.yaml"),
        "RLOO": ("experiment/verbosity_dpo.yaml", "model/rloo.yaml"),
    }.items():
        clock = Clock(Meter(sheet.device), seconds=float("inf"))
        given = [f"--config={CONFIGS / file}" for file in files]
        given += [f"--trainer.accelerator={'gpu' if sheet.is_gpu else 'cpu'}", "--trainer.max_steps=3"]
        given += ["--trainer.max_epochs=-1", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1"]
        given += ["--probe.num_prompts=0", "--checkpoint.monitor=null", "--trainer.enable_progress_bar=false"]
        given += ["--model.policy.compute_dtype=bfloat16"]
        fit(given, sheet.folder / name, clock)
        seconds = median(clock.meter.result()["seconds"])
        sheet.row("Steps that sample, on the lab's model", method=name, **{"seconds per step": seconds})
