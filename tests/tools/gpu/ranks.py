"""Compares ``ddp`` and ``fsdp2`` on one rank with one device: losses, gradients, checkpoint and export."""

import os
from pathlib import Path
from socket import socket

from safetensors.torch import load_file

from lit_isdpo import cli
from tests.runs import read_metrics
from tests.tools.gpu.processes import apart
from tests.tools.gpu.sheet import Sheet
from tests.tools.gpu.training import Metrics, difference, distance, fit, options, small_workload

STEPS = 4
KEYS = ("train/loss", "train/grad_norm")


def run(sheet: Sheet) -> None:
    """Runs each strategy in a new process, which is a process group of one."""
    workload = small_workload(sheet)
    found: dict[str, tuple[Metrics, Path]] = {}
    for strategy in ("auto", "fsdp2", "ddp"):
        for dtype in ("float32", "bfloat16"):
            given = options(sheet, workload, f"--trainer.max_steps={STEPS}", f"--trainer.strategy={strategy}")
            given.append(f"--model.policy.compute_dtype={dtype}")
            name = f"{strategy}, {dtype}"
            logged, exported = apart(_fit, given, sheet.folder / name.replace(", ", "_"))
            found[name] = logged, exported
            one, one_exported = found[f"auto, {dtype}"]
            off = difference(logged, one, KEYS)
            turned = distance(load_file(exported / "model.safetensors"), load_file(one_exported / "model.safetensors"))
            sheet.row(
                f"{STEPS} steps, against one device",
                strategy=strategy,
                compute=dtype,
                **{"logged values off by": off, "exported weights off by": turned},
            )
            if strategy == "auto":
                continue
            # fsdp2 rounds norms and embeddings to bfloat16 too, and autocast does not.
            sheet.check(f"{name}: losses and gradient norms", off, 1e-3 if dtype == "float32" else 0.05)
            # At a rate of 1e-4 AdamW moves a weight whose gradient is noise by as much per step, either way.
            sheet.check(f"{name}: exported weights", turned, 2e-4 * STEPS)


def _fit(arguments: list[str], root: Path) -> tuple[Metrics, Path]:
    """Returns the log of a fit, and the folder of its export."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
    os.environ["TORCHELASTIC_RUN_ID"] = "gpu"
    folder = fit(arguments, root)
    cli.main(["export", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", f"--output_dir={root / 'exported'}"])
    return read_metrics(folder), root / "exported"
