"""Prints the package's files that an optimizer step of the quickstart leads through."""

import contextlib
import io
import sys
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

FIRST, LAST = 2, 3  # optimizer steps: what a first one prepares is over


class StepTrace(Callback):
    """Records which files' functions are called from the end of one step to the end of the next."""

    files: ClassVar[set[str]] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == FIRST:
            sys.setprofile(self.record)
        elif trainer.global_step == LAST:
            sys.setprofile(None)

    @classmethod
    def record(cls, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            cls.files.add(frame.f_code.co_filename)


def main() -> None:
    tree = Path(sys.argv[1])
    from step import StepTrace as Imported  # as the command line's class path has it

    from lit_isdpo.cli import main as command

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stdout):
        command(
            [
                *("fit", "--config", str(tree / "configs/quickstart.yaml")),
                *("--trainer.max_steps", "4", "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "100"),
                *("--trainer.callbacks+", "step.StepTrace", "--trainer.enable_progress_bar", "false"),
            ]
        )
    package = tree / "lit_isdpo"
    for file in sorted(Imported.files):
        if Path(file).is_relative_to(package):
            print("found:", Path(file).relative_to(package))


if __name__ == "__main__":
    main()
