"""What all training shares, of policies and reward models: the optimizer, its schedule, checks, gradient clipping."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PretrainedConfig

from lit_isdpo.data.tokenization import load_tokenizer
from lit_isdpo.policy.adapters import check_same_tensors
from lit_isdpo.policy.loading import TrainedSource, compile_layers, model_path
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.policy.reward_model import ScoreModel
from lit_isdpo.policy.sharding import all_ranks, whole
from lit_isdpo.policy.vocabulary import check_rows, first_without_row
from lit_isdpo.training.guards import NonFinite, StepGuard
from lit_isdpo.types import InputError, Ranks

SKIPPED_KEY = "skipped_steps"  # of a checkpoint


def adamw(params: Any) -> torch.optim.Optimizer:
    """The default optimizer."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


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
        if self.warmup_steps < 0:
            raise InputError(f"schedule.warmup_steps must be at least 0 optimizer steps, not {self.warmup_steps}.")
        if not 0 <= self.final_factor <= 1:
            raise InputError(f"schedule.final_factor must lie between 0 and 1, not {self.final_factor}.")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor at the 0-based optimizer ``step``.

        >>> linear = Schedule(decay="linear", warmup_steps=2)
        >>> [round(linear.factor(step, 12), 3) for step in (0, 1, 2, 7, 12)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        remaining = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_factor + (1 - self.final_factor) * remaining


def _check_optimizer(make_optimizer: OptimizerCallable) -> None:
    """Raises for numbers that an optimizer refuses, or that would make its steps infinite."""
    try:
        optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    except (ValueError, TypeError) as error:
        raise InputError(f"model.optimizer: {error}") from error
    largest = torch.finfo(torch.float32).max
    for group in optimizer.param_groups:
        for name, value in group.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(number, float) and not abs(number) <= largest for number in numbers):
                raise InputError(f"model.optimizer.{name} must be finite, not {value}.")


