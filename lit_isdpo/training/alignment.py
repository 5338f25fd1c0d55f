"""A policy beside its frozen reference, however it is trained, and how held-out pairs measure it."""

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_isdpo.data.collation import Layout
from lit_isdpo.evaluation.reference_logps import cached_logps
from lit_isdpo.objective.losses import PreferenceLoss
from lit_isdpo.objective.metrics import OF_BEHAVIOR, OF_REFERENCE, PairMetrics
from lit_isdpo.objective.pairs import PairLogps
from lit_isdpo.objective.weights import PairWeighting, PairWeights
from lit_isdpo.policy.attention import why_not_shared
from lit_isdpo.policy.loading import PolicyConfig, compile_layers, load_config
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import (
    CachedReference,
    Reference,
    ReferenceConfig,
    ResidentReference,
    load_reference,
    outline_reference,
    reference_as_policy,
    starts_at_reference,
)
from lit_isdpo.policy.vocabulary import check_vocabulary
from lit_isdpo.training.module import PolicyModule
from lit_isdpo.types import InputError, PreferenceBatch, SequenceLogps

Mu = Literal["auto", "reference", "data"]


class AlignmentModule(PolicyModule):
    """A trainable policy beside its frozen reference, measured on held-out pairs.

    Args:
        policy: the model that is trained.
        reference: the frozen model that it is measured against; ``None`` holds none.
        loss: of a pair.
        weighting: of a pair.
        mu: which policy the weights take for the one that wrote the responses.
        prefix_sharing: whether a prompt is computed once for both of its responses.
        **options: those of :class:`PolicyModule`.

    Attributes:
        trains_on_pairs: whether the training rows' own responses are used.
    """

    trains_on_pairs: ClassVar[bool] = True

    def __init__(
        self,
        *,
        policy: PolicyConfig,
        reference: ReferenceConfig | None,
        loss: PreferenceLoss,
        weighting: PairWeighting,
        mu: Mu,
        prefix_sharing: bool | Literal["auto"],
        **options: Any,
    ) -> None:
        super().__init__(policy=policy, **options)
        if reference is not None:
            if reference.path is None and policy.init == "random":
                raise InputError(
                    "model.reference.path: a policy with random weights (init: random) needs one of its own."
                )
            frozen = reference_as_policy(policy, reference)
            config = load_config(frozen, option="model.reference.path")
            if (frozen.path, frozen.revision) != (policy.path, policy.revision):
                check_vocabulary(frozen, config, self.tokenizer, self.architecture)
        self.reference_config = reference
        self.loss = loss
        self.weighting = weighting
        self.mu = mu
        self.prefix_sharing = prefix_sharing
        self.unmeasured = () if reference else OF_REFERENCE if mu == "data" else OF_REFERENCE + OF_BEHAVIOR
        self.val_metrics = PairMetrics(loss, unknown=self.unmeasured)
        self.test_metrics = PairMetrics(loss, unknown=self.unmeasured)
        self.caches_test_rows = False
        self._reference: tuple[Reference, ...] = ()  # in a tuple: a reference is not a part of this module

    @property
    def reference(self) -> Reference | None:
        """The frozen model that the policy is measured against."""
        return self._reference[0] if self._reference else None

    @property
    def mixes_pairs(self) -> bool:
        """Whether a pair's weight depends on the others of its micro-batch; the data then keeps these random."""
        return self.weighting.mixes_pairs

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
        load = partial(load_reference, self.source, config, self.policy, load=self.load_model)
        # Lightning restores a checkpoint after configure_model: here the policy has not learned anything yet.
        untrained = is_new and starts_at_reference(self.source, config)
        is_policy = config.cache and self.policy.adapter is None and untrained
        reference = Reference(self.policy) if is_policy else load()
        with reference.scoring() as model:
            self.shares_prompts = _share_prompts(self.prefix_sharing, self.policy, model)
        if not config.cache:
            return reference
        if not self.policy.is_sharded:
            # Where an adapter's base is; else it goes there soon anyway.
            self.policy.to(self.trainer.strategy.root_device)
        layout: Layout = "shared" if self.shares_prompts else "plain"
        logps = cached_logps(
            self.data,
            reference,
            config.folder(self.trainer.default_root_dir),
            device=self.trainer.strategy.root_device,
            ranks=self.ranks,
            layout=layout,
            with_test=self.caches_test_rows,
        )
        return CachedReference(logps, load)

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.mu == "data" and datamodule is not None:
            used = ("train", "val") if self.trains_on_pairs else ("val",)
            for split in {"fit": used, "validate": ("val",), "test": ("test",)}.get(stage, ()):
                datamodule.check_behavior_logps(split)

    # The reference is not a submodule, so Lightning does not move it.

    def on_fit_start(self) -> None:
        """Moves the reference to the policy's device."""
        self.on_validation_start()

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

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the validation."""
        self._update(self.val_metrics, self._pair_logps(batch, "val"), batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the test."""
        self._update(self.test_metrics, self._pair_logps(batch, "test"), batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation set's values and the histogram of its weights."""
        self._log_histogram("val/log_weights", self.val_metrics)
        self._log_pairs("val", self.val_metrics)
        self.log_step()

    def on_test_epoch_end(self) -> None:
        """Logs the test set's values."""
        self._log_pairs("test", self.test_metrics)

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
        metrics.update(losses, pairs, weights, batch.num_counted)
        return losses

    def _losses(self, pairs: PairLogps, weights: PairWeights, batch: PreferenceBatch) -> Tensor:
        return batch.pair_weights * (weights.weights * self.loss(pairs) + self.loss.auxiliary(pairs))

    def _log_pairs(self, stage: str, metrics: PairMetrics) -> dict[str, Tensor]:
        values: dict[str, Tensor] = metrics.compute()
        metrics.reset()
        self.log_dict({f"{stage}/{key}": value for key, value in values.items()})
        return values

    def _log_histogram(self, tag: str, metrics: PairMetrics) -> None:
        values = metrics.recent_log_weights
        if values.numel() and torch.isfinite(values).all():
            for logger in self.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_histogram(tag, values, self.trainer.global_step)


def described(part: object) -> tuple[str, dict[str, Any]]:
    """Class and numbers of a loss, a weighting or an objective, of jsonargparse's lazy defaults too."""
    numbers = {key: value for key, value in vars(part).items() if not key.startswith("_")}
    return type(part).__name__.removeprefix("LazyInstance_"), numbers


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
    why_not = next((reason for model in (policy, *others) if (reason := model.tried(why_not_shared)) is not None), None)
    if why_not is None:
        return True
    name = type(policy.model).__name__
    if wanted is True:
        raise InputError(f"model.prefix_sharing: {name} cannot share a prompt: {why_not}; leave the option out.")
    rank_zero_info(f"Prompts are computed once for each response, as {name} cannot share them: {why_not}.")
    return False
