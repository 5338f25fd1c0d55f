"""The base of all modules: the step and its logs, checkpoints, sampling, and checks of the data.

It is longer than other modules because Lightning calls all of its hooks on one class. Most hooks are one call: of
``models`` (loading, checkpoints, responses), ``reading`` (the data), ``comparison`` (the reference) or ``guards``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PretrainedConfig

from lit_isdpo.data.collation import Layout
from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.encoding import load_tokenizer
from lit_isdpo.data.outcomes import Split
from lit_isdpo.evaluation.reference_logps import cached_logps
from lit_isdpo.objective.metrics import LOG_WEIGHTS, Columns, PairMetrics, RowMetrics
from lit_isdpo.policy.generation import Vocabulary
from lit_isdpo.policy.loading import PolicyConfig, compile_layers, model_path
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model, outline_logprob_model, whole
from lit_isdpo.policy.reference import Reference, ResidentReference
from lit_isdpo.policy.reward_model import ScoreModel
from lit_isdpo.policy.vocabulary import check_rows, first_without_row
from lit_isdpo.training.comparison import Comparison
from lit_isdpo.training.guards import NonFinite, StepGuard
from lit_isdpo.training.models import (
    BASE_KEY,
    WEIGHTS_PREFIX,
    Prediction,
    PredictSampling,
    check_base,
    check_positions,
    check_tensors,
    fit_length,
    load_policy,
    outline_source,
    predict,
    vocabulary_of,
)
from lit_isdpo.training.optimization import Schedule, ScheduledRate, build_optimizer, check_options
from lit_isdpo.training.reading import Limits, find_data, hand_over, lift_limits, limit_epoch, ranks_of, total_steps
from lit_isdpo.types import InputError, PreferenceBatch, Ranks, Reward, SFTBatch

SKIPPED_KEY = "skipped_steps"  # of a checkpoint

Stage = Literal["train", "val", "test", "plan"]
"""What a step is for; a plan of memory and time asks for the losses of a training step without values."""


def adamw(params: Any) -> torch.optim.Optimizer:
    """The default optimizer."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


