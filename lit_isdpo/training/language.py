"""What all training shares, of policies and reward models: the optimizer, checks, gradient clipping."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.tokenization import load_tokenizer
from lit_isdpo.policy.adapters import check_same_tensors
from lit_isdpo.policy.attention import kernel_of
from lit_isdpo.policy.loading import PolicyConfig, compile_layers, model_path, switch_length
from lit_isdpo.policy.logprob_model import LogProbModel, whole
from lit_isdpo.policy.reference import Reference
from lit_isdpo.policy.reward_model import ScoreModel
from lit_isdpo.policy.sharding import all_ranks
from lit_isdpo.policy.vocabulary import check_rows, first_without_row
from lit_isdpo.training.guards import NonFinite, StepGuard
from lit_isdpo.training.optimization import Schedule, ScheduledRate, build_optimizer, check_options
from lit_isdpo.types import InputError, Ranks

SKIPPED_KEY = "skipped_steps"  # of a checkpoint


def adamw(params: Any) -> torch.optim.Optimizer:
    """The default optimizer."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


class LanguageModule(LightningModule, ABC):
    """A language model in training, whatever it is trained to say.

    Args:
        source: names the model.
        architecture: its configuration.
        optimizer: makes the optimizer from the parameters that are trained.
        schedule: of the learning rate.
        decay_norms_and_biases: whether the optimizer's weight decay acts on these too, and not only on matrices.
        nonfinite: what becomes of a step whose loss or gradient is NaN.

    Raises:
        InputError: the optimizer refuses its numbers, or one of them is not finite; or the tokenizer has tokens that
            the model has no rows for.
    """

    def __init__(
        self,
        source: PolicyConfig,
        architecture: PretrainedConfig,
        *,
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),  # noqa: B008 - immutable
        decay_norms_and_biases: bool = False,
        nonfinite: NonFinite = NonFinite(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        check_options(optimizer)
        self.source = source
        self.architecture = architecture
        self.make_optimizer = optimizer
        self.shares_prompts = False  # whether its batches hold a pair a row, with one prompt for both responses
        self.samples = False  # whether it is trained on responses of its own
        self.schedule = schedule
        self.decay_norms_and_biases = decay_norms_and_biases
        self.guard = StepGuard(nonfinite, self.forget_window)
        self.tokenizer = load_tokenizer(
            model_path(source), revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        check_rows(source, architecture, self.tokenizer, option="model.policy.path")
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
        self._say_what_is_left_out()
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return
        self._pin_rope(datamodule.max_length)
        if datamodule.tokenizer_path is not None:
            raise InputError("data.tokenizer: with a model the tokenizer is the model's own; save it into its folder.")
        positions = self.positions
        if positions is not None and datamodule.max_length > positions:
            raise InputError(
                f"data.max_length: {datamodule.max_length} tokens are more than the model's {positions}"
                + (f", as rope_length is {self.source.rope_length}." if self._has_short_rope else ".")
            )

    @property
    def positions(self) -> int | None:
        """The longest input, in tokens, that the model computes as it was trained to; ``None`` has no limit."""
        positions: int | None = getattr(self.architecture, "max_position_embeddings", None)
        return switch_length(self.architecture) if self._has_short_rope else positions

    @property
    def _has_short_rope(self) -> bool:
        """Whether LongRoPE has the frequencies for short inputs in this run."""
        switch = switch_length(self.architecture)
        chosen = self.source.rope_length or self.trainer.datamodule.max_length  # type: ignore[attr-defined]
        return switch is not None and chosen <= switch

    def _pin_rope(self, max_length: int) -> None:
        """Decides which of its frequencies LongRoPE has in this run."""
        if self.source.rope_length is not None:
            return
        self.source = replace(self.source, rope_length=max_length)
        switch = switch_length(self.architecture)
        if switch is not None:
            kind = "long" if max_length > switch else "short"
            rank_zero_info(
                f"The model has rotary frequencies for inputs of up to {switch:,} tokens and others for longer ones "
                f"(LongRoPE). All inputs get those for {kind} ones, because data.max_length is {max_length:,}; "
                "model.policy.rope_length can say otherwise."
            )

    def say_attention(self, model: PreTrainedModel, option: str) -> None:
        """Names the attention of a model that has not the one that was asked for."""
        if (kernel := kernel_of(model.config)) != self.source.attn_implementation:
            rank_zero_info(
                f"{option}: {type(model).__name__} has no {self.source.attn_implementation} attention, so its "
                f"attn_implementation is {kernel}."
            )

    def _say_what_is_left_out(self) -> None:
        """Names a term that transformers' own loss would have."""
        if self.trainer.state.fn == TrainerFn.FITTING and getattr(self.architecture, "router_aux_loss_coef", None):
            rank_zero_info(
                "The model is a mixture of experts. Its load-balancing loss (router_aux_loss_coef) is not added to the "
                "loss."
            )

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
    def data(self) -> TextDataModule:
        """The trainer's data module.

        Raises:
            InputError: it has none of ours.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TextDataModule):
            raise InputError("data: pass a PreferenceDataModule or an SFTDataModule to the trainer.")
        return data

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
            limits.append(self.trainer.max_epochs * self.trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]
        if not limits:
            raise InputError("trainer: set max_epochs or max_steps, so that the end of the schedule is known.")
        return min(limits)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over what is trained, one schedule over optimizer steps."""
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        optimizer = build_optimizer(self.make_optimizer, trained, decay_norms_and_biases=self.decay_norms_and_biases)
        total_steps = 1 if self.schedule.decay == "constant" else self.total_steps
        scheduler = ScheduledRate(optimizer, self.schedule, total_steps)
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
        rate = optimizer.param_groups[0]["lr"]
        self.log("train/lr", torch.full((), rate, dtype=torch.float64, device=self.device))
        self.log("train/grad_norm", norm)
        if gradient_clip_val:
            self.log("train/grad_clipped", (norm > gradient_clip_val).float())
