"""A fit can always go on: ``last.ckpt`` at every stop, whoever asked for it."""

import re
import shutil
import signal
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from uuid import uuid4

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.evaluation.store import naming
from lit_isdpo.training.optimizer_step import NonFiniteError
from lit_isdpo.training.run_folder import run_dir
from lit_isdpo.types import InputError, check_least

MICRO_BATCHES = "micro_batches_per_step"  # of a checkpoint
EX_TEMPFAIL = 75  # sysexits.h: "try again later"
_WRITTEN = re.compile(r"last-\d+(-[0-9a-f]+)?(\.saving)?")  # what a last checkpoint is written as
GOLD_KEYS = ("val/gold_reward", "val/win_rate", "val/exact/gold_reward")  # known for the lab's data alone


class WholeStepTrainer(Trainer):
    """Validates and stops between two optimizer steps only, where nothing is lost that a checkpoint does not hold."""

    @property
    def is_between_steps(self) -> bool:
        """Whether no optimizer step has begun that is not made: no gradient waits for more micro-batches."""
        begun = self.fit_loop.batch_idx + 1  # micro-batches of the epoch
        return begun == 0 or begun % self.accumulate_grad_batches == 0

    @property
    def enable_validation(self) -> bool:
        """Whether a validation may begin: between two steps, as it saves checkpoints; it waits until then."""
        return super().enable_validation and self.is_between_steps

    @property
    def should_stop(self) -> bool:
        """Whether the fit ends: between two steps, whatever asks for it (``max_time``) and whenever."""
        return self._is_asked_to_stop and self.is_between_steps

    @should_stop.setter
    def should_stop(self, is_asked: bool) -> None:
        if is_asked or self.is_between_steps:  # callbacks write back what they read, in the middle of a step too
            self._is_asked_to_stop = is_asked


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoints by a metric of the validation, beside ``last.ckpt``.

    Args:
        monitor: a logged key, ``val/gold_reward`` say; without one nothing but the last checkpoint is kept.
        mode: whether a good value is small or large.
        save_top_k: how many are kept.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "min", save_top_k: int = 1) -> None:
        super().__init__(
            filename="best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor else 0,
            save_last=False,
            auto_insert_metric_name=False,  # keys hold slashes
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps checkpoints in the run's folder, whatever the logger."""
        self.dirpath = str(run_dir(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over no paths: a resumed run keeps its own best checkpoints, and would delete those it was told of."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves; the validation before the first step tells already whether the metric is there.

        Raises:
            InputError: ``monitor`` is not logged.
        """
        if self.monitor and self.monitor not in trainer.callback_metrics and trainer.state.fn == TrainerFn.FITTING:
            if self.monitor not in GOLD_KEYS:
                known = ", ".join(sorted(key for key in trainer.callback_metrics if key.startswith("val/")))
                raise InputError(f"checkpoint.monitor: {self.monitor!r} is not logged; these are: {known}.")
            rank_zero_info(f"No best checkpoint is kept, as {self.monitor} is not known for this data.")
            self.monitor, self.save_top_k = None, 0
        super().on_validation_end(trainer, pl_module)


class LastCheckpoint(Callback):
    """Saves ``checkpoints/last.ckpt`` where a fit ends: its last step, ``max_steps``, an interrupt, each epoch's end.

    It is written only between two optimizer steps, so that a resumed fit continues as if it had not stopped, and under
    another name first, so that a crash while saving leaves the previous one whole. A sharded checkpoint is a folder,
    which cannot be replaced in one go: there ``last.ckpt`` is a link to it.

    A first Ctrl-C stops the fit so, and so does SIGTERM, by which schedulers and clouds announce that a job must leave:
    the process then exits with status 75 (EX_TEMPFAIL), which tells a script to start it again.

    Args:
        every_n_steps: save every so many optimizer steps too; 0 does not.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        check_least("last.every_n_steps", every_n_steps, 0)
        self.every_n_steps = every_n_steps
        self._asked_by: int | None = None  # the signal
        self._saved_at = -1
        self._between_steps: tuple[dict[str, Any], int] | None = None  # what a checkpoint would have said of the loops
        self._is_past_it = False  # whether the loops have counted on since then
        self._flushes = False
        self._previous_handler: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on a first Ctrl-C asks for a stop after the current optimizer step; a second stops at once."""
        if stage == "fit":
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives Ctrl-C back."""
        if stage == "fit" and self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back, as Lightning tears no callback down where a fit has failed; saves what a NaN has stopped.

        The weights are those of the last step, but the loops are in the middle of the next one.
        """
        self.teardown(trainer, pl_module, "fit")
        if isinstance(exception, NonFiniteError) and self._between_steps:  # on all ranks alike
            if trainer.global_step != self._saved_at:
                self._save(trainer)
            rank_zero_info(f"\nStopped at optimizer step {trainer.global_step}, with {self.path(trainer)} before it.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to SIGTERM; moves validations, where checkpoints are saved too, to an accumulation window's end."""
        # Lightning has put a handler of its own there by now, and takes it back where it puts its own back.
        signal.signal(signal.SIGTERM, self._on_terminate)
        self._remember(trainer)
        every = trainer.val_check_batch
        if isinstance(every, int):
            trainer.val_check_batch = -(-every // trainer.accumulate_grad_batches) * trainer.accumulate_grad_batches

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps how many micro-batches made a step; what is saved in the middle of one goes on where it began."""
        checkpoint[MICRO_BATCHES] = trainer.accumulate_grad_batches
        if self._is_past_it and self._between_steps:
            checkpoint["loops"]["fit_loop"], checkpoint["epoch"] = self._between_steps

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Counts the epoch's micro-batches as this fit makes them, whose ranks may be more or fewer.

        Lightning's loop counts them where optimizer steps are what both fits have in common.
        """
        before, now = checkpoint.get(MICRO_BATCHES), trainer.accumulate_grad_batches
        if before in (None, now) or trainer.state.fn != TrainerFn.FITTING:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            for key, number in counts.items():
                open_ones = -number % before  # the last batch of a step may not be completed yet
                counts[key] = (number + open_ones) // before * now - open_ones

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What is logged of the step after which a checkpoint was saved is written too."""
        self._is_past_it = True
        if self._flushes:
            self._flushes = False
            _flush_logs(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if the fit ends here, or a save is due."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch:
            return  # in the middle of an accumulation window there is gradient that no checkpoint holds
        self._is_past_it = False
        self._remember(trainer)
        step = trainer.global_step
        at_max_steps = step == trainer.max_steps
        # A signal may reach the ranks at different steps, or one of them alone.
        interrupted = trainer.strategy.reduce_boolean_decision(self._asked_by is not None, all=False)
        due = self.every_n_steps and step % self.every_n_steps == 0
        if at_max_steps or interrupted or due or trainer.is_last_batch:
            self._save(trainer)
        if interrupted:
            trainer._logger_connector.update_train_step_metrics()  # Lightning would log this step a moment later
            terminated = trainer.strategy.reduce_boolean_decision(self._asked_by == signal.SIGTERM, all=False)
            rank_zero_info(f"\nStopped at optimizer step {step}. Continue with --ckpt_path {self.path(trainer)}")
            raise SystemExit(_status(trainer)) if terminated else KeyboardInterrupt
        if at_max_steps:
            trainer.should_stop = True  # Lightning then validates the final state before it ends

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where something else ended the fit: early stopping, ``max_time``."""
        if trainer.global_step != self._saved_at:
            self._is_past_it = True  # Lightning has counted the epoch as a whole one
            self._save(trainer)

    def _remember(self, trainer: Trainer) -> None:
        """Copies what a checkpoint says of the loops, as they count on in what they give."""
        self._between_steps = (deepcopy(trainer.fit_loop.state_dict()), trainer.current_epoch)

    def path(self, trainer: Trainer) -> Path:
        """Where the last checkpoint is."""
        return run_dir(trainer) / "checkpoints" / "last.ckpt"

    def _save(self, trainer: Trainer) -> None:
        path = self.path(trainer)
        _flush_logs(trainer)
        self._flushes = True
        written = path.with_name(trainer.strategy.broadcast(f"last-{trainer.global_step}-{uuid4().hex[:8]}"))
        with naming(path):
            trainer.save_checkpoint(written)
            if trainer.is_global_zero:
                _put_in_place(written, path)
        trainer.strategy.barrier("last.ckpt")
        self._saved_at = trainer.global_step

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        is_over = self._previous_handler is None  # Lightning puts this handler back after a fit that failed
        if is_over or self._asked_by is not None:
            raise KeyboardInterrupt
        self._asked_by = signum
        rank_zero_info("\nStopping after this optimizer step; press Ctrl-C again to stop at once.")

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        self._asked_by = signum
        rank_zero_info("\nAsked to leave (SIGTERM): stopping after this optimizer step.")


def _status(trainer: Trainer) -> int:
    """Lightning's own launcher takes a child that ends first with another status than 0 for one that failed."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return 0 if is_child else EX_TEMPFAIL


def _flush_logs(trainer: Trainer) -> None:
    """Writes what loggers hold back: a resumed fit does not log it again."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        with naming(Path(logger.save_dir or trainer.default_root_dir)):
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()


def _put_in_place(written: Path, path: Path) -> None:
    """Makes what was written the checkpoint; at every moment there is the old one or the new one."""
    if written.is_dir():
        link = path.with_suffix(".link")
        link.unlink(missing_ok=True)
        link.symlink_to(written.name)
        link.replace(path)
    else:
        written.replace(path)
    for other in path.parent.glob("last-*"):  # the one before, and what a kill has left
        if not _WRITTEN.fullmatch(other.name):
            continue  # a file of the user's
        if other.is_dir() and other != written:
            shutil.rmtree(other, ignore_errors=True)
        elif other.is_file():
            other.unlink()
