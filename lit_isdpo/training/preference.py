"""Preference training: one step shared by training, validation and test."""

import warnings
from typing import Any

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_isdpo.objective.losses import DPOLoss, PairLogps, PreferenceLoss
from lit_isdpo.objective.metrics import PairMetrics
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, PairWeights
from lit_isdpo.policy.loading import PolicyConfig, load_config
from lit_isdpo.policy.reference import ReferenceConfig, ResidentReference, load_reference, reference_as_policy
from lit_isdpo.training.module import PolicyModule, Sampling, Schedule, adamw
from lit_isdpo.types import InputError, PreferenceBatch, SequenceLogps

MEAN_WEIGHT_WARNING = 0.1
ESS_WARNING = 0.01


class PreferenceModule(PolicyModule):
    """A trainable policy beside its frozen reference.

    The loss of a batch is the mean over pairs of ``w * f(beta h) + auxiliary``: which ``f`` is ``loss``, which ``w`` is
    ``weighting``. DPO is ``DPOLoss`` with ``UniformWeighting``, IS-DPO is ``DPOLoss`` with ``ImportanceWeighting``.

    Args:
        policy: the model that is trained.
        reference: the frozen model that it is measured against; by default the policy before training.
        loss: loss of a pair.
        weighting: weight of a pair.
        optimizer: makes the optimizer from the policy's parameters.
        schedule: of the learning rate.
        sampling: how ``predict`` samples.
        ess_window: most recent training pairs, over all ranks, that ``train/weights/ess`` is taken over.
    """

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        reference: ReferenceConfig = ReferenceConfig(),
        loss: PreferenceLoss = lazy_instance(DPOLoss),
        weighting: PairWeighting = lazy_instance(ImportanceWeighting),
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
        ess_window: int = 2048,
    ) -> None:
        super().__init__(policy, optimizer, schedule, sampling)
        if ess_window < 1:
            raise InputError(f"model.ess_window must be at least 1 pair, not {ess_window}.")
        if reference.path is None and policy.init == "random":
            raise InputError("model.reference.path: a policy with random weights (init: random) needs one of its own.")
        load_config(reference_as_policy(policy, reference), option="model.reference.path")
        self.reference_config = reference
        self.loss = loss
        self.weighting = weighting
        self.ess_window = ess_window
        self.train_metrics = PairMetrics(loss.beta, window=ess_window)
        self.val_metrics = PairMetrics(loss.beta)
        self.test_metrics = PairMetrics(loss.beta)
        self._reference: tuple[ResidentReference, ...] = ()  # in a tuple: a reference is not a part of this module
        self._window_row_ids: list[Tensor] = []
        self._window_losses: list[Tensor] = []
        self._ess_before_resume: Tensor | None = None

    @property
    def reference(self) -> ResidentReference:
        """The frozen model that the policy is measured against."""
        return self._reference[0]

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """Classes and numbers of the loss and the weighting."""
        return f"{type(self.weighting).__name__} x {type(self.loss).__name__}", vars(self.loss) | vars(self.weighting)

    def configure_model(self) -> None:
        """Loads both models; to sample, the policy alone."""
        super().configure_model()
        if not self._reference and self.trainer.state.fn != TrainerFn.PREDICTING:
            self._reference = (load_reference(self.policy_config, self.reference_config),)
            vocabularies = [model.vocabulary_size for model in (self.policy, self.reference.model)]
            if vocabularies[0] != vocabularies[1]:
                raise InputError(
                    f"model.reference.path: its vocabulary has {vocabularies[1]} entries and the policy's "
                    f"{vocabularies[0]}; both must be the same."
                )

    @property
    def _starts_at_reference(self) -> bool:
        policy, reference = self.policy_config, self.reference_config
        same = reference.path in (None, policy.path) and reference.revision in (None, policy.revision)
        return same and policy.init == "pretrained"

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and datamodule is not None and datamodule.rows_per_forward < self.weighting.min_pairs:
            raise InputError(
                f"{type(self.weighting).__name__} works within a micro-batch, so data.micro_batch_size must be at "
                f"least {self.weighting.min_pairs}, not {datamodule.rows_per_forward}."
            )
        self.train_metrics.window = -(-self.ess_window // self.trainer.world_size)

    # The reference is not a submodule, so Lightning does not move it.

    def on_fit_start(self) -> None:
        """Moves the reference to the policy's device."""
        self.reference.to(self.device)
        if self._ess_before_resume is not None:
            own = self._ess_before_resume.chunk(self.trainer.world_size)[self.trainer.global_rank :][:1]
            self.train_metrics.recent = [(own[0] if own else torch.zeros(0)).to(self.device)]

    def on_validation_start(self) -> None:
        """Moves the reference to the policy's device."""
        self.reference.to(self.device)

    on_test_start = on_validation_start

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the micro-batch. All micro-batches are equally large, so the mean of means is the mean."""
        pairs = self._pair_logps(batch)
        if batch_idx == 0 and self.trainer.global_step == 0:
            self._check_first_step(pairs, batch)
        losses = self._update(self.train_metrics, pairs, batch)
        self._window_losses.append(losses.detach())
        self._window_row_ids.append(batch.row_ids)
        return losses.mean()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the validation."""
        self._update(self.val_metrics, self._pair_logps(batch), batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the test."""
        self._update(self.test_metrics, self._pair_logps(batch), batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the accumulation window once, as a whole, before its gradient is used."""
        self._check_finite()
        values = self._log("train", self.train_metrics)
        self._warn_of_vanishing_weights(values)

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
        with self.train_metrics.sync_context():
            checkpoint["recent_log_weights"] = self.train_metrics.recent_log_weights.cpu().clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the window back at the start of a fit."""
        self._ess_before_resume = checkpoint.get("recent_log_weights")

    def _pair_logps(self, batch: PreferenceBatch) -> PairLogps:
        policy: SequenceLogps = self.policy(batch.tokens)
        reference = self.reference.logps(batch.tokens)
        chosen_logps, rejected_logps = policy.logps.chunk(2)
        ref_chosen_logps, ref_rejected_logps = reference.logps.chunk(2)
        chosen_num_tokens, rejected_num_tokens = policy.num_tokens.chunk(2)
        return PairLogps(
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_num_tokens, rejected_num_tokens
        )

    def _weights(self, pairs: PairLogps, batch: PreferenceBatch) -> PairWeights:
        """Weights against mu: the behavior policy where the data has its log-prob of a response, else the reference."""
        chosen_mu, rejected_mu = batch.behavior_logps.chunk(2)
        chosen_mu = torch.where(chosen_mu.isnan(), pairs.ref_chosen_logps, chosen_mu)
        rejected_mu = torch.where(rejected_mu.isnan(), pairs.ref_rejected_logps, rejected_mu)
        return self.weighting(pairs.chosen_logps - chosen_mu, pairs.rejected_logps - rejected_mu)

    def _update(self, metrics: PairMetrics, pairs: PairLogps, batch: PreferenceBatch) -> Tensor:
        weights = self._weights(pairs, batch)
        losses = weights.weights * self.loss(pairs) + self.loss.auxiliary(pairs)
        metrics.update(losses, pairs, weights, batch.row_ids >= 0)
        return losses

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

    @torch.no_grad()
    def _check_first_step(self, pairs: PairLogps, batch: PreferenceBatch) -> None:
        """Stops a fit whose policy is not its reference although it says so: a wrong mask, packing or dtype.

        Raises:
            InputError: a log-ratio is not 0 within the numerics' noise.
        """
        if not self._starts_at_reference:
            return
        # One code path serves both models, so fp32 gives exactly 0; bf16 kernels may differ by a rounding a token.
        tolerance = 1e-3 if self.policy_config.compute_dtype == self.policy_config.dtype == "float32" else 0.02
        num_tokens = torch.maximum(pairs.chosen_num_tokens, pairs.rejected_num_tokens)
        off = torch.maximum(pairs.chosen_logratios.abs(), pairs.rejected_logratios.abs())
        bad = off > tolerance * num_tokens.float().sqrt()
        loss, expected = self.loss(pairs).mean(), self.loss(pairs.at_reference()).mean()
        if bad.any():
            rows = self._row_names(batch.row_ids[bad])
            raise InputError(
                f"At the first step the policy is the reference, yet log pi/ref is up to {off.max():.3g} nats and the "
                f"loss {loss:.4g} instead of {expected:.4g} ({rows}): the model's forward is not "
                "deterministic, or the two were not loaded alike."
            )

    def _check_finite(self) -> None:
        """Stops before a NaN reaches the weights, and names the rows.

        Raises:
            InputError: a loss of the window is NaN or infinite.
        """
        losses, row_ids = torch.cat(self._window_losses), torch.cat(self._window_row_ids)
        self._window_losses, self._window_row_ids = [], []
        bad = not torch.isfinite(losses).all()
        if self.trainer.world_size > 1:  # together, or the others would wait for a rank that has stopped
            bad = self.trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            rows = self._row_names(row_ids[~torch.isfinite(losses)])
            raise InputError(
                f"The loss is NaN or infinite at optimizer step {self.trainer.global_step} for {rows}; "
                "the weights are as they were before this step. Try a lower learning rate, or look at those rows."
            )

    def _row_names(self, row_ids: Tensor) -> str:
        """A few rows in words, as they were read."""
        some = row_ids.tolist()[:8]
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return f"training rows {some}"
        if not some:
            return "training rows of another rank"
        return ", ".join(datamodule.row_name("train", row_id) for row_id in some)

    def _warn_of_vanishing_weights(self, values: dict[str, Tensor]) -> None:
        if isinstance(self.weighting, ImportanceWeighting):
            mean, ess = values["weights/mean"].item(), values["weights/ess"].item()
            if mean < MEAN_WEIGHT_WARNING:
                warnings.warn(
                    f"The mean importance weight fell below {MEAN_WEIGHT_WARNING}: the policy hardly produces the "
                    "data's pairs any more and learns little from them. A larger model.loss.beta, a lower learning "
                    "rate or fewer epochs keep it nearer.",
                    stacklevel=2,
                )
            if ess < ESS_WARNING:
                warnings.warn(
                    f"The effective sample size fell below {ESS_WARNING:.0%} of the last training pairs: a few pairs "
                    "hold all the weight.",
                    stacklevel=2,
                )
