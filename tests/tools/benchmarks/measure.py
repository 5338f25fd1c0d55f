"""Clock and memory of a training process, the same for every contender."""

import resource
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch


class Meter:
    """Notes the time after each optimizer step, and the peak of memory after the first.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []
        self.at_rest = 0  # bytes that are held between two steps: weights, optimizer states, and what the process needs

    def step(self, parameters: Any) -> None:
        """To be called after each optimizer step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(perf_counter())
        if len(self.times) == 1:
            self.first_step_at = time()
            gradients = sum(
                p.grad.nbytes for p in parameters if p.grad is not None
            )  # some trainers keep them until later
            self.at_rest = self._held() - gradients
            self._reset_peak()

    def result(self) -> dict[str, float]:
        """Seconds of each step but the first, the peak, and what of it is neither weights nor optimizer states."""
        peak = self._peak()
        return {
            "seconds": [after - before for before, after in zip(self.times, self.times[1:], strict=False)],  # type: ignore[dict-item]
            "first_step_at": self.first_step_at,
            "peak_mib": peak / 2**20,
            "beyond_mib": (peak - self.at_rest) / 2**20,
        }

    def _held(self) -> int:
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        return _status("VmRSS")

    def _peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")

    def _reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins anew at VmRSS


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
