"""Preference training: one step shared by training, validation and test."""

import math
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_isdpo.data.collation import Layout
from lit_isdpo.objective.losses import DPOLoss, PreferenceLoss
from lit_isdpo.objective.metrics import OF_BEHAVIOR, OF_REFERENCE, PairMetrics
from lit_isdpo.objective.pairs import PairLogps
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, PairWeights, ProductWeighting
from lit_isdpo.policy.loading import PolicyConfig, compile_layers, load_config
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import (
    CachedReference,
    LiveReference,
    Reference,
    ReferenceConfig,
    ResidentReference,
    check_vocabulary,
    load_reference,
    outline_reference,
    reference_as_policy,
    starts_at_reference,
)
from lit_isdpo.training.guards import NonFinite, check_first_step, warn_of_vanishing_weights
from lit_isdpo.training.language import Schedule, adamw
from lit_isdpo.training.module import PolicyModule, Sampling
from lit_isdpo.training.reference_cache import cached_logps
from lit_isdpo.types import InputError, PreferenceBatch, SequenceLogps


class PreferenceModule(PolicyModule):
    """A trainable policy beside its frozen reference.

    The loss of a batch is the mean over pairs of ``w * f(beta h) + auxiliary``: which ``f`` is ``loss``, which ``w`` is
    ``weighting``. DPO is ``DPOLoss`` with ``UniformWeighting``, IS-DPO is ``DPOLoss`` with ``ImportanceWeighting``.
    Where the data has weights of its own, each multiplies all of its pair's loss.

    Args:
        policy: the model that is trained.
        reference: the frozen model that it is measured against; by default the policy before training. ``null`` holds
            none: for a loss that needs none, at the price of all that is measured against it, KL included.
        loss: loss of a pair.
        weighting: weight of a pair.
        mu: which policy the weights take for the one that wrote the responses. ``auto``: the data's log-probs for the
            responses that have them, else the reference; ``reference``: the reference for all; ``data``: the data's for
            all, and a row without them is an error.
        optimizer: makes the optimizer from the policy's parameters.
        schedule: of the learning rate.
        sampling: how ``predict`` samples.
        nonfinite: what becomes of a step whose loss or gradient is NaN.
        ess_window: most recent training pairs, over all ranks, that ``train/weights/ess`` is taken over.
        prefix_sharing: whether a prompt is computed once for both of its responses, in one row. The values are the same
            to rounding, in less time and memory. ``auto``: where the models' architecture allows it.
    """

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        reference: ReferenceConfig | None = ReferenceConfig(),
        loss: PreferenceLoss = lazy_instance(DPOLoss),
        weighting: PairWeighting = lazy_instance(ImportanceWeighting),
        mu: Literal["auto", "reference", "data"] = "auto",
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
        nonfinite: NonFinite = NonFinite(),  # noqa: B008 - immutable
        ess_window: int = 2048,
        prefix_sharing: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(policy, optimizer, schedule, sampling, nonfinite)
        if ess_window < 1:
            raise InputError(f"model.ess_window must be at least 1 pair, not {ess_window}.")
        if reference is None:
            _check_without_reference(loss, weighting, mu)
        else:
            if reference.path is None and policy.init == "random":
                raise InputError(
                    "model.reference.path: a policy with random weights (init: random) needs one of its own."
                )
            load_config(reference_as_policy(policy, reference), option="model.reference.path")
        self.reference_config = reference
        self.loss = loss
        self.weighting = weighting
        self.mu = mu
        self.ess_window = ess_window
        self.prefix_sharing = prefix_sharing
        unknown = () if reference else OF_REFERENCE if mu == "data" else OF_REFERENCE + OF_BEHAVIOR
        self.train_metrics = PairMetrics(loss, unknown=unknown, window=ess_window)
        self.val_metrics = PairMetrics(loss, unknown=unknown)
        self.test_metrics = PairMetrics(loss, unknown=unknown)
        self.caches_test_rows = False
        self._reference: tuple[Reference, ...] = ()  # in a tuple: a reference is not a part of this module
        self._recent_log_weights: list[Tensor] = []  # as of the last optimizer step
        self._ess_before_resume: Tensor | None = None

    @property
    def reference(self) -> Reference | None:
        """The frozen model that the policy is measured against."""
        return self._reference[0] if self._reference else None

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """Classes of the weighting and the loss, and their numbers."""
        weightings = self.weighting.factors if isinstance(self.weighting, ProductWeighting) else [self.weighting]
        parts = [*weightings, self.loss]
        numbers = {key: value for part in parts for key, value in vars(part).items()}
        return " x ".join(type(part).__name__ for part in parts), numbers | {"mu": self.mu}

    def configure_model(self) -> None:
        """Loads both models; to sample, the policy alone."""
        is_new = not hasattr(self, "policy")
        super().configure_model()
        # What is cached is of one data module's rows, and may be asked for those of another.
        if self.trainer.state.fn == TrainerFn.PREDICTING or (self._reference and self._reference[0].is_live):
            return
        if self.reference_config is None:
            self.shares_prompts = _share_prompts(self.prefix_sharing, self.policy)
        else:
            self._reference = (self._load_reference(self.reference_config, is_new),)

    def _load_reference(self, config: ReferenceConfig, is_new: bool) -> Reference:
        load = partial(load_reference, self.policy_config, config, self.policy, load=self.load_model)
        # Lightning restores a checkpoint after configure_model: here the policy has not learned anything yet.
        untrained = is_new and starts_at_reference(self.policy_config, config)
        is_policy = config.cache and self.policy.adapter is None and untrained
        reference = LiveReference(self.policy) if is_policy else load()
        with reference.scoring() as model:
            check_vocabulary(self.policy, model)
            self.shares_prompts = _share_prompts(self.prefix_sharing, self.policy, model)
        if not config.cache:
            return reference
        if not self.policy.is_sharded:
            # Where an adapter's base is; else it goes there soon anyway.
            self.policy.to(self.trainer.strategy.root_device)
        layout: Layout = "shared" if self.shares_prompts else "plain"
        logps = cached_logps(self.trainer, config, reference, self.ranks, layout, with_test=self.caches_test_rows)
        return CachedReference(logps, load)

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and datamodule is not None and datamodule.rows_per_forward < self.weighting.min_pairs:
            raise InputError(
                f"{type(self.weighting).__name__} works within a micro-batch, so data.micro_batch_size must be at "
                f"least {self.weighting.min_pairs}, not {datamodule.rows_per_forward}."
            )
        if self.mu == "data" and datamodule is not None:
            splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
            for split in splits.get(stage, ()):
                datamodule.check_behavior_logps(split)
        self.train_metrics.window = -(-self.ess_window // self.trainer.world_size)

    # The reference is not a submodule, so Lightning does not move it.

    def on_fit_start(self) -> None:
        """Moves the reference to the policy's device."""
        self.on_validation_start()
        self._restore_window()

    def on_train_start(self) -> None:
        """Compiles both models or none."""
        super().on_train_start()
        if self.source.compile and isinstance(self.reference, ResidentReference):
            compile_layers(self.reference.model.model)

    def on_validation_start(self) -> None:
        """Moves the reference to the policy's device."""
        if self.reference is not None:
            self.reference.to(self.device)

    on_test_start = on_validation_start

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Holds no more of the reference than a step needs."""
        if self.reference is not None:
            self.reference.release()

    def configure_outline(self) -> None:
        """Lays out both models; whether they share prompts is told from the configuration alone."""
        super().configure_outline()
        if self.reference_config is not None:
            reference = outline_reference(self.outline_config, self.reference_config, self.policy)
            self._reference = (reference,)
            with reference.scoring() as model:
                self.shares_prompts = _share_prompts(self.prefix_sharing, self.policy, model)
        else:
            self.shares_prompts = _share_prompts(self.prefix_sharing, self.policy)

    def micro_batch_loss(self, batch: PreferenceBatch) -> Tensor:
        """Mean loss of the micro-batch."""
        pairs = self._pair_logps(batch, "train")
        return self._losses(pairs, self.weighting(pairs), batch).mean()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the micro-batch. All micro-batches are equally large, so the mean of means is the mean."""
        pairs = self._pair_logps(batch, "train")
        if batch_idx == 0 and self.trainer.global_step == 0:
            reference, numerics = self.reference_config, self.policy_config
            if reference is not None and starts_at_reference(numerics, reference):
                check_first_step(pairs, self.loss, numerics, batch.row_ids, self.trainer)
        losses = self._update(self.train_metrics, pairs, batch)
        self.guard.add(losses, batch.row_ids)
        return losses.mean()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the validation."""
        self._update(self.val_metrics, self._pair_logps(batch, "val"), batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the test."""
        self._update(self.test_metrics, self._pair_logps(batch, "test"), batch)

    def log_window(self) -> None:
        """Logs the accumulation window once, as a whole."""
        warn_of_vanishing_weights(self.weighting, self._log("train", self.train_metrics))

    def forget_window(self) -> None:
        """Leaves its pairs out of the effective sample size too."""
        self.train_metrics.reset()
        self.train_metrics.recent = list(self._recent_log_weights)

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Remembers the window of the effective sample size between two optimizer steps."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._recent_log_weights = list(self.train_metrics.recent)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation set's values and the histograms of its weights."""
        self._log_histogram("train/log_weights", self.train_metrics)
        self._log_histogram("val/log_weights", self.val_metrics)
        self._log("val", self.val_metrics)
        self.log_step()

    def on_test_epoch_end(self) -> None:
        """Logs the test set's values."""
        self._log("test", self.test_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the window of the effective sample size, so that a resumed run logs what an unbroken one would."""
        super().on_save_checkpoint(checkpoint)
        with self.train_metrics.sync_context():
            checkpoint["recent_log_weights"] = self.train_metrics.recent_log_weights.cpu().clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the window back at the start of a fit."""
        super().on_load_checkpoint(checkpoint)
        self._ess_before_resume = checkpoint.get("recent_log_weights")
        if self.trainer.strategy.restore_checkpoint_after_setup:  # and after on_fit_start
            self._restore_window()

    def _restore_window(self) -> None:
        if self._ess_before_resume is not None:
            own = self._ess_before_resume.chunk(self.trainer.world_size)[self.trainer.global_rank :][:1]
            self.train_metrics.recent = [(own[0] if own else torch.zeros(0)).to(self.device)]
            self._recent_log_weights = list(self.train_metrics.recent)

    def _pair_logps(self, batch: PreferenceBatch, split: str) -> PairLogps:
        policy: SequenceLogps = self.policy(batch.tokens, alignment=self.weighting.needs_alignment)
        if self.reference is None:
            ref_logps = torch.full_like(policy.logps, math.nan)
        else:
            ref_logps = self.reference.logps(batch, split)
        return PairLogps.unstack(policy, ref_logps, self._mu_logps(batch, ref_logps), batch.margins)

    def _mu_logps(self, batch: PreferenceBatch, ref_logps: Tensor) -> Tensor:
        """``(2B,)`` log-probs of the policy that the weights take for the one that wrote the responses."""
        if self.mu == "reference":
            return ref_logps
        if self.mu == "data":
            return batch.behavior_logps
        return torch.where(batch.behavior_logps.isnan(), ref_logps, batch.behavior_logps)

    def _update(self, metrics: PairMetrics, pairs: PairLogps, batch: PreferenceBatch) -> Tensor:
        weights = self.weighting(pairs)
        losses = self._losses(pairs, weights, batch)
        metrics.update(losses, pairs, weights, batch.row_ids >= 0)
        return losses

    def _losses(self, pairs: PairLogps, weights: PairWeights, batch: PreferenceBatch) -> Tensor:
        return batch.pair_weights * (weights.weights * self.loss(pairs) + self.loss.auxiliary(pairs))

    def _log(self, stage: str, metrics: PairMetrics) -> dict[str, Tensor]:
        values: dict[str, Tensor] = metrics.compute()
        metrics.reset()
        self.log_dict({f"{stage}/{key}": value for key, value in values.items()})
        if stage == "train":
            self.log("loss", values["loss"], prog_bar=True, logger=False)
            self.log("accuracy", values["rewards/accuracies"], prog_bar=True, logger=False)
            self.log("weight", values["weights/mean"], prog_bar=True, logger=False)
        return values

    def _log_histogram(self, tag: str, metrics: PairMetrics) -> None:
        values = metrics.recent_log_weights
        if values.numel() and torch.isfinite(values).all():
            for logger in self.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_histogram(tag, values, self.trainer.global_step)


def _check_without_reference(loss: PreferenceLoss, weighting: PairWeighting, mu: str) -> None:
    """Raises where no reference is held, and something needs one.

    Raises:
        InputError: names what needs it, and what to use instead.
    """
    if loss.needs_reference:
        raise InputError(f"model.reference: {type(loss).__name__} needs a reference, so it cannot be null.")
    if weighting.needs_mu and mu != "data":
        raise InputError(
            f"model.weighting: {type(weighting).__name__} on {type(loss).__name__} without a reference has no mu to "
            "divide by; hold a reference, take mu from the data (model.mu: data), or use UniformWeighting."
        )


def _share_prompts(wanted: bool | Literal["auto"], policy: LogProbModel, *others: LogProbModel) -> bool:
    """Whether a prompt is computed once for both of its responses.

    Args:
        wanted: ``auto`` where all models can; then a model that cannot is named in the log.
        policy: the model that is trained.
        others: models that score the same batches.

    Raises:
        InputError: it is wanted, and a model cannot.
    """
    if wanted is False:
        return False
    why_not = next((reason for model in (policy, *others) if (reason := model.why_not_shared()) is not None), None)
    if why_not is None:
        return True
    name = type(policy.model).__name__
    if wanted is True:
        raise InputError(f"model.prefix_sharing: {name} cannot share a prompt: {why_not}; leave the option out.")
    rank_zero_info(f"Prompts are computed once for each response, as {name} cannot share them: {why_not}.")
    return False
