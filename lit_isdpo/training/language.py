"""The base of all modules: the step and its logs, checkpoints and sampling.

Callbacks come with a module. ``WholeSteps`` sets the trainer's limits. The guard looks at an optimizer step before it
is made. A method that scores pairs adds its ``Comparison``.
"""

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

from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.encoding import load_tokenizer
from lit_isdpo.objective.metrics import LOG_WEIGHTS, Columns, PairMetrics, RowMetrics
from lit_isdpo.policy.generation import Vocabulary
from lit_isdpo.policy.loading import PolicyConfig, compile_layers, model_path
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model, outline_logprob_model
from lit_isdpo.policy.reference import Reference
from lit_isdpo.policy.reward_model import ScoreModel
from lit_isdpo.policy.vocabulary import check_rows, first_without_row
from lit_isdpo.training import models
from lit_isdpo.training.comparison import Comparison
from lit_isdpo.training.optimization import adamw, build_optimizer, check_options
from lit_isdpo.training.optimizer_step import NonFinite, Schedule, ScheduledRate, StepGuard
from lit_isdpo.training.reading import WholeSteps, data_of, find_data, hand_over, ranks_of, total_steps
from lit_isdpo.types import InputError, PreferenceBatch, Ranks, Reward, SFTBatch

Stage = Literal["train", "val", "test", "plan"]
"""What a step is for; a plan of memory and time asks for the losses of a training step without values."""


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
        sampling: models.PredictSampling = models.PredictSampling(),
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),
        decay_norms_and_biases: bool = False,
        nonfinite: NonFinite = NonFinite(),
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
        self.train_metrics, self.val_metrics, self.test_metrics = RowMetrics(), RowMetrics(), RowMetrics()
        self.guard = StepGuard(nonfinite)
        self._callbacks = [WholeSteps(), self.guard, *([] if comparison is None else [comparison])]
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
        path = self.source.path
        return f"The policy starts from random weights (model.policy.init): {path!r} gives only its architecture."

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
        """The trainer's data module."""
        return data_of(self.trainer)

    @property
    def ranks(self) -> Ranks:
        """The trainer's processes."""
        return ranks_of(self.trainer)

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
        """Returns the module's own. This is the first hook of a run, so the data module hears of the run here."""
        if (data := find_data(self.trainer)) is not None:
            self.hand_over(data)
        untyped: Any = self.trainer  # it still has those of its run before, which may be another module's
        kinds = (WholeSteps, StepGuard, Comparison)
        untyped.callbacks = [callback for callback in untyped.callbacks if not isinstance(callback, kinds)]
        return self._callbacks

    # Models

    def setup(self, stage: str) -> None:
        """Raises for a device without float64, in which sums are kept, and for data that does not fit."""
        if self.trainer.strategy.root_device.type == "mps":
            raise InputError("trainer.accelerator: Apple GPUs have no float64 and are not supported; use cpu.")
        if self.trainer.state.fn == TrainerFn.FITTING and getattr(self.architecture, "router_aux_loss_coef", None):
            rank_zero_info("The model's load-balancing loss (router_aux_loss_coef) is not part of the loss.")
        if (data := find_data(self.trainer)) is not None:
            self.check_data(data, stage)

    def check_data(self, data: TextDataModule, stage: str) -> None:
        """Raises for rows longer than the model's positions, and for another tokenizer than the model's."""
        if data.tokenizer_path is not None:
            raise InputError("data.tokenizer: with a model the tokenizer is the model's own; save it into its folder.")
        self.source = models.fit_length(self.source, self.architecture, data.max_length)
        if stage == "predict":
            limit = self.sampling.max_new_tokens
            models.check_positions(self, data.split_to_predict, limit, "model.sampling.max_new_tokens")

    def configure_model(self) -> None:
        """Loads what the run needs; Lightning calls this once for each of fit, validate, test and predict."""
        is_new = not hasattr(self, self.network_name)
        if is_new:
            # Dropout is 0; gradient checkpointing works only in training mode.
            setattr(self, self.network_name, self.load_network().train())
        if self.comparison is not None and self.trainer.state.fn != TrainerFn.PREDICTING:
            self.comparison.load(self, is_new=is_new)

    def configure_outline(self) -> None:
        """Does as ``configure_model``, without weights: all that is in memory in a fit is there, on the meta device."""
        setattr(self, self.network_name, self.load_network(outline=True).train())
        if self.comparison is not None:
            self.comparison.outline(models.outline_source(self.source), self.policy)

    def load_network(self, *, outline: bool = False) -> LogProbModel | ScoreModel:
        """What is trained; an outline has no weights."""
        if outline:
            return outline_logprob_model(models.outline_source(self.source))
        return self.load_model(self.source, option="model.policy.path")

    def load_model(self, config: PolicyConfig, *, option: str) -> LogProbModel:
        """A model as the trainer's strategy holds it: whole, or this rank's part of it."""
        sharding = getattr(self.trainer.strategy, "sharding", None)
        load = load_logprob_model if sharding is None else sharding.load
        return models.load_policy(config, self.tokenizer, load, option)

    def on_train_start(self) -> None:
        """Says what a fresh fit starts from that is random, and compiles the model if the config wants it."""
        if self.random_start and self.trainer.global_step == 0:
            rank_zero_info(self.random_start)
        if self.source.compile:
            compile_layers(self.network.model)

    # Steps

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
        """Logs the micro-batches of a step as a whole, before their gradient is used: a NaN too, if it is skipped."""
        self.log_metrics("train")

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
        """Clips by norm. The guard may then end the fit, or drop the gradient and so skip the step."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        values = self.guard.clip(self, parameters, gradient_clip_val)
        rate = optimizer.param_groups[0]["lr"]
        self.log("train/lr", torch.full((), rate, dtype=torch.float64, device=self.device))
        self.log_dict({f"train/{key}": value for key, value in values.items()})

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
        return {key: value for key, value in state.items() if key.removeprefix(models.WEIGHTS_PREFIX) in names}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what ``state_dict`` gave, all of it and nothing else, whatever ``strict`` says."""
        models.check_tensors(self, state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps, beside an adapter, what tells its base from others."""
        if self.network.adapter is not None:
            checkpoint[models.BASE_KEY] = self.network.adapter.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises for an adapter that meets a whole model, or another base than its own."""
        models.check_base(self.network.adapter, checkpoint.get(models.BASE_KEY), self.source.path)

    # Responses

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer; a response also ends at the tokens that the model's generation config names."""
        return models.vocabulary_of(self.policy, self.tokenizer)

    def predict_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> list[models.Prediction]:
        """Samples responses to each prompt of the batch; the batch's own responses are not looked at."""
        return models.predict(self.policy, batch, self.sampling, self.vocabulary, batch_idx, self.global_rank)
