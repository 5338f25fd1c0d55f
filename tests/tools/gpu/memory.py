"""Compares the memory that ``plan`` predicts with the peak of a fit."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lit_isdpo import cli
from lit_isdpo.commands import trainer as trainer_module
from lit_isdpo.commands.plan import Plan
from tests.peak import PeakOfSteps
from tests.tools.gpu.processes import apart
from tests.tools.gpu.sheet import Sheet
from tests.tools.gpu.training import adapter, fit, options, small_workload

SETTINGS = {
    "IS-DPO, bf16 compute": [],
    "gradient checkpointing": ["--model.policy.gradient_checkpointing=true"],
    "cached reference": ["--model.reference.cache=true"],
    "LoRA on a bf16 base": [f"--model.policy.peft={adapter()}", "--model.policy.dtype=bfloat16"],
}


class Peak(Callback):
    """Largest memory that is allocated on a GPU in the second step and the third."""

    peak = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.peak = torch.cuda.max_memory_allocated()


def run(sheet: Sheet) -> None:
    """Uses equal rows, so that every micro-batch is the longest."""
    workload = small_workload(sheet)
    alike = sheet.folder / "alike.jsonl"
    row = Path(workload.pairs).read_text().splitlines()[0]
    alike.write_text(f"{row}\n" * 64)
    for name, more in SETTINGS.items():
        given = options(sheet, workload, f"--data.train={alike}", "--trainer.log_every_n_steps=100", *more)
        planned, measured = apart(_both, given, sheet.folder / "runs", sheet.is_gpu)
        mib = {"planned, MiB": planned / 2**20, "measured, MiB": measured / 2**20, "ratio": planned / measured}
        sheet.row("Memory of a step", setting=name, **mib)
        # What libraries take for themselves is not planned: tens of MiB, on a GPU.
        sheet.check(f"{name}: planned against measured, share", abs(planned / measured - 1), 0.15)


def _both(arguments: list[str], root: Path, on_gpu: bool) -> tuple[int, int]:
    """Returns the planned bytes, and the bytes at the peak."""
    plans: list[Plan] = []
    trainer_module.print_plan = lambda plan, *args, **options: plans.append(plan)
    cli.main(["plan", *arguments, f"--trainer.default_root_dir={root}"])
    measure = Peak() if on_gpu else PeakOfSteps()
    fit([*arguments, "--trainer.max_steps=3"], root, measure)
    return plans[0].memory.total(), measure.peak
