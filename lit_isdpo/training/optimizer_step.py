"""An optimizer step: its learning rate, its clipping, and whether it is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_isdpo.policy.logprob_model import full_tensor
from lit_isdpo.training.reading import find_data, ranks_of
from lit_isdpo.types import InputError, check_least

if TYPE_CHECKING:
    from lit_isdpo.training.language import LanguageModule

COUNTS_KEY = "skipped_steps"  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over optimizer steps, as a factor of the optimizer's ``lr``.

    Args:
        decay: ``constant``, or ``linear`` or ``cosine`` down to ``final_factor`` at the last step.
        warmup_steps: optimizer steps of linear rise from 0.
        final_factor: where the decay ends, between 0 and 1.
    """

    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.1

    def __post_init__(self) -> None:
        check_least("schedule.warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.final_factor <= 1:
            raise InputError(f"schedule.final_factor must lie between 0 and 1, not {self.final_factor}.")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor at the 0-based optimizer ``step``; the last one is ``total_steps - 1``.

        >>> linear = Schedule(decay="linear", warmup_steps=2)
        >>> [round(linear.factor(step, 13), 3) for step in (0, 1, 2, 7, 12)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps))
        remaining = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_factor + (1 - self.final_factor) * remaining


class ScheduledRate(LambdaLR):
    """Sets the learning rate of each optimizer step.

    Args:
        optimizer: whose learning rates these are.
        schedule: says how they change.
        total_steps: optimizer steps of the whole fit.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, total_steps: int) -> None:
        super().__init__(optimizer, lambda step: schedule.factor(step, total_steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the checkpoint's step, with the rates that this optimizer and this schedule have there."""
        step = state_dict["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        own = {"base_lrs": self.base_lrs, "_last_lr": rates, "lr_lambdas": [None] * len(rates)}
        super().load_state_dict({**state_dict, **own})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """What a fit does at an optimizer step whose loss or gradient is NaN or infinite.

    Args:
        action: ``stop`` ends the fit, with ``last.ckpt`` as it was before that step; ``skip`` leaves weights and
            optimizer as they are and goes on. A skipped step counts as a step: of the schedule, of ``max_steps`` and of
            the order of the rows.
        max_in_a_row: steps that may be skipped one after the other; the next one ends the fit.
    """

    action: Literal["stop", "skip"] = "stop"
    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        if self.action not in ("stop", "skip"):
            raise InputError(f"model.nonfinite.action must be 'stop' or 'skip', not {self.action!r}.")
        if self.max_in_a_row < 1:
            raise InputError(f"model.nonfinite.max_in_a_row must be at least 1 step, not {self.max_in_a_row}.")


class NonFiniteError(InputError):
    """A fit ends before a step that would have put NaN into the weights."""


class StepGuard(pl.Callback):
    """Looks at the losses and the gradient of an optimizer step before the weights change.

    Args:
        nonfinite: what to do if they are NaN or infinite.

    Attributes:
        num_skipped: steps of the fit that were left out.
    """

    def __init__(self, nonfinite: NonFinite) -> None:
        self.nonfinite = nonfinite
        self.num_skipped = 0
        self._in_a_row = 0
        self._skips = False  # the current step
        self._losses: list[Tensor] = []
        self._row_ids: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what is left of a fit that stopped."""
        self._losses, self._row_ids, self._skips = [], [], False

    def add(self, losses: Tensor, row_ids: Tensor) -> None:
        """Keeps a micro-batch's losses, ``(B,)``, and its rows."""
        self._losses.append(losses.detach())
        self._row_ids.append(row_ids)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Looks at the losses since the last step, of all ranks.

        Raises:
            NonFiniteError: one is not finite, and the fit ends.
        """
        bad = ~torch.isfinite(torch.cat(self._losses))
        # Together, or the others would wait for a rank that has stopped.
        if trainer.strategy.reduce_boolean_decision(bool(bad.any()), all=False):
            self._leave_out(pl_module, "loss", torch.cat(self._row_ids)[bad])

    def clip(
        self, module: "LanguageModule", parameters: Sequence[Parameter], max_norm: float | None
    ) -> dict[str, Tensor]:
        """Clips the gradient by its norm, or drops it if the step is not to be made.

        Args:
            module: whose ``train_metrics`` forget a step that is not made, so that later ones do not know of it.
            parameters: those with a gradient.
            max_norm: limit of the norm over all parameters together; ``None`` or 0 sets none.

        Returns:
            What is logged. ``grad_clipped`` shows how often clipping acts: at every step it would cancel small weights,
            as Adam does.

        Raises:
            NonFiniteError: the gradient is NaN or infinite, and the fit ends.
        """
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))  # the same on all ranks
        if not self._skips and not torch.isfinite(norm):
            self._leave_out(module, "gradient", torch.cat(self._row_ids))
        skips = self._skips
        self._losses, self._row_ids, self._skips = [], [], False
        if skips:
            module.train_metrics.forget()
            for parameter in parameters:  # optimizers do not touch one without a gradient, nor their own state of it
                parameter.grad = None
        else:
            self._in_a_row = 0
        values = {"grad_norm": norm}
        if max_norm:
            values["grad_clipped"] = (norm > max_norm).float()
        if self.nonfinite.action == "skip":
            values["skipped_steps"] = torch.full((), float(self.num_skipped), device=norm.device)
        return values

    def _leave_out(self, module: "LanguageModule", what: str, row_ids: Tensor) -> None:
        """Marks the step as one to skip, or raises; every rank comes here."""
        trainer = module.trainer
        rows = [row for part in ranks_of(trainer).gather(row_ids[row_ids >= 0].tolist()) for row in part]
        named = f"{'for' if what == 'loss' else 'in the step of'} {row_names(trainer, torch.tensor(rows))}"
        said = f"The {what} is NaN or infinite at optimizer step {trainer.global_step} {named}"
        if self.nonfinite.action == "stop":
            module.train_metrics.forget()
            advice = "look at those rows" if what == "loss" else "float32 for the model's compute_dtype"
            raise NonFiniteError(
                f"{said}; the weights are as they were before this step. Try a lower learning rate, or {advice}, or go "
                "on without such steps by --model.nonfinite.action skip."
            )
        if self._in_a_row == self.nonfinite.max_in_a_row:
            module.train_metrics.forget()
            raise NonFiniteError(
                f"{said}, after {self._in_a_row} skipped steps in a row, which is model.nonfinite.max_in_a_row; the "
                "weights are as they were before them. Try a lower learning rate."
            )
        self._skips = True
        self._in_a_row += 1
        self.num_skipped += 1
        rank_zero_info(f"{said}; the step is skipped.")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the counts, for a fit that goes on."""
        checkpoint[COUNTS_KEY] = {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores them; a checkpoint of an older version may have none."""
        if COUNTS_KEY in checkpoint:
            self.num_skipped, self._in_a_row = (checkpoint[COUNTS_KEY][key] for key in ("num_skipped", "in_a_row"))


def row_names(trainer: pl.Trainer, row_ids: Tensor) -> str:
    """A few rows in words, as they were read."""
    some, others = row_ids.tolist()[:8], row_ids.numel() - 8
    data = find_data(trainer)
    if data is None:
        return f"training rows {some}"
    if not some:
        return "training rows of another rank"
    names = ", ".join(data.splits.row_name("train", row_id) for row_id in some)
    return f"{names} and {others} more" if others > 0 else names