class LanguageModule(LightningModule, ABC):
    """A language model in training, whatever it is trained to say. A method gives ``step``.

    Args:
        source: names the model.
        architecture: its configuration.
        comparison: scores pairs beside a reference, if the method has one.
        sampling: how ``predict`` samples.
        optimizer: makes the optimizer from the parameters that are trained.
        schedule: of the learning rate.
        decay_norms_and_biases: whether the optimizer's weight decay acts on these too, and not only on matrices.
        nonfinite: what becomes of a step whose loss or gradient is NaN.

    Attributes:
        network_name: the attribute that holds what is trained, the first part of its tensors' names in a checkpoint.
        writes: whether responses can be sampled from it; then ``policy`` is there from ``configure_model`` on.
        samples: whether it is trained on responses of its own.
        micro_batch: number of the training micro-batch in its epoch.

    Raises:
        InputError: the optimizer refuses its numbers, or one of them is not finite; or the tokenizer has tokens that
            the model has no rows for.
    """

    network_name: ClassVar[str] = "policy"
    writes: ClassVar[bool] = True
    policy: LogProbModel

    def __init__(
        self,
        source: PolicyConfig,
        architecture: PretrainedConfig,
        *,
        comparison: Comparison | None = None,
        sampling: PredictSampling = PredictSampling(),  # noqa: B008 - immutable
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),  # noqa: B008 - immutable
        decay_norms_and_biases: bool = False,
        nonfinite: NonFinite = NonFinite(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        check_options(optimizer)
        self.source = source
        self.architecture = architecture
        self.comparison = comparison
        self.sampling = sampling
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.decay_norms_and_biases = decay_norms_and_biases
        self.samples = False
        self.micro_batch = 0
        self._limits: Limits | None = None  # of the trainer, before they were made whole steps
        self.train_metrics, self.val_metrics, self.test_metrics = RowMetrics(), RowMetrics(), RowMetrics()
        self.guard = StepGuard(nonfinite, self.forget_window)
        self.tokenizer = load_tokenizer(
            model_path(source), revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        check_rows(source, architecture, self.tokenizer, option="model.policy.path")
        self.first_without_row = first_without_row(architecture, self.tokenizer)
        if comparison is not None:
            comparison.check_vocabulary(self.tokenizer, architecture)

    @abstractmethod
    def step(self, batch: Any, stage: Stage) -> tuple[Tensor, Columns]:
        """``(B,)`` losses of a batch, with gradient, and what is logged about its rows."""

    @property
    @abstractmethod
    def method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its numbers, for tables of runs."""

    @property
    def random_start(self) -> str | None:
        """A sentence that says what of the model is drawn at random before a fit; ``None`` if all of it is loaded."""
        if self.source.init == "pretrained":
            return None
        return (
            "The policy starts from random weights, as model.policy.init is random: "
            f"{self.source.path!r} gives only its architecture."
        )

    @property
    def network(self) -> LogProbModel | ScoreModel:
        """What is trained; there from ``configure_model`` on."""
        network: LogProbModel | ScoreModel = getattr(self, self.network_name)
        return network

    @property
    def reference(self) -> Reference | None:
        """The frozen model that KL is measured to, if there is one."""
        return None if self.comparison is None else self.comparison.reference

    @property
    def reward(self) -> Reward | None:
        """What the policy is trained on; only online methods have one."""
        return None

    @property
    def shares_prompts(self) -> bool:
        """Whether its batches hold one row per pair, with one prompt for both responses."""
        return self.comparison is not None and self.comparison.shares_prompts

    @property
    def data(self) -> TextDataModule:
        """The trainer's data module.

        Raises:
            InputError: it has none of ours.
        """
        data = find_data(self.trainer)
        if data is None:
            raise InputError("data: pass a PreferenceDataModule or an SFTDataModule to the trainer.")
        return data

    @property
    def ranks(self) -> Ranks:
        """The trainer's processes."""
        return ranks_of(self.trainer)

    @property
    def logs_this_step(self) -> bool:
        """Whether Lightning writes what this optimizer step logs."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every > 0 and (self.trainer.global_step + 1) % every == 0)

    def hand_over(self, data: TextDataModule) -> None:
        """Tells a data module that this model reads its rows."""
        hand_over(
            self.trainer,
            data,
            tokenizer=self.tokenizer,
            first_without_row=self.first_without_row,
            mixes_pairs=self.comparison is not None and self.comparison.weighting.mixes_pairs,
            shares_prompts=lambda: self.shares_prompts,
        )

    def configure_callbacks(self) -> list[Callback]:
        """Adds none: this is the first hook of a run, in which the data module hears of it."""
        if (data := find_data(self.trainer)) is not None:
            self.hand_over(data)
        return []

    # Models

    def setup(self, stage: str) -> None:
        """Checks the trainer and, if it has a data module, the data.

        Raises:
            InputError: the device has no float64, in which sums are kept.
        """
        if self.trainer.strategy.root_device.type == "mps":
            raise InputError("trainer.accelerator: Apple GPUs have no float64 and are not supported; use cpu.")
        if self.trainer.state.fn == TrainerFn.FITTING and getattr(self.architecture, "router_aux_loss_coef", None):
            rank_zero_info(
                "The model is a mixture of experts. Its load-balancing loss (router_aux_loss_coef) is not added to the "
                "loss."
            )
        if (data := find_data(self.trainer)) is not None:
            self.check_data(data, stage)

    def check_data(self, data: TextDataModule, stage: str) -> None:
        """Checks what only the trainer and the data together can tell.

        Raises:
            InputError: rows longer than the model's positions, or another tokenizer than the model's.
        """
        if data.tokenizer_path is not None:
            raise InputError("data.tokenizer: with a model the tokenizer is the model's own; save it into its folder.")
        if stage == "fit":
            self._limits = limit_epoch(self.trainer, data)
        self.source = fit_length(self.source, self.architecture, data.max_length)
        if stage == "predict":
            option = "model.sampling.max_new_tokens"
            self.check_positions(data.split_to_predict, self.sampling.max_new_tokens, option)

    def teardown(self, stage: str) -> None:
        """Leaves the trainer as it was."""
        if stage == "fit" and self._limits is not None:
            lift_limits(self.trainer, self._limits)
            self._limits = None

    def check_positions(self, split: Split, max_new_tokens: int, option: str, num_prompts: int | None = None) -> None:
        """Raises for responses beyond the positions that the model knows, as ``models.check_positions``."""
        check_positions(self.source, self.architecture, self.data, split, max_new_tokens, option, num_prompts)

    def configure_model(self) -> None:
        """Loads what the run needs; Lightning calls this once for each of fit, validate, test and predict."""
        is_new = not hasattr(self, self.network_name)
        if is_new:
            # Dropout is 0; gradient checkpointing works only in training mode.
            setattr(self, self.network_name, self.load_network().train())
        if self.comparison is not None and self.trainer.state.fn != TrainerFn.PREDICTING:
            self.comparison.load(self.source, self.policy, self.load_model, self._cached_logps, is_new=is_new)

    def configure_outline(self) -> None:
        """Does as ``configure_model``, without weights: all that is in memory in a fit is there, on the meta device."""
        setattr(self, self.network_name, self.load_network(outline=True).train())
        if self.comparison is not None:
            self.comparison.outline(outline_source(self.source), self.policy)

    def load_network(self, *, outline: bool = False) -> LogProbModel | ScoreModel:
        """What is trained; an outline has no weights."""
        if outline:
            return outline_logprob_model(outline_source(self.source))
        return self.load_model(self.source, option="model.policy.path")

    def load_model(self, config: PolicyConfig, *, option: str) -> LogProbModel:
        """A model as the trainer's strategy holds it: whole, or this rank's part of it."""
        sharding = getattr(self.trainer.strategy, "sharding", None)
        return load_policy(config, self.tokenizer, load_logprob_model if sharding is None else sharding.load, option)

    def _cached_logps(self, reference: Reference, layout: Layout) -> dict[str, Tensor]:
        """The reference's log-probs of all rows, by split."""
        assert self.comparison is not None
        assert self.comparison.config is not None
        if not self.policy.is_sharded:
            # Where an adapter's base is; else it goes there soon anyway.
            self.policy.to(self.trainer.strategy.root_device)
        return cached_logps(
            self.data,
            reference,
            self.comparison.config.folder(self.trainer.default_root_dir),
            device=self.trainer.strategy.root_device,
            ranks=self.ranks,
            layout=layout,
            with_test=self.comparison.caches_test_rows,
        )

    # The reference is not a submodule, so Lightning does not move it.

    def on_fit_start(self) -> None:
        """Moves the reference to the policy's device."""
        if self.reference is not None:
            self.reference.to(self.device)

    on_validation_start = on_test_start = on_fit_start

    def on_train_start(self) -> None:
        """Says what a fresh fit starts from that is random, and compiles what the config wants compiled."""
        if self.random_start and self.trainer.global_step == 0:
            rank_zero_info(self.random_start)
        if self.source.compile:
            compile_layers(self.network.model)
            if isinstance(self.reference, ResidentReference):
                compile_layers(self.reference.model.model)

    # Steps

    def on_train_batch_start(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> None:
        """Holds no more of the reference than a step needs."""
        if self.reference is not None:
            self.reference.release()

    def training_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> Tensor:
        """Loss of the micro-batch."""
        self.micro_batch = batch_idx
        losses, columns = self.step(batch, "train")
        self.train_metrics.update(columns, batch.num_counted)
        self.guard.add(losses, batch.row_ids)
        return self.reduced(losses)

    def micro_batch_loss(self, batch: PreferenceBatch | SFTBatch) -> Tensor:
        """What ``training_step`` returns, and nothing else: no metrics, no checks, no logs."""
        return self.reduced(self.step(batch, "plan")[0])

    def reduced(self, losses: Tensor) -> Tensor:
        """What is differentiated: all micro-batches are equally large, so the mean of their means is the mean."""
        return losses.mean()

    def validation_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the validation."""
        self.val_metrics.update(self.step(batch, "val")[1], batch.num_counted)

    def test_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the test."""
        self.test_metrics.update(self.step(batch, "test")[1], batch.num_counted)

    @property
    def is_first_micro_batch(self) -> bool:
        """Whether the policy has learned nothing yet."""
        return self.micro_batch == 0 and self.trainer.global_step == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step as it is, NaN too where it will be skipped.

        Raises:
            NonFiniteError: a loss is NaN or infinite, and the fit ends.
        """
        self.guard.check_losses(self.trainer)
        self.log_window()

    def log_window(self) -> None:
        """Logs the micro-batches of an optimizer step as a whole, before their gradient is used."""
        self.log_metrics("train")

    def forget_window(self) -> None:
        """Forgets them, where the step is not made."""
        self.train_metrics.forget()

    def log_metrics(self, stage: Stage) -> dict[str, Tensor]:
        """Logs and returns the means of a stage's rows, and begins new ones."""
        metrics: RowMetrics = getattr(self, f"{stage}_metrics")
        values: dict[str, Tensor] = metrics.compute()
        metrics.reset()
        self.log_dict({f"{stage}/{key}": value for key, value in values.items()})
        return values

    def on_validation_epoch_end(self) -> None:
        """Logs the validation set's values and the histograms of its weights and the last training pairs'."""
        for stage, metrics in (("train", self.train_metrics), ("val", self.val_metrics)):
            if isinstance(metrics, PairMetrics) and len(weights := metrics.recent_log_weights):
                for logger in self.loggers if torch.isfinite(weights).all() else ():
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_histogram(f"{stage}/{LOG_WEIGHTS}", weights, self.trainer.global_step)
        self.log_metrics("val")
        if self.trainer.state.fn == TrainerFn.FITTING:  # the steps that were taken; Lightning would put it one before
            self.log("step", float(self.trainer.global_step))

    def on_test_epoch_end(self) -> None:
        """Logs the test set's values."""
        self.log_metrics("test")

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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over what is trained, one schedule over optimizer steps."""
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        optimizer = build_optimizer(self.make_optimizer, trained, decay_norms_and_biases=self.decay_norms_and_biases)
        steps = 1 if self.schedule.decay == "constant" else total_steps(self.trainer, lambda: self.data)
        scheduler = ScheduledRate(optimizer, self.schedule, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint holds: of a policy with an adapter, only the adapter."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.network.adapter is None:
            return state
        names = self.network.adapter.names
        return {key: value for key, value in state.items() if key.removeprefix(WEIGHTS_PREFIX) in names}

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
        check_tensors(self.state_dict(), tensors, self.network.adapter)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how many steps were skipped and, beside an adapter, what tells its base from others."""
        checkpoint[SKIPPED_KEY] = self.guard.state_dict()
        if self.network.adapter is not None:
            checkpoint[BASE_KEY] = self.network.adapter.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the count, and checks that the checkpoint is of this model.

        Raises:
            InputError: an adapter meets a whole model, or another base than its own.
        """
        if SKIPPED_KEY in checkpoint:
            self.guard.load_state_dict(checkpoint[SKIPPED_KEY])
        check_base(self.network.adapter, checkpoint.get(BASE_KEY), self.source.path)

    # Responses

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer; a response also ends at the tokens that the model's generation config names."""
        return vocabulary_of(self.policy, self.tokenizer)

    def predict_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> list[Prediction]:
        """Samples responses to each prompt of the batch; the batch's own responses are not looked at."""
        return predict(self.policy, batch, self.sampling, self.vocabulary, batch_idx, self.global_rank)
