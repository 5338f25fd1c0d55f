"""Profiles optimizer steps: host synchronizations, casts, the longest kernels."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.tools.gpu.sheet import Sheet
from tests.tools.gpu.training import fit, options, small_workload

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
KINDS = {
    "reads of a value": READS,
    "casts and copies": ("aten::_to_copy",),
    "waits for a stream": ("cudaStreamSynchronize", "cudaEventSynchronize"),
    "waits for the device": ("cudaDeviceSynchronize",),  # the profiler's own, too
    "copies to the host": ("Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)"),
    "kernel launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
}
ON_CPU = ("reads of a value", "casts and copies")
FIRST, STEPS = 3, 2  # the first steps warm up


class Profile(Callback):
    """Profiles whole optimizer steps, and notes the lines at which the host waited.

    Args:
        on_gpu: whether there is a GPU to watch.
    """

    def __init__(self, on_gpu: bool) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        self.on_gpu = on_gpu
        self.profile = profile(activities=activities, acc_events=True)
        self.waited: Counter[str] = Counter()
        self.micro_batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == FIRST and batch_idx % trainer.accumulate_grad_batches == 0:
            if self.on_gpu:
                torch.cuda.synchronize()
            self.profile.start()
            self.caught = warnings.catch_warnings(record=True)
            self.seen: Any = self.caught.__enter__()
            warnings.simplefilter("always")
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            self.begun = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not getattr(self, "begun", False):
            return
        self.micro_batches += 1
        if trainer.global_step == FIRST + STEPS:
            self.begun = False
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            self.profile.stop()
            self.caught.__exit__(None, None, None)
            for warning in self.seen:
                if "called a synchronizing CUDA operation" in str(warning.message):
                    place = "/".join(Path(warning.filename).parts[-2:])
                    self.waited[f"{place}:{warning.lineno}"] += 1


def _loads_data(event: Any) -> bool:
    """Whether the event belongs to the loading of the next batch, which happens on the host."""
    while event is not None:
        if "DataLoader" in event.name:
            return True
        event = event.cpu_parent
    return False


def _is_kernel(event: Any) -> bool:
    """Whether the event is a kernel. Operators and annotations would count the time of their kernels again."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def run(sheet: Sheet) -> None:
    """Profiles steps of two micro-batches at which Lightning writes no log."""
    watched = Profile(sheet.is_gpu)
    given = options(sheet, small_workload(sheet, "135m", num_pairs=256), f"--trainer.max_steps={FIRST + STEPS}")
    if not sheet.is_gpu:  # there, AdamW reads the step count of each tensor
        given = [option for option in given if not option.startswith("--model.optimizer")]
        given += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-3"]
    fit([*given, "--trainer.log_every_n_steps=100"], sheet.folder / "runs", watched)
    count = Counter(event.name for event in watched.profile.events() if not _loads_data(event))
    for kind, names in KINDS.items():
        if not sheet.is_gpu and kind not in ON_CPU:
            sheet.skip(kind, "only a GPU has them")
            continue
        number = sum(count[name] for name in names)
        per_step, per_micro_batch = number / STEPS, number / watched.micro_batches
        sheet.row("Counts", of=kind, **{"per micro-batch": per_micro_batch, "per optimizer step": per_step})
    for place, number in watched.waited.most_common(20):
        sheet.row("Where the host waited", line=place, **{"per optimizer step": number / STEPS})
    if sheet.is_gpu:
        sheet.check("waits of the host per optimizer step", watched.waited.total() / STEPS, 2)
    # The guard looks once at the losses of a step and once at its gradient.
    sheet.check("reads of a value per optimizer step", sum(count[name] for name in READS) / STEPS, 2)
    averages = [event for event in watched.profile.key_averages() if not sheet.is_gpu or _is_kernel(event)]

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if sheet.is_gpu else event.self_cpu_time_total)

    total = sum(map(microseconds, averages))
    for event in sorted(averages, key=microseconds, reverse=True)[:10]:
        sheet.row(
            "The longest",
            **{"kernel" if sheet.is_gpu else "operation": event.key[:90]},
            **{"ms per step": microseconds(event) / 1e3 / STEPS, "share": microseconds(event) / total},
            calls=event.count,
        )