class LanguageModule(LightningModule, ABC):
    """A language model in training, whatever it is trained to say.

    Args:
        source: names the model.
        architecture: its configuration.
        optimizer: makes the optimizer from the model's parameters.
        schedule: of the learning rate.
        nonfinite: what becomes of a step whose loss or gradient is NaN.

    Raises:
        InputError: the optimizer refuses its numbers, or one of them is not finite; or the tokenizer has tokens that
            the model has no rows for.

    Attributes:
        path_option: the option that names the model, for messages.
    """

    path_option: ClassVar[str]

    def __init__(
        self,
        source: TrainedSource,
        architecture: PretrainedConfig,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        nonfinite: NonFinite,
    ) -> None:
        super().__init__()
        _check_optimizer(optimizer)
        self.source = source
        self.architecture = architecture
        self.make_optimizer = optimizer
        self.shares_prompts = False  # whether its batches hold a pair a row, with one prompt for both responses
        self.samples = False  # whether it is trained on responses of its own
        self.schedule = schedule
        self.guard = StepGuard(nonfinite, self.forget_window)
        self.tokenizer = load_tokenizer(
            model_path(source), revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        check_rows(source, architecture, self.tokenizer, option=self.path_option)
        self.first_without_row = first_without_row(architecture, self.tokenizer)

    @property
    @abstractmethod
    def network(self) -> LogProbModel | ScoreModel:
        """What is trained; there from ``configure_model`` on."""

    @property
    @abstractmethod
    def tensors_option(self) -> str:
        """The option that decides which tensors a checkpoint must have, for messages."""

    @property
    @abstractmethod
    def method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its numbers, for tables of runs."""

    @property
    @abstractmethod
    def random_start(self) -> str | None:
        """A sentence that says what of the model is drawn at random before a fit; ``None`` if all of it is loaded."""

    @abstractmethod
    def configure_outline(self) -> None:
        """Does as ``configure_model``, without weights: all that is in memory in a fit is there, on the meta device."""

    @abstractmethod
    def micro_batch_loss(self, batch: Any) -> Tensor:
        """What ``training_step`` returns, and nothing else: no metrics, no checks, no logs."""

    @abstractmethod
    def log_window(self) -> None:
        """Logs the micro-batches of an optimizer step as a whole, before their gradient is used."""

    @abstractmethod
    def forget_window(self) -> None:
        """Forgets them, where the step is not made."""

    @property
    def reference(self) -> Reference | None:
        """The frozen model that KL is measured to; only preference training has one."""
        return None

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell.

        Raises:
            InputError: rows longer than the model's positions, another tokenizer than the model's, or a device without
                float64, in which sums are kept.
        """
        if self.trainer.strategy.root_device.type == "mps":
            raise InputError("trainer.accelerator: Apple GPUs have no float64 and are not supported; use cpu.")
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return
        if datamodule.tokenizer_path is not None:
            raise InputError("data.tokenizer: with a model the tokenizer is the model's own; save it into its folder.")
        positions = getattr(self.architecture, "max_position_embeddings", None)
        if positions is not None and datamodule.max_length > positions:
            raise InputError(f"data.max_length: {datamodule.max_length} tokens are more than the model's {positions}.")

    def on_train_start(self) -> None:
        """Says what a fresh fit starts from that is random, and compiles what the config wants compiled."""
        if self.random_start and self.trainer.global_step == 0:
            rank_zero_info(self.random_start)
        if self.source.compile:
            compile_layers(self.network.model)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes back what ``state_dict`` gave, all of it and nothing else, whatever ``strict`` says.

        Raises:
            InputError: the checkpoint is of another model.
        """
        self.check_tensors(state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def check_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Compares names and shapes of a checkpoint's tensors with those of ``state_dict``.

        Raises:
            InputError: the checkpoint is of another model.
        """
        try:
            check_same_tensors(self.state_dict(), tensors)
        except ValueError as error:
            raise InputError(
                f"ckpt_path: the checkpoint's tensors are not those of {self.tensors_option} ({error}); use the "
                "config.yaml of its own run."
            ) from error

    @property
    def ranks(self) -> Ranks:
        """The trainer's processes."""
        return all_ranks() if self.trainer.world_size > 1 else Ranks()

    @property
    def logs_this_step(self) -> bool:
        """Whether Lightning writes what this optimizer step logs."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every > 0 and (self.trainer.global_step + 1) % every == 0)

    def log_step(self) -> None:
        """Puts a validation inside a fit at the number of optimizer steps taken; Lightning would put it one before."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole fit.

        Lightning's ``estimated_stepping_batches`` is not read: it sets up the loaders before their state is restored.
        """
        limits = []
        if self.trainer.max_steps != -1:
            limits.append(self.trainer.max_steps)
        if self.trainer.max_epochs is not None and self.trainer.max_epochs != -1:
            limits.append(self.trainer.max_epochs * self._steps_per_epoch)
        if not limits:
            raise InputError("trainer: set max_epochs or max_steps, so that the end of the schedule is known.")
        return min(limits)

    @property
    def _steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, ``limit_train_batches`` counted in: micro-batches, or a share of them."""
        whole = int(self.trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]
        limit, accumulation = self.trainer.limit_train_batches, self.trainer.accumulate_grad_batches
        micro_batches = limit if isinstance(limit, int) else int(limit * whole * accumulation)
        return max(1, min(whole, math.ceil(micro_batches / accumulation)))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over what is trained, one schedule over optimizer steps."""
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        total_steps = 1 if self.schedule.decay == "constant" else self.total_steps
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how many steps were skipped."""
        checkpoint[SKIPPED_KEY] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes that back."""
        if SKIPPED_KEY in checkpoint:
            self.guard.load_state_dict(checkpoint[SKIPPED_KEY])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step as it is, NaN too where it will be skipped.

        Raises:
            NonFiniteError: a loss is NaN or infinite, and the fit ends.
        """
        self.guard.check_losses(self.trainer)
        self.log_window()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Frees the gradients after the step; Lightning would keep them through the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm, and logs how often: clipping all the time divides small weights away, as Adam does.

        Raises:
            NonFiniteError: the gradient is NaN or infinite, and the fit ends.
        """
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf))
        is_made = self.guard.admits_gradient(self.trainer, norm)
        if not is_made:  # optimizers leave parameters without a gradient alone, and their own state of them
            for parameter in parameters:
                parameter.grad = None
        if self.guard.nonfinite.action == "skip":
            self.log("train/skipped_steps", torch.full((), float(self.guard.num_skipped), device=self.device))
        self.log("train/grad_norm", norm)
        if gradient_clip_val:
            self.log("train/grad_clipped", (norm > gradient_clip_val).float())
