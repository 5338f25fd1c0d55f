"""Preference training: the losses of direct alignment, on the data's pairs."""

from typing import Any, Literal

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.objective.losses import DPOLoss, PairLoss
from lit_isdpo.objective.metrics import Columns, PairMetrics
from lit_isdpo.objective.on_policy import on_policy_kl
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, ProductWeighting, UniformWeighting
from lit_isdpo.policy.loading import PolicyConfig, load_config
from lit_isdpo.policy.reference import ReferenceConfig
from lit_isdpo.training.comparison import Comparison, Mu, described, warn_of_vanishing_weights
from lit_isdpo.training.language import LanguageModule, Stage
from lit_isdpo.training.models import check_positions
from lit_isdpo.training.rollouts import OnPolicyKL, check_rollouts, imitate_rollouts, sample_rollouts, score_rollouts
from lit_isdpo.types import InputError, PreferenceBatch

WINDOW_KEY = "recent_log_weights"  # of a checkpoint


class PreferenceModule(LanguageModule):
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
        on_policy_kl: adds the KL to the reference on responses that the policy samples (HyPO, arXiv 2406.01462); only
            in training, so ``val/loss`` is without it.
        ess_window: most recent training pairs, over all ranks, that ``train/weights/ess`` is taken over.
        prefix_sharing: whether a prompt is computed once for both of its responses, in one row. The values are the same
            to rounding, in less time and memory. ``auto``: where the models' architecture allows it.
        **options: those of :class:`LanguageModule`.
    """

    comparison: Comparison
    train_metrics: PairMetrics

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        reference: ReferenceConfig | None = ReferenceConfig(),
        loss: PairLoss = lazy_instance(DPOLoss),
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
        comparison = Comparison(policy, reference, loss=loss, weighting=weighting, mu=mu, prefix_sharing=prefix_sharing)
        super().__init__(policy, load_config(policy).get_text_config(), comparison=comparison, **options)
        self.on_policy_kl = on_policy_kl
        self.samples = on_policy_kl is not None
        self.ess_window = ess_window
        self.train_metrics = PairMetrics(ess_window)
        self.val_metrics, self.test_metrics = PairMetrics(), PairMetrics()
        self._not_looked_at: dict[str, Tensor] = {}  # of the last optimizer step, if it was not logged

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """Classes of the weighting and the loss, and their numbers."""
        loss, weighting = self.comparison.loss, self.comparison.weighting
        weightings = weighting.factors if isinstance(weighting, ProductWeighting) else [weighting]
        parts = [described(part) for part in (*weightings, loss)]
        numbers = {key: value for _, own in parts for key, value in own.items()} | {"mu": self.comparison.mu}
        if self.on_policy_kl is not None:
            numbers["on_policy_kl"] = self.on_policy_kl.weight
        return " x ".join(name for name, _ in parts), numbers

    def setup(self, stage: str) -> None:
        """Sets the window of the effective sample size, which ranks share."""
        super().setup(stage)
        self.train_metrics.window = -(-self.ess_window // self.trainer.world_size)

    def check_data(self, data: TextDataModule, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().check_data(data, stage)
        weighting, rows = self.comparison.weighting, data.rows_per_forward
        sizes = {"micro_batch_size": rows} if stage == "fit" else {}
        if stage in ("fit", "validate", "test"):
            sizes["eval_batch_size"] = data.eval_batch_size or rows
        for option, size in sizes.items():
            if size < weighting.min_pairs:
                raise InputError(
                    f"{described(weighting)[0]} works within a micro-batch, so data.{option} must be at least "
                    f"{weighting.min_pairs}, not {size}."
                )
        if stage == "fit" and self.on_policy_kl is not None:
            if data.packing_length is not None:
                raise InputError(
                    "data.packing_length: model.on_policy_kl samples from single prompts; leave one of the options out."
                )
            check_positions(self, "train", self.on_policy_kl.max_new_tokens, "model.on_policy_kl.max_new_tokens")
        self.comparison.check_data(data, stage)

    def step(self, batch: PreferenceBatch, stage: Stage) -> tuple[Tensor, Columns]:
        """Weighted losses of the pairs; in training with the KL of what the policy samples to their prompts."""
        config = self.on_policy_kl if stage in ("train", "plan") else None
        sampled = None
        if config is not None and stage == "train":
            # Before the pairs' forward, whose activations would lie beside the sampler's cache.
            sampled = sample_rollouts(self, batch, self.micro_batch, config)
        pairs = self.comparison.pair_logps(self.policy, batch, "train" if stage == "plan" else stage)
        if stage == "train" and self.is_first_micro_batch:
            logratios = torch.maximum(pairs.chosen_logratios.abs(), pairs.rejected_logratios.abs())
            num_tokens = torch.maximum(pairs.chosen_num_tokens, pairs.rejected_num_tokens)
            self.comparison.check_start(logratios, num_tokens, batch, self.trainer)
        weights = self.comparison.weighting(pairs)
        losses = batch.pair_weights * self.comparison.loss.weighted(pairs, weights.weights)
        if config is None:
            return losses, self.comparison.columns(losses, pairs, weights)
        assert self.reference is not None
        if sampled is None:
            rollouts = imitate_rollouts(self.policy, self.reference, batch, config)
        else:
            rollouts = score_rollouts(self.policy, self.reference, sampled, self.vocabulary.pad_token_id)
        kl = on_policy_kl(rollouts)
        losses = losses + batch.pair_weights * config.weight * kl
        return losses, self.comparison.columns(losses, pairs, weights) | {"kl/k1": kl.detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the weights too if their values are logged: to do so makes the host wait for a GPU."""
        values = self.log_metrics("train")
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_logged = every > 0 and (self.trainer.global_step + 1) % every == 0
        self._not_looked_at = {} if is_logged else values
        if is_logged:
            warn_of_vanishing_weights(self.comparison.weighting, values)

    def on_train_end(self) -> None:
        """Looks at the last step's weights, which may not have been logged."""
        if self._not_looked_at:
            warn_of_vanishing_weights(self.comparison.weighting, self._not_looked_at)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the window of the effective sample size, so that a resumed run logs what an unbroken one would."""
        super().on_save_checkpoint(checkpoint)
        with self.train_metrics.sync_context():
            checkpoint[WINDOW_KEY] = self.train_metrics.recent_log_weights.cpu().clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes this rank's part of the window back."""
        super().on_load_checkpoint(checkpoint)
        if WINDOW_KEY in checkpoint and self.trainer.state.fn == TrainerFn.FITTING:
            own = checkpoint[WINDOW_KEY].chunk(self.trainer.world_size)[self.trainer.global_rank :][:1]
            self.train_metrics.recent = [(own[0] if own else torch.zeros(0)).to(self.device)]


def _check_without_reference(loss: PairLoss, weighting: PairWeighting, mu: str) -> None:
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
