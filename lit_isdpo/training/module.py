"""What supervised and preference training share: the policy, its tokenizer, the optimizer and its schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_isdpo.data.tokenization import load_tokenizer, pad_token_id, terminator_ids
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model
from lit_isdpo.policy.reference import ResidentReference
from lit_isdpo.types import InputError


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


class PolicyModule(LightningModule):
    """A trainable policy.

    Args:
        policy: the model that is trained.
        optimizer: makes the optimizer from the policy's parameters.
        schedule: of the learning rate.
    """

    policy: LogProbModel

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),
    ) -> None:
        super().__init__()
        self.policy_config = policy
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.tokenizer = load_tokenizer(
            policy.path, revision=policy.revision, trust_remote_code=policy.trust_remote_code
        )

    @property
    def reference(self) -> ResidentReference | None:
        """The frozen model that KL is measured to; supervised training has none."""
        return None

    @property
    def method(self) -> dict[str, Any]:
        """What distinguishes this run's method from another's, as plain values, for tables of runs."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Loads the policy; Lightning calls this once for each of fit, validate, test and predict."""
        if not hasattr(self, "policy"):
            self.policy = load_logprob_model(self.policy_config)
            self.policy.train()  # dropout is 0; gradient checkpointing works in training mode alone

    @property
    def eos_token_ids(self) -> list[int]:
        """Every token that ends a response: the tokenizer's, and what the model's generation config adds."""
        generation_config = self.policy.model.generation_config
        own = generation_config.eos_token_id if generation_config is not None else None
        others = own if isinstance(own, list) else [own]
        return sorted({*terminator_ids(self.tokenizer), *(token for token in others if token is not None)})

    @property
    def pad_token_id(self) -> int:
        """Fills rows; masks say what is padding."""
        return pad_token_id(self.tokenizer)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole fit.

        Lightning's ``estimated_stepping_batches`` is not read: it sets up the loaders before their state is restored.
        """
        if self.trainer.max_steps != -1:
            return self.trainer.max_steps
        if self.trainer.max_epochs in (None, -1):
            raise InputError("trainer: set max_epochs or max_steps, so that the end of the schedule is known.")
        return int(self.trainer.max_epochs * self.trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over the policy, one schedule over optimizer steps."""
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        total_steps = 1 if self.schedule.decay == "constant" else self.total_steps
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm, and logs how often: clipping all the time divides small weights away, as Adam does."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        self.log("train/grad_norm", norm)
        if gradient_clip_val:
            self.log("train/grad_clipped", (norm > gradient_clip_val).float())
