"""Clock and memory of a training process, the same for every contender."""

from time import perf_counter, time
from typing import Any

import torch

from lit_isdpo.training.throughput import GIB, peak_memory_gib, reset_peak_memory


class Meter:
    """Notes the time after each optimizer step, and the peak of memory after the first.

    Args:
        device: cpu or cuda.

    Attributes:
        times: in seconds, after each step.
        at_rest: bytes held between two steps: weights, optimizer states, and what the process needs.
        peak: bytes, since the first step.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []
        self.at_rest = self.peak = 0.0

    def step(self, parameters: Any) -> None:
        """To be called after each optimizer step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(perf_counter())
        if len(self.times) > 1:
            self.peak = max(self.peak, self._peak())
        else:
            self.first_step_at = time()
            gradients = [p.grad.nbytes for p in parameters if p.grad is not None]  # some trainers keep them until later
            reset_peak_memory(torch.device(self.device))
            self.at_rest = self._peak() - sum(gradients)

    @property
    def seconds(self) -> float:
        """Since the first step."""
        return self.times[-1] - self.times[0]

    def result(self) -> dict[str, float]:
        """Seconds of each step but the first, the peak, and what of it is neither weights nor optimizer states."""
        return {
            "seconds": [after - before for before, after in zip(self.times, self.times[1:], strict=False)],  # type: ignore[dict-item]
            "first_step_at": self.first_step_at,
            "peak_mib": self.peak / 2**20,
            "beyond_mib": (self.peak - self.at_rest) / 2**20,
        }

    def _peak(self) -> float:
        """Returns bytes. Just after a reset, it is the memory in use."""
        return peak_memory_gib(torch.device(self.device)) * GIB
