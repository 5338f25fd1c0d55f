"""What stops a fit before a step that would put NaN into the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from lightning import pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_isdpo.training.reading import find_data, ranks_of
from lit_isdpo.types import InputError


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


class StepGuard:
    """Looks at the losses and the gradient of an optimizer step before the weights change.

    Args:
        nonfinite: what to do where they are NaN or infinite.
        forget: is called where a step is not made, so that later ones do not know of it.

    Attributes:
        num_skipped: steps of the fit that were left out.
        skips: whether the current step is.
    """

    def __init__(self, nonfinite: NonFinite, forget: Callable[[], None]) -> None:
        self.nonfinite = nonfinite
        self._forget = forget
        self.num_skipped = 0
        self._in_a_row = 0
        self._losses: list[Tensor] = []
        self._row_ids: list[Tensor] = []
        self.skips = False

    def add(self, losses: Tensor, row_ids: Tensor) -> None:
        """Keeps a micro-batch's losses, ``(B,)``, and its rows."""
        self._losses.append(losses.detach())
        self._row_ids.append(row_ids)

    def check_losses(self, trainer: pl.Trainer) -> None:
        """Looks at the losses since the last step, of all ranks.

        Raises:
            NonFiniteError: one is not finite, and the fit ends.
        """
        self.skips = False
        bad = ~torch.isfinite(torch.cat(self._losses))
        if trainer.strategy.reduce_boolean_decision(bool(bad.any()), all=False):  # together, as above
            self._leave_out(trainer, "loss", torch.cat(self._row_ids)[bad])

    def admits_gradient(self, trainer: pl.Trainer, norm: Tensor) -> bool:
        """Whether the step is to be made; the rows are forgotten.

        Args:
            trainer: of the fit.
            norm: of the gradient, the same on all ranks.

        Raises:
            NonFiniteError: it is not finite, and the fit ends.
        """
        if not self.skips and not torch.isfinite(norm):
            self._leave_out(trainer, "gradient", torch.cat(self._row_ids))
        self._losses, self._row_ids = [], []
        if self.skips:
            self._forget()
        else:
            self._in_a_row = 0
        return not self.skips

    def _leave_out(self, trainer: pl.Trainer, what: str, row_ids: Tensor) -> None:
        """Marks the step as one to skip, or raises; every rank comes here."""
        rows = [row for part in ranks_of(trainer).gather(row_ids[row_ids >= 0].tolist()) for row in part]
        named = f"{'for' if what == 'loss' else 'in the step of'} {row_names(trainer, torch.tensor(rows))}"
        said = f"The {what} is NaN or infinite at optimizer step {trainer.global_step} {named}"
        if self.nonfinite.action == "stop":
            self._forget()
            advice = "look at those rows" if what == "loss" else "float32 for the model's compute_dtype"
            raise NonFiniteError(
                f"{said}; the weights are as they were before this step. Try a lower learning rate, or {advice}, or go "
                "on without such steps by --model.nonfinite.action skip."
            )
        if self._in_a_row == self.nonfinite.max_in_a_row:
            self._forget()
            raise NonFiniteError(
                f"{said}, after {self._in_a_row} skipped steps in a row, which is model.nonfinite.max_in_a_row; the "
                "weights are as they were before them. Try a lower learning rate."
            )
        self.skips = True
        self._in_a_row += 1
        self.num_skipped += 1
        rank_zero_info(f"{said}; the step is skipped.")

    def state_dict(self) -> dict[str, int]:
        """The counts, for a fit that goes on."""
        return {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes them back."""
        self.num_skipped, self._in_a_row = state["num_skipped"], state["in_a_row"]


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
