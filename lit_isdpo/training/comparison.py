"""A policy beside its frozen reference: the log-probs of pairs under both, and what is measured by them."""

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.outcomes import Split
from lit_isdpo.evaluation.reference_logps import cached_logps
from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import PairLoss
from lit_isdpo.objective.metrics import pair_columns
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, PairWeights
from lit_isdpo.policy.attention import why_not_shared
from lit_isdpo.policy.loading import PolicyConfig, compile_layers, load_config
from lit_isdpo.policy.logprob_model import LogProbModel, outline_logprob_model
from lit_isdpo.policy.reference import (
    CachedReference,
    Reference,
    ReferenceConfig,
    ResidentReference,
    load_reference,
    reference_as_policy,
    starts_at_reference,
)
from lit_isdpo.policy.vocabulary import check_vocabulary
from lit_isdpo.training.optimizer_step import row_names
from lit_isdpo.types import InputError, PreferenceBatch, SequenceLogps

if TYPE_CHECKING:
    from lit_isdpo.training.language import LanguageModule

Mu = Literal["auto", "reference", "data"]
MEAN_WEIGHT_WARNING = 0.1
ESS_WARNING = 0.01


class Comparison(pl.Callback):
    """Scores pairs under a policy and its reference, and looks after the reference through a run.

    It is no ``nn.Module``, so that no checkpoint holds the reference.

    Args:
        policy: the model that is trained.
        config: the frozen model that it is measured against; ``None`` holds none.
        loss: of a pair.
        weighting: of a pair.
        mu: which policy the weights take for the one that wrote the responses.
        prefix_sharing: whether a prompt is computed once for both of its responses.

    Attributes:
        reference: the frozen model, once it is loaded.
        shares_prompts: whether batches hold one row per pair, with one prompt for both responses.
        caches_test_rows: whether the test rows are among those whose log-probs are cached.

    Raises:
        InputError: the reference would be a policy with random weights.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        config: ReferenceConfig | None,
        *,
        loss: PairLoss,
        weighting: PairWeighting,
        mu: Mu,
        prefix_sharing: bool | Literal["auto"],
    ) -> None:
        if config is not None and config.path is None and policy.init == "random":
            raise InputError("model.reference.path: a policy with random weights (init: random) needs one of its own.")
        self.policy = policy
        self.config = config
        self.loss = loss
        self.weighting = weighting
        self.mu = mu
        self.prefix_sharing = prefix_sharing
        self.reference: Reference | None = None
        self.shares_prompts = False
        self.caches_test_rows = False

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase, architecture: PretrainedConfig) -> None:
        """Raises for a reference whose vocabulary is not the policy's."""
        if self.config is None:
            return
        frozen = reference_as_policy(self.policy, self.config)
        config = load_config(frozen, option="model.reference.path")
        if (frozen.path, frozen.revision) != (self.policy.path, self.policy.revision):
            check_vocabulary(frozen, config, tokenizer, architecture)

    def check_data(self, data: TextDataModule, stage: str, *, trains_on_pairs: bool = True) -> None:
        """Raises for rows without behavior log-probs, where mu is the data's.

        Args:
            data: has the rows of the stage.
            stage: fit, validate, test or predict.
            trains_on_pairs: whether the training rows' own responses are used.
        """
        evaluated: dict[str, tuple[Split, ...]] = {"fit": ("val",), "validate": ("val",), "test": ("test",)}
        splits = evaluated.get(stage, ())
        if stage == "fit" and trains_on_pairs:
            splits = ("train", *splits)
        for split in splits if self.mu == "data" else ():
            data.splits.check_behavior_logps(split)

    def load(self, module: "LanguageModule", *, is_new: bool) -> None:
        """Loads the reference, and decides whether prompts are shared.

        Args:
            module: has the policy, and loads models.
            is_new: whether the policy has learned nothing yet.
        """
        # What is cached is of one data module's rows, and may be asked for those of another.
        if self.reference is not None and self.reference.is_live:
            return
        source, policy = module.source, module.policy
        if self.config is None:
            self.shares_prompts = self._share_prompts(policy)
            return
        make = partial(load_reference, source, self.config, policy, load=module.load_model)
        # Lightning restores a checkpoint after configure_model: here the policy has not learned anything yet.
        untrained = is_new and starts_at_reference(source, self.config)
        is_policy = self.config.cache and policy.adapter is None and untrained
        reference = Reference(policy) if is_policy else make()
        with reference.scoring() as model:
            self.shares_prompts = self._share_prompts(policy, model)
        if self.config.cache:
            device, root = module.trainer.strategy.root_device, module.trainer.default_root_dir
            if not policy.is_sharded:  # the base of an adapter is in it; else it goes there soon anyway
                policy.to(device)
            logps = cached_logps(
                module.data,
                reference,
                self.config.folder(root),
                device=device,
                ranks=module.ranks,
                layout="shared" if self.shares_prompts else "plain",
                with_test=self.caches_test_rows,
            )
            reference = CachedReference(logps, make)
        self.reference = reference

    # The reference is no submodule, so Lightning does not move it.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the reference to the policy's device."""
        if self.reference is not None:
            self.reference.to(pl_module.device)

    on_validation_start = on_test_start = on_fit_start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compiles the reference as the policy is."""
        if self.policy.compile and isinstance(self.reference, ResidentReference):
            compile_layers(self.reference.model.model)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Holds no more of the reference than a step needs."""
        if self.reference is not None:
            self.reference.release()

    on_test_end = on_validation_end

    def outline(self, source: PolicyConfig, policy: LogProbModel) -> None:
        """Does as ``load`` for models without weights; the configuration tells whether they share prompts."""
        models = [policy]
        if self.config is not None:
            outline = self.reference = load_reference(source, self.config, policy, outline_logprob_model)
            with outline.scoring() as model:
                models.append(model)
            if self.config.cache:
                cached = CachedReference({"train": torch.zeros(1, 2)}, lambda: outline)
                self.reference = cached.to(torch.device("meta"))
        self.shares_prompts = self._share_prompts(*models)

    def _share_prompts(self, *models: LogProbModel) -> bool:
        """Whether a prompt is computed once for both of its responses; a model that cannot is named in the log.

        Args:
            *models: those that score the same batches, the policy first.

        Raises:
            InputError: it is wanted, and a model cannot.
        """
        if self.prefix_sharing is False:
            return False
        why_not = next((reason for model in models if (reason := model.tried(why_not_shared)) is not None), None)
        if why_not is None:
            return True
        name = type(models[0].model).__name__
        if self.prefix_sharing is True:
            raise InputError(f"model.prefix_sharing: {name} cannot share a prompt: {why_not}; leave the option out.")
        rank_zero_info(f"Prompts are computed once for each response, as {name} cannot share them: {why_not}.")
        return False

    def pair_logps(self, policy: LogProbModel, batch: PreferenceBatch, split: str) -> PairLogps:
        """Log-probs of the pairs of a batch, with the policy's gradient."""
        own: SequenceLogps = policy(batch.tokens, alignment=self.weighting.needs_alignment)
        if self.reference is None:
            ref_logps = torch.full_like(own.logps, math.nan)
        else:
            ref_logps = self.reference.logps(batch, split)
        return PairLogps.unstack(own, ref_logps, self._mu_logps(batch, ref_logps), batch.margins)

    def _mu_logps(self, batch: PreferenceBatch, ref_logps: Tensor) -> Tensor:
        """``(2B,)`` log-probs of the policy that the weights take for the one that wrote the responses."""
        if self.mu == "reference":
            return ref_logps
        if self.mu == "data":
            return batch.behavior_logps
        return torch.where(batch.behavior_logps.isnan(), ref_logps, batch.behavior_logps)

    def columns(self, losses: Tensor, pairs: PairLogps, weights: PairWeights) -> dict[str, Tensor]:
        """What is logged about pairs: their ``(B,)`` losses, and what else can be measured."""
        pairs, has_reference = pairs.detach(), self.config is not None
        return pair_columns(
            losses.detach(),
            self.loss.rewards(pairs),
            pairs,
            weights,
            has_reference=has_reference,
            has_mu=has_reference or self.mu == "data",
        )

    @torch.no_grad()
    def check_start(self, logratios: Tensor, num_tokens: Tensor, batch: PreferenceBatch, trainer: pl.Trainer) -> None:
        """At the first step, stops a fit whose policy should be its reference and is not: a wrong mask or dtype.

        Args:
            logratios: ``(B,)`` the largest absolute log-ratio of each of the batch's rows, in nats.
            num_tokens: ``(B,)`` the length of its longest response.
            batch: the first micro-batch.
            trainer: knows the rows' names.

        Raises:
            InputError: a log-ratio is not 0 within the numerics' noise.
        """
        if self.config is None or not starts_at_reference(self.policy, self.config):
            return
        # One code path serves both models, so fp32 gives exactly 0; bf16 kernels may differ by a rounding per token.
        tolerance = 1e-3 if self.policy.compute_dtype == self.policy.dtype == "float32" else 0.02
        bad = logratios > tolerance * num_tokens.float().sqrt()
        # Together, or the others would wait for a rank that has stopped.
        if trainer.strategy.reduce_boolean_decision(bool(bad.any()), all=False):
            raise InputError(
                f"At the first step the policy is the reference, yet log pi/ref is up to {logratios.max():.3g} nats "
                f"({row_names(trainer, batch.row_ids[bad])}): the model's forward is not deterministic, or the two "
                "were not loaded alike."
            )


