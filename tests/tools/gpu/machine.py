"""The head of the report: card, driver, and the measured rate of matrix products."""

import os
import platform
import subprocess
from contextlib import suppress

import torch

from lit_isdpo.training.throughput import matmul_rate
from tests.tools.gpu.processes import started_by
from tests.tools.gpu.sheet import Sheet


def run(sheet: Sheet) -> None:
    """Writes one row. Its ``rate`` is for the steps, and ``bad fork`` asks for another way to start processes."""
    if not sheet.is_gpu:
        rate = matmul_rate(torch.device("cpu"), torch.float32)
        about = {"CPU": f"{platform.machine()}, {os.cpu_count()} cores", "fp32 matmul": f"{rate / 1e9:.0f} GFLOP/s"}
        sheet.row("machine", **about, rate=rate)
    elif torch.cuda._is_in_bad_fork():
        sheet.row("machine", **{"bad fork": True})
    else:
        about = driver() or {"card": torch.cuda.get_device_name()}
        rate = matmul_rate(torch.device("cuda"), torch.bfloat16)
        sheet.row(
            "machine", **about, **{"bf16 matmul": f"{rate / 1e12:.0f} TFLOP/s", "processes": started_by()}, rate=rate
        )


def driver() -> dict[str, str]:
    """Card and driver, as nvidia-smi names them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
        return dict(zip(("card", "driver", "memory"), told.splitlines()[0].split(", "), strict=True))
    return {}
