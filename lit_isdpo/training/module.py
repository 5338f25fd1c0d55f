"""What supervised and preference training share: the policy, its tokenizer, the optimizer and its schedule."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_isdpo.data.collation import batch_prompts, collate_prompts
from lit_isdpo.data.tokenization import load_tokenizer, pad_token_id, terminator_ids
from lit_isdpo.policy.adapters import check_same_tensors
from lit_isdpo.policy.generation import sample_responses
from lit_isdpo.policy.loading import PolicyConfig, load_config
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import InputError, PreferenceBatch, PromptBatch, SFTBatch

WEIGHTS_PREFIX = "policy.model."  # of the model's tensors in a checkpoint
BASE_KEY = "base_fingerprint"  # of a checkpoint that holds an adapter alone


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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ``predict`` samples responses; the probe's KL has its own, fixed at temperature 1 and top-p 1.

    Args:
        max_new_tokens: longer responses are cut.
        temperature: divides the logits, above 0.
        top_p: nucleus, above 0 and at most 1.
        seed: the responses are a function of it, the weights and the batch size.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"sampling.max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise InputError(f"sampling.temperature must be above 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p must be above 0 and at most 1, not {self.top_p}.")


class Prediction(NamedTuple):
    """A sampled response, as ``predict`` writes it."""

    row_id: int
    prompt: str
    response: str
    finished: bool


class PolicyModule(LightningModule, ABC):
    """A trainable policy.

    Args:
        policy: the model that is trained.
        optimizer: makes the optimizer from the policy's parameters.
        schedule: of the learning rate.
        sampling: how ``predict`` samples.
    """

    policy: LogProbModel

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__()
        self.policy_config = policy
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.sampling = sampling
        self.policy_model_config = load_config(
            policy
        ).get_text_config()  # so that a model that is none is found out before any data is read
        self.tokenizer = load_tokenizer(
            policy.path, revision=policy.revision, trust_remote_code=policy.trust_remote_code
        )

    @property
    def reference(self) -> Reference | None:
        """The frozen model that KL is measured to; supervised training has none."""
        return None

    @property
    @abstractmethod
    def method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its numbers, for tables of runs."""

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
        positions = getattr(self.policy_model_config, "max_position_embeddings", None)
        if positions is not None and datamodule.max_length > positions:
            raise InputError(f"data.max_length: {datamodule.max_length} tokens are more than the model's {positions}.")

    def configure_model(self) -> None:
        """Loads the policy; Lightning calls this once for each of fit, validate, test and predict."""
        if not hasattr(self, "policy"):
            self.policy = load_logprob_model(self.policy_config)
            self.policy.train()  # dropout is 0; gradient checkpointing works in training mode alone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint holds: of a policy with an adapter, the adapter alone."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.policy.adapter is None:
            return state
        names = self.policy.adapter.names
        return {key: value for key, value in state.items() if key.removeprefix(WEIGHTS_PREFIX) in names}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes back what ``state_dict`` gave, all of it and nothing else, whatever ``strict`` says.

        Raises:
            InputError: the checkpoint is of another model or another adapter.
        """
        try:
            check_same_tensors(self.state_dict(), state_dict)
        except ValueError as error:
            option = "path" if self.policy.adapter is None else "peft"
            raise InputError(
                f"ckpt_path: the checkpoint's tensors are not those of model.policy.{option} ({error}); use the "
                "config.yaml of its own run."
            ) from error
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside an adapter, keeps what tells its base from others."""
        if self.policy.adapter is not None:
            checkpoint[BASE_KEY] = self.policy.adapter.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this kind, and of this base.

        Raises:
            InputError: an adapter meets a whole model, or another base than its own.
        """
        adapter, base = self.policy.adapter, checkpoint.get(BASE_KEY)
        if adapter is None and base is not None:
            raise InputError("ckpt_path: the checkpoint holds an adapter alone; set model.policy.peft as its run did.")
        if adapter is not None and base is None:
            raise InputError(
                "ckpt_path: the checkpoint holds a whole model and no adapter; leave model.policy.peft out, or begin "
                "anew from what `lit-isdpo export` makes of it."
            )
        if adapter is not None and base != adapter.base_fingerprint:
            raise InputError(
                f"model.policy.path: {self.policy_config.path!r} has other weights than the model that the "
                "checkpoint's adapter was trained on (or other ones in this dtype); name that one."
            )

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

    def log_step(self) -> None:
        """Puts a validation inside a fit at the number of optimizer steps taken; Lightning would put it one before."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))

    def predict_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> list[Prediction]:
        """Samples one response to each prompt of the batch; the batch's own responses are not looked at."""
        prompts = batch_prompts(batch)
        padded = collate_prompts([prompt for _, prompt in prompts], pad_token_id=self.pad_token_id)
        responses = sample_responses(
            self.policy.model,
            PromptBatch(*(field.to(self.device) for field in padded)),
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed * 100_003 + batch_idx * self.trainer.world_size + self.global_rank,
            compute_dtype=self.policy.compute_dtype,
        )
        return [
            Prediction(row_id, self._decode(prompt), self._decode(response.token_ids), response.finished)
            for (row_id, prompt), response in zip(prompts, responses, strict=True)
            if row_id >= 0
        ]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

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
        if not torch.isfinite(norm):
            raise InputError(
                f"The gradient is NaN or infinite at optimizer step {self.trainer.global_step}; the weights are as "
                "they were before this step. Try a lower learning rate, or float32 for model.policy.compute_dtype."
            )
        self.log("train/grad_norm", norm)
        if gradient_clip_val:
            self.log("train/grad_clipped", (norm > gradient_clip_val).float())
