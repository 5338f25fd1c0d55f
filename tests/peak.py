"""The memory of an optimizer step, as PyTorch's profiler counts it on a CPU."""

from typing import Any

from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from lit_isdpo.policy.logprob_model import own_part
from lit_isdpo.policy.reference import ResidentReference


class PeakOfSteps(Callback):
    """Bytes at the peak of a step from the second on: what is there at its start, and what the profiler adds.

    Of several steps the least counts: where ranks wait for each other, buffers that are sent may be freed late.
    """

    def __init__(self, num_steps: int = 1) -> None:
        self.num_steps = num_steps
        self.peaks: list[int] = []

    @property
    def peak(self) -> int:
        return min(self.peaks)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not 1 <= trainer.global_step <= self.num_steps or batch_idx % trainer.accumulate_grad_batches:
            return
        state = [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
        tensors = [*pl_module.network.parameters(), *pl_module.network.buffers(), *state]
        if isinstance(pl_module.reference, ResidentReference):
            tensors += [*pl_module.reference.model.parameters(), *pl_module.reference.model.buffers()]
        parts = [own_part(tensor) for tensor in tensors]
        self.before = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in parts}.values())
        self.profiler = profile(acc_events=True, activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != len(self.peaks) + 2 or len(self.peaks) == self.num_steps:
            return
        self.profiler.stop()
        live = peak = self.before
        events = [event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        self.peaks.append(peak)
