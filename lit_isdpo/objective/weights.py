"""How much each pair's loss counts: log-ratios in, detached weights out.

DPO weighs all pairs alike. IS-DPO (arXiv 2506.08681) multiplies a pair's loss with the clipped importance ratio of both
its responses, policy over the policy mu that produced them:

    b = log pi(y|x) - log mu(y|x)            mu: the behavior policy, where the data has its log-probs, else
                                             the reference
    w = exp( min( b_w + b_l, 2 epsilon ) )   capped in log space, from above only

A new weighting is one subclass of ``PairWeighting`` and one YAML file. Shapes: B pairs.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_isdpo.types import InputError


class PairWeights(NamedTuple):
    """Weights of B pairs, without gradient.

    Attributes:
        log_weights: ``(B,)`` logarithm of the weight that the loss is multiplied with, after the cap.
        log_importance_ratio: ``(B,)`` ``b_w + b_l`` in nats, before the cap; what the weighting saw, also where unused.
        clipped: ``(B,)`` share of the pair's ratios that hit the cap: 0 or 1 for a joint cap, 0, 1/2 or 1 for one cap a
            response.
    """

    log_weights: Tensor
    log_importance_ratio: Tensor
    clipped: Tensor

    @property
    def weights(self) -> Tensor:
        """``(B,)`` factors of the pairs' losses."""
        return self.log_weights.exp()


class PairWeighting(ABC):
    """Weighs B pairs by their two log-ratios against the behavior policy."""

    min_pairs: int = 1  # smallest micro-batch on which the weighting means something

    def __call__(self, chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairWeights:
        """Computes the weights, detached and in fp32.

        Args:
            chosen_log_ratio: ``(B,)`` ``log pi(y_w|x) - log mu(y_w|x)``, summed over tokens, in nats.
            rejected_log_ratio: ``(B,)`` likewise for the rejected response.
        """
        return self.weigh(chosen_log_ratio.detach().float(), rejected_log_ratio.detach().float())

    @abstractmethod
    def weigh(self, chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairWeights:
        """As ``__call__``, on detached fp32 tensors."""


class UniformWeighting(PairWeighting):
    """Weights of one: the base loss as published (DPO, IPO, SLiC)."""

    def weigh(self, chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairWeights:
        """Ignores the ratios, but hands them on to be logged: ``logratios/importance`` is a curve of every method."""
        joint = chosen_log_ratio + rejected_log_ratio
        return PairWeights(torch.zeros_like(joint), joint, torch.zeros_like(joint))


class ImportanceWeighting(PairWeighting):
    """The clipped importance weight of IS-DPO (arXiv 2506.08681; the authors' scripts use ``epsilon`` 1).

    Two pairs with log-ratios (0.5, 1.0) and (1.5, 2.0) under ``epsilon`` 1: the joint cap is 2 nats, the second pair's
    3.5 nats are clipped to it.

    >>> weighting = ImportanceWeighting(epsilon=1.0)
    >>> out = weighting(torch.tensor([0.5, 1.5]), torch.tensor([1.0, 2.0]))
    >>> out.log_weights.tolist(), out.clipped.tolist()
    ([1.5, 2.0], [0.0, 1.0])

    Args:
        epsilon: cap on the mean log-ratio of a response, in nats, at least 0; weights end at ``exp(2 epsilon)``.
            ``inf`` does not clip.
        cap: ``joint`` caps the sum of both log-ratios at ``2 epsilon``, as the authors' code does; ``response`` caps
            each log-ratio at ``epsilon`` before they are summed.
        floor: smallest weight, at least 0; 0 is the paper's method. A control: pairs that the policy has left keep
            this much of their pull.

    Raises:
        InputError: ``epsilon`` or ``floor`` is out of range.
    """

    def __init__(self, epsilon: float = 1.0, cap: Literal["joint", "response"] = "joint", floor: float = 0.0) -> None:
        if not epsilon >= 0:
            raise InputError(
                f"weighting.epsilon must be at least 0 nats, not {epsilon}: it caps log-ratios from above."
            )
        if cap not in ("joint", "response"):
            raise InputError(f"weighting.cap must be 'joint' or 'response', not {cap!r}.")
        if not 0 <= floor <= torch.tensor(2 * epsilon).exp():
            raise InputError(f"weighting.floor must lie between 0 and exp(2 epsilon), not {floor}.")
        self.epsilon = epsilon
        self.cap = cap
        self.floor = floor

    def weigh(self, chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairWeights:
        """Caps in log space, before ``exp`` could overflow."""
        joint = chosen_log_ratio + rejected_log_ratio
        if self.cap == "joint":
            log_weights = joint.clamp(max=2 * self.epsilon)
            clipped = (joint > 2 * self.epsilon).float()
        else:
            ratios = torch.stack([chosen_log_ratio, rejected_log_ratio])  # (2, B)
            log_weights = ratios.clamp(max=self.epsilon).sum(dim=0)
            clipped = (ratios > self.epsilon).float().mean(dim=0)
        if self.floor > 0:
            log_weights = log_weights.clamp(min=float(torch.tensor(self.floor).log()))
        return PairWeights(log_weights, joint, clipped)


class ShuffledImportanceWeighting(ImportanceWeighting):
    """Control: the weights of ``ImportanceWeighting``, each given to the next pair of the micro-batch.

    Keeps the weights' distribution and breaks their tie to the pairs. A cyclic shift does it without random state,
    because the order of the pairs is random already, and no pair keeps its own weight.
    """

    min_pairs = 2

    def weigh(self, chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairWeights:
        """Shifts the weights by one pair; the logged ratio stays the pair's own."""
        own = super().weigh(chosen_log_ratio, rejected_log_ratio)
        return own._replace(log_weights=own.log_weights.roll(1))


class BatchMeanImportanceWeighting(ImportanceWeighting):
    """Control: every pair gets the micro-batch's mean weight: what is left of the method is an implicit early stop."""

    min_pairs = 2

    def weigh(self, chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairWeights:
        """Averages in log space, so that weights that underflow still have a finite mean."""
        own = super().weigh(chosen_log_ratio, rejected_log_ratio)
        num_pairs = torch.tensor(float(own.log_weights.numel()), device=own.log_weights.device)
        mean = own.log_weights.logsumexp(dim=0) - num_pairs.log()
        return own._replace(log_weights=mean.expand_as(own.log_weights))
