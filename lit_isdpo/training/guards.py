"""What stops preference training that would learn something wrong, and warns of training that learns nothing."""

import warnings

import torch
from lightning import pytorch as pl
from torch import Tensor

from lit_isdpo.objective.losses import PreferenceLoss
from lit_isdpo.objective.pairs import PairLogps
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.types import InputError

MEAN_WEIGHT_WARNING = 0.1
ESS_WARNING = 0.01


@torch.no_grad()
def check_first_step(
    pairs: PairLogps, loss: PreferenceLoss, numerics: PolicyConfig, row_ids: Tensor, trainer: pl.Trainer
) -> None:
    """Stops a fit whose policy is not its reference although it says so: a wrong mask, packing or dtype.

    Args:
        pairs: the first micro-batch's.
        loss: of a pair.
        numerics: of both models.
        row_ids: ``(B,)`` the micro-batch's rows.
        trainer: knows the rows' names.

    Raises:
        InputError: a log-ratio is not 0 within the numerics' noise.
    """
    # One code path serves both models, so fp32 gives exactly 0; bf16 kernels may differ by a rounding a token.
    tolerance = 1e-3 if numerics.compute_dtype == numerics.dtype == "float32" else 0.02
    num_tokens = torch.maximum(pairs.chosen_num_tokens, pairs.rejected_num_tokens)
    off = torch.maximum(pairs.chosen_logratios.abs(), pairs.rejected_logratios.abs())
    bad = off > tolerance * num_tokens.float().sqrt()
    # Together, or the others would wait for a rank that has stopped.
    if trainer.strategy.reduce_boolean_decision(bool(bad.any()), all=False):
        raise InputError(
            f"At the first step the policy is the reference, yet log pi/ref is up to {off.max():.3g} nats and the "
            f"loss {loss(pairs).mean():.4g} instead of {loss(pairs.at_reference()).mean():.4g} "
            f"({_row_names(trainer, row_ids[bad])}): the model's forward is not deterministic, or the two were not "
            "loaded alike."
        )


class LossWindow:
    """Losses of the micro-batches since the last optimizer step."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._row_ids: list[Tensor] = []

    def add(self, losses: Tensor, row_ids: Tensor) -> None:
        """Keeps a micro-batch's losses, ``(B,)``, and its rows."""
        self._losses.append(losses.detach())
        self._row_ids.append(row_ids)

    def check(self, trainer: pl.Trainer) -> None:
        """Stops before a NaN reaches the weights, and names the rows; empties the window.

        Raises:
            InputError: a loss of the window is NaN or infinite, on any rank.
        """
        losses, row_ids = torch.cat(self._losses), torch.cat(self._row_ids)
        self._losses, self._row_ids = [], []
        bad = not bool(torch.isfinite(losses).all())
        if trainer.strategy.reduce_boolean_decision(bad, all=False):  # together, as above
            raise InputError(
                f"The loss is NaN or infinite at optimizer step {trainer.global_step} for "
                f"{_row_names(trainer, row_ids[~torch.isfinite(losses)])}; the weights are as they were before this "
                "step. Try a lower learning rate, or look at those rows."
            )


def _row_names(trainer: pl.Trainer, row_ids: Tensor) -> str:
    """A few rows in words, as they were read."""
    some = row_ids.tolist()[:8]
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return f"training rows {some}"
    if not some:
        return "training rows of another rank"
    return ", ".join(datamodule.row_name("train", row_id) for row_id in some)


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
                f"The mean importance weight fell below {MEAN_WEIGHT_WARNING}: the policy hardly produces the "
                "data's pairs any more and learns little from them. A larger model.loss.beta, a lower learning "
                "rate or fewer epochs keep it nearer.",
                stacklevel=2,
            )
        if values["weights/ess"].item() < ESS_WARNING:
            warnings.warn(
                f"The effective sample size fell below {ESS_WARNING:.0%} of the last training pairs: a few pairs "
                "hold all the weight.",
                stacklevel=2,
            )
