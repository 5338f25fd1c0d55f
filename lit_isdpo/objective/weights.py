"""How much each pair's loss counts: log-probs in, detached weights out.

DPO weighs all pairs alike. IS-DPO (arXiv 2506.08681) multiplies a pair's loss with the clipped importance ratio of both
its responses, policy over the policy mu that produced them:

    b = log pi(y|x) - log mu(y|x)            mu: the behavior policy, where the data has its log-probs, else
                                             the reference
    w = exp( min( b_w + b_l, 2 epsilon ) )   capped in log space, from above only

A new weighting is one subclass of ``PairWeighting`` and one YAML file. Shapes: B pairs.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.types import InputError


class PairWeights(NamedTuple):
    """Weights of B pairs, without gradient.

    Attributes:
        log_weights: ``(B,)`` logarithm of the weight that the loss is multiplied with, after the cap.
        clipped: ``(B,)`` share of the pair's ratios that hit the cap: 0 or 1 for a joint cap, 0, 1/2 or 1 for one cap a
            response.
    """

    log_weights: Tensor
    clipped: Tensor

    @property
    def weights(self) -> Tensor:
        """``(B,)`` factors of the pairs' losses."""
        return self.log_weights.exp()


class PairWeighting(ABC):
    """Weighs B pairs by the log-probs of their responses.

    Attributes:
        min_pairs: smallest micro-batch on which the weighting means something.
        mixes_pairs: whether a pair's weight depends on the others of its micro-batch. Such a micro-batch must be a
            random one, so its pairs are not chosen by their length.
        needs_mu: whether it looks at the behavior policy.
        needs_alignment: whether it looks at the responses' alignment, which the model then computes.
    """

    min_pairs: int = 1
    mixes_pairs: bool = False
    needs_mu: bool = False
    needs_alignment: bool = False

    def __call__(self, pairs: PairLogps) -> PairWeights:
        """Computes the weights, detached."""
        return self.weigh(pairs.detach())

    @abstractmethod
    def weigh(self, pairs: PairLogps) -> PairWeights:
        """As ``__call__``, on detached tensors."""


class UniformWeighting(PairWeighting):
    """Weights of one: the base loss as published (DPO, IPO, SLiC)."""

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """Looks at nothing."""
        zeros = torch.zeros_like(pairs.chosen_logps)
        return PairWeights(zeros, zeros)


class ImportanceWeighting(PairWeighting):
    """The clipped importance weight of IS-DPO (arXiv 2506.08681; the authors' scripts use ``epsilon`` 1).

    Two pairs with log-ratios (0.5, 1.0) and (1.5, 2.0) under ``epsilon`` 1: the joint cap is 2 nats, the second pair's
    3.5 nats are clipped to it, so the weights are ``exp(1.5)`` and ``exp(2)``.

    Args:
        epsilon: cap on the mean log-ratio of a response, in nats; weights end at ``exp(2 epsilon)``. ``inf`` does not
            clip. Below 0 every pair is weighed down from the start, which learns little: a control.
        cap: ``joint`` caps the sum of both log-ratios at ``2 epsilon``, as the authors' code does; ``response`` caps
            each log-ratio at ``epsilon`` before they are summed.
        floor: smallest weight, at least 0; 0 is the paper's method. A control: pairs that the policy has left keep
            this much of their pull.

    Raises:
        InputError: ``epsilon`` or ``floor`` is out of range.
    """

    needs_mu = True

    def __init__(self, epsilon: float = 1.0, cap: Literal["joint", "response"] = "joint", floor: float = 0.0) -> None:
        if epsilon != math.inf and not abs(2 * epsilon) <= torch.finfo(torch.float32).max:
            raise InputError(f"model.weighting.epsilon must be a number of nats, not {epsilon}.")
        if cap not in ("joint", "response"):
            raise InputError(f"model.weighting.cap must be 'joint' or 'response', not {cap!r}.")
        if not 0 <= floor <= torch.tensor(2 * epsilon).exp():
            raise InputError(f"model.weighting.floor must lie between 0 and exp(2 epsilon), not {floor}.")
        self.epsilon = epsilon
        self.cap = cap
        self.floor = floor

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """Caps in log space, before ``exp`` could overflow."""
        ratios = torch.stack(pairs.importance_logratios).float()  # (2, B)
        if self.cap == "joint":
            log_weights = ratios.sum(dim=0).clamp(max=2 * self.epsilon)
            clipped = (ratios.sum(dim=0) > 2 * self.epsilon).float()
        else:
            log_weights = ratios.clamp(max=self.epsilon).sum(dim=0)
            clipped = (ratios > self.epsilon).float().mean(dim=0)
        if self.floor > 0:
            log_weights = log_weights.clamp(min=math.log(self.floor))
        return PairWeights(log_weights, clipped)


class ShuffledImportanceWeighting(ImportanceWeighting):
    """Control: the weights of ``ImportanceWeighting``, each given to the next pair of the micro-batch.

    Keeps the weights' distribution and breaks their tie to the pairs. A cyclic shift does it without random state,
    because ``mixes_pairs`` has the data keep the pairs in random order, and no pair keeps its own weight.
    """

    min_pairs = 2
    mixes_pairs = True

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """Shifts the weights by one pair."""
        own = super().weigh(pairs)
        return own._replace(log_weights=own.log_weights.roll(1))


class BatchMeanImportanceWeighting(ImportanceWeighting):
    """Control: every pair gets the micro-batch's mean weight: what is left of the method is an implicit early stop."""

    min_pairs = 2
    mixes_pairs = True

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """Averages in log space, so that weights that underflow still have a finite mean."""
        own = super().weigh(pairs)
        mean = own.log_weights.logsumexp(dim=0) - math.log(own.log_weights.numel())
        return own._replace(log_weights=mean.expand_as(own.log_weights))


class WPOWeighting(PairWeighting):
    """WPO: ``min(1, u_w u_l)``, ``u = exp(mean_t[log pi(y_t) - log sum_v pi(v)^2])`` (arXiv 2406.11827 eq. 2).

    How likely the policy is to say the pair, a token, against what it says by itself: 1 for a response that looks
    sampled from it. Unlike an importance weight it knows no mu, is normalised by length, and never exceeds 1.
    """

    needs_alignment = True

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """The product is capped, not each factor."""
        joint = pairs.chosen_alignment + pairs.rejected_alignment
        return PairWeights(joint.clamp(max=0.0), (joint > 0).float())


class ProductWeighting(PairWeighting):
    """The product of several weightings: IS-WPO, say. A pair counts as clipped as the most clipped of its factors.

    Args:
        factors: at least two weightings.

    Raises:
        InputError: fewer than two.
    """

    def __init__(self, factors: list[PairWeighting]) -> None:
        if len(factors) < 2:
            raise InputError(f"model.weighting.factors: a product has at least two weightings, not {len(factors)}.")
        products = [factor.factors if isinstance(factor, ProductWeighting) else [factor] for factor in factors]
        self.factors: list[PairWeighting] = [factor for product in products for factor in product]
        self.min_pairs = max(factor.min_pairs for factor in factors)
        self.mixes_pairs = any(factor.mixes_pairs for factor in factors)
        self.needs_mu = any(factor.needs_mu for factor in factors)
        self.needs_alignment = any(factor.needs_alignment for factor in factors)

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """Adds the logarithms."""
        weights = [factor.weigh(pairs) for factor in self.factors]
        log_weights = torch.stack([factor.log_weights for factor in weights]).sum(dim=0)
        return PairWeights(log_weights, torch.stack([factor.clipped for factor in weights]).amax(dim=0))