def described(part: object) -> tuple[str, dict[str, Any]]:
    """Class and numbers of a loss, a weighting or an objective, of jsonargparse's lazy defaults too."""
    numbers = {key: value for key, value in vars(part).items() if not key.startswith("_")}
    return type(part).__name__.removeprefix("LazyInstance_"), numbers


def warn_of_vanishing_weights(weighting: PairWeighting, values: dict[str, Tensor]) -> None:
    """Warns where importance weights have all but left the data, or stand on a few pairs.

    Args:
        weighting: of the pairs.
        values: what ``PairMetrics`` computed of an optimizer step.
    """
    # Of other weightings a small weight says something else: a negative epsilon, say, is small from the start.
    if isinstance(weighting, ImportanceWeighting) and weighting.epsilon >= 0:
        if values["weights/mean"].item() < MEAN_WEIGHT_WARNING:
            warnings.warn(
                f"The mean importance weight of the training pairs fell below {MEAN_WEIGHT_WARNING}: the policy hardly "
                "produces them any more and learns little from them. A larger model.loss.beta, a lower learning rate "
                "or fewer epochs keep it nearer.",
                stacklevel=2,
            )
        if values["weights/ess"].item() < ESS_WARNING:
            warnings.warn(
                f"The effective sample size fell below {ESS_WARNING:.0%} of the last training pairs: a few pairs "
                "hold all the weight.",
                stacklevel=2,
            )
