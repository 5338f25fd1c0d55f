"""A checkpoint from the middle of a fit, as a kill would have left it."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_isdpo.training.run_folder import run_dir

KEPT = "kept.ckpt"


class KeptCheckpoint(Callback):
    """Keeps what ``last.ckpt`` was before an optimizer step.

    Args:
        step: of the fit, at which ``--last.every_n_steps`` has just saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        folder = run_dir(trainer) / "checkpoints"
        if trainer.global_step == self.step and trainer.is_global_zero and not (folder / KEPT).exists():
            last = Path(folder / "last.ckpt").resolve()
            (shutil.copytree if last.is_dir() else shutil.copy)(last, folder / KEPT)


def keeping(step: int) -> list[str]:
    """The options of a fit that keeps its checkpoint of a step."""
    return [
        f"--last.every_n_steps={step}",
        f"--trainer.callbacks={KeptCheckpoint.__module__}.{KeptCheckpoint.__name__}",
        f"--trainer.callbacks.step={step}",
    ]
