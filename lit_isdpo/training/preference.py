"""Preference training: the losses of direct alignment, on the data's pairs."""

from typing import Any, Literal

import torch
from jsonargparse.typing import lazy_instance
from torch import Tensor

from lit_isdpo.objective.losses import DPOLoss, PreferenceLoss
from lit_isdpo.objective.metrics import PairMetrics
from lit_isdpo.objective.on_policy import on_policy_kl
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, ProductWeighting, UniformWeighting
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reference import ReferenceConfig, starts_at_reference
from lit_isdpo.training.alignment import AlignmentModule, Mu, described
from lit_isdpo.training.guards import check_first_step, warn_of_vanishing_weights
from lit_isdpo.training.rollouts import (
    OnPolicyKL,
    check_rollouts,
    imitate_rollouts,
    sample_rollouts,
    score_rollouts,
)
from lit_isdpo.types import InputError, PreferenceBatch


class PreferenceModule(AlignmentModule):
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
        on_policy_kl: adds the KL to the reference on responses that the policy samples (HyPO, arXiv 2406.01462); in
            training alone, so ``val/loss`` is without it.
        ess_window: most recent training pairs, over all ranks, that ``train/weights/ess`` is taken over.
        prefix_sharing: whether a prompt is computed once for both of its responses, in one row. The values are the same
            to rounding, in less time and memory. ``auto``: where the models' architecture allows it.
        **options: those of :class:`PolicyModule`.
    """

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        reference: ReferenceConfig | None = ReferenceConfig(),
        loss: PreferenceLoss = lazy_instance(DPOLoss),
        weighting: PairWeighting = lazy_instance(ImportanceWeighting),
        mu: Mu = "auto",
        on_policy_kl: OnPolicyKL | None = None,
        ess_window: int = 2048,
        prefix_sharing: bool | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        if ess_window < 1:
            raise InputError(f"model.ess_window must be at least 1 pair, not {ess_window}.")
        if loss.is_weighed and not isinstance(weighting, UniformWeighting):
            raise InputError(
                f"model.weighting: {described(loss)[0]} weighs responses itself, and {described(weighting)[0]} would "
                "weigh them twice; use UniformWeighting."
            )
        if reference is None:
            _check_without_reference(loss, weighting, mu)
        if on_policy_kl is not None:
            check_rollouts(reference, "model.on_policy_kl")
        super().__init__(
            policy=policy,
            reference=reference,
            loss=loss,
            weighting=weighting,
            mu=mu,
            prefix_sharing=prefix_sharing,
            **options,
        )
        self.on_policy_kl = on_policy_kl
        self.samples = on_policy_kl is not None
        self.ess_window = ess_window
        self.train_metrics = PairMetrics(loss, unknown=self.unmeasured, window=ess_window)
        self._not_looked_at: dict[str, Tensor] = {}  # of the last optimizer step, if it was not logged
        self._recent_log_weights: list[Tensor] = []  # as of the last optimizer step
        self._ess_before_resume: Tensor | None = None
        self._sampled_kl: list[Tensor] = []  # of the micro-batches since then

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """Classes of the weighting and the loss, and their numbers."""
        weightings = self.weighting.factors if isinstance(self.weighting, ProductWeighting) else [self.weighting]
        parts = [described(part) for part in (*weightings, self.loss)]
        numbers = {key: value for _, own in parts for key, value in own.items()} | {"mu": self.mu}
        if self.on_policy_kl is not None:
            numbers["on_policy_kl"] = self.on_policy_kl.weight
        return " x ".join(name for name, _ in parts), numbers

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and stage in ("fit", "validate", "test"):
            sizes = {"eval_batch_size": datamodule.eval_batch_size or datamodule.rows_per_forward}
            if stage == "fit":
                sizes = {"micro_batch_size": datamodule.rows_per_forward} | sizes
            for option, size in sizes.items():
                if size < self.weighting.min_pairs:
                    raise InputError(
                        f"{described(self.weighting)[0]} works within a micro-batch, so data.{option} must be at least "
                        f"{self.weighting.min_pairs}, not {size}."
                    )
        is_packed = datamodule is not None and datamodule.packing_length is not None
        if stage == "fit" and is_packed and self.on_policy_kl is not None:
            raise InputError(
                "data.packing_length: model.on_policy_kl samples from single prompts; leave one of the options out."
            )
        if stage == "fit" and datamodule is not None and self.on_policy_kl is not None:
            self.check_positions("train", self.on_policy_kl.max_new_tokens, "model.on_policy_kl.max_new_tokens")
        self.train_metrics.window = -(-self.ess_window // self.trainer.world_size)

    def on_fit_start(self) -> None:
        """Moves the reference to the policy's device."""
        super().on_fit_start()
        self._restore_window()

    def micro_batch_loss(self, batch: PreferenceBatch) -> Tensor:
        """Mean loss of the micro-batch; responses that would be sampled are as long as they may be."""
        pairs = self._pair_logps(batch, "train")
        losses = self._losses(pairs, self.weighting(pairs), batch)
        if self.on_policy_kl is not None:
            assert self.reference is not None
            rollouts = imitate_rollouts(self.policy, self.reference, batch, self.on_policy_kl)
            losses = losses + batch.pair_weights * self.on_policy_kl.weight * on_policy_kl(rollouts)
        return losses.mean()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the micro-batch. All micro-batches are equally large, so the mean of means is the mean."""
        config, sampled = self.on_policy_kl, None
        if config is not None:  # before the pairs' forward, whose activations would lie beside the sampler's cache
            sampled = sample_rollouts(self, batch, batch_idx, config)
        pairs = self._pair_logps(batch, "train")
        if batch_idx == 0 and self.trainer.global_step == 0:
            reference, numerics = self.reference_config, self.source
            if reference is not None and starts_at_reference(numerics, reference):
                logratios = torch.maximum(pairs.chosen_logratios.abs(), pairs.rejected_logratios.abs())
                num_tokens = torch.maximum(pairs.chosen_num_tokens, pairs.rejected_num_tokens)
                check_first_step(logratios, num_tokens, numerics, batch.row_ids, self.trainer)
        weights = self.weighting(pairs)
        losses = self._losses(pairs, weights, batch)
        if config is not None and sampled is not None:
            assert self.reference is not None
            kl = on_policy_kl(score_rollouts(self.policy, self.reference, sampled, self.vocabulary.pad_token_id))
            self._sampled_kl.append(kl.detach().mean())
            losses = losses + batch.pair_weights * config.weight * kl
        self.train_metrics.update(losses, pairs, weights, batch.num_counted)
        self.guard.add(losses, batch.row_ids)
        return losses.mean()

    def log_window(self) -> None:
        """Logs the accumulation window once, as a whole."""
        values = self._log_pairs("train", self.train_metrics)
        if self._sampled_kl:
            self.log("train/kl/k1", torch.stack(self._sampled_kl).mean(), sync_dist=True)
            self._sampled_kl = []
        self._not_looked_at = {} if self.logs_this_step else values
        if self.logs_this_step:  # to look at values makes the host wait for a GPU
            warn_of_vanishing_weights(self.weighting, values)

    def on_train_end(self) -> None:
        """Looks at the last step's weights, which may not have been logged."""
        if self._not_looked_at:
            warn_of_vanishing_weights(self.weighting, self._not_looked_at)

    def forget_window(self) -> None:
        """Leaves its pairs out of the effective sample size too."""
        self.train_metrics.reset()
        self.train_metrics.recent = list(self._recent_log_weights)
        self._sampled_kl = []

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Remembers the window of the effective sample size between two optimizer steps."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._recent_log_weights = list(self.train_metrics.recent)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation set's values and the histograms of its weights."""
        self._log_histogram("train/log_weights", self.train_metrics)
        super().on_validation_epoch_end()

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


def _check_without_reference(loss: PreferenceLoss, weighting: PairWeighting, mu: str) -> None:
    """Raises where no reference is held, and something needs one.

    Raises:
        InputError: names what needs it, and what to use instead.
    """
    if loss.needs_reference:
        raise InputError(f"model.reference: {described(loss)[0]} needs a reference, so it cannot be null.")
    if weighting.needs_mu and mu != "data":
        raise InputError(
            f"model.weighting: {described(weighting)[0]} on {described(loss)[0]} without a reference has no mu to "
            "divide by; hold a reference, take mu from the data (model.mu: data), or use UniformWeighting."
        )
