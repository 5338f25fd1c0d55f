"""Per-pair preference losses; the weight and the mean over pairs are the caller's.

Every offline method is one row of a single core,

    loss = w f( phi(u_w) - phi(u_l) + m )  +  auxiliary          (the weight w does not touch the auxiliary term)

with u a response's utility (by default its log-ratio, policy over reference), phi a link, m a margin and f a penalty.
A new loss is one subclass of ``PreferenceLoss`` that overrides what it changes, and one YAML file.

Shapes: B pairs. All log-probs are sums over the response's tokens, EOS included, in nats, unless a name says mean.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_isdpo.types import InputError


class PairLogps(NamedTuple):
    """What a loss may look at: log-probs of both responses under the policy and the reference, and their lengths.

    All ``(B,)``; log-probs in nats, fp32; the policy's carry its gradient, the reference's none; lengths in tokens.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_num_tokens: Tensor
    rejected_num_tokens: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        """``(B,)`` ``s_w = log pi(y_w|x) - log ref(y_w|x)``."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """``(B,)`` ``s_l``, likewise."""
        return self.rejected_logps - self.ref_rejected_logps

    def at_reference(self) -> "PairLogps":
        """The same pairs seen by a policy that is the reference: where every fresh run begins."""
        return self._replace(chosen_logps=self.ref_chosen_logps, rejected_logps=self.ref_rejected_logps)


class PreferenceLoss(ABC):
    """The core of the module's docstring; a subclass gives the penalty and overrides what else it changes.

    Args:
        beta: strength of the implicit KL constraint, above 0; small beta lets the policy drift far.

    Raises:
        InputError: ``beta`` is not a positive finite number.
    """

    def __init__(self, beta: float) -> None:
        if not 0 < beta < float("inf"):
            raise InputError(f"loss.beta must be a positive number, not {beta}.")
        self.beta = beta

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Computes the unweighted loss of each pair, ``(B,)``, with the policy's gradient."""
        chosen, rejected = self.utilities(pairs)
        return self.penalty(self.link(chosen) - self.link(rejected) + self.margin(pairs))

    def utilities(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``(u_w, u_l)``, each ``(B,)``: here the summed log-ratios."""
        return pairs.chosen_logratios, pairs.rejected_logratios

    def link(self, utility: Tensor) -> Tensor:
        """Phi, ``(B,) -> (B,)``: here the identity."""
        return utility

    def margin(self, pairs: PairLogps) -> Tensor:
        """M, ``(B,)``, in units of utility: here none."""
        return torch.zeros_like(pairs.chosen_logps)

    @abstractmethod
    def penalty(self, margin: Tensor) -> Tensor:
        """F, ``(B,) -> (B,)``: the loss of a utility margin ``h`` (before beta)."""

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """A term beside the preference loss that importance weights do not touch, ``(B,)``: here none."""
        return torch.zeros_like(pairs.chosen_logps)


class DPOLoss(PreferenceLoss):
    """Logistic: ``-log sigmoid(beta h)`` (DPO, arXiv 2305.18290 eq. 7). At the reference: ln 2."""

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)

    def penalty(self, margin: Tensor) -> Tensor:
        """``logsigmoid`` is exact where ``sigmoid`` saturates."""
        return -logsigmoid(self.beta * margin)


class IPOLoss(PreferenceLoss):
    """Square: ``(h - 1/(2 beta))^2`` (IPO, arXiv 2310.12036 eq. 17). At the reference: ``1/(4 beta^2)``.

    Args:
        beta: above 0.
        logratio: ``sum`` is the paper's sequence log-ratio; ``mean`` divides each by its number of tokens, as some
            trainers do. They are different losses at the same beta, so there is no default.
    """

    def __init__(self, logratio: Literal["sum", "mean"], beta: float = 0.1) -> None:
        super().__init__(beta)
        if logratio not in ("sum", "mean"):
            raise InputError(f"loss.logratio must be 'sum' or 'mean', not {logratio!r}.")
        self.logratio = logratio

    def utilities(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Summed or per-token log-ratios. The importance weight always uses sums."""
        if self.logratio == "sum":
            return pairs.chosen_logratios, pairs.rejected_logratios
        return (
            pairs.chosen_logratios / pairs.chosen_num_tokens,
            pairs.rejected_logratios / pairs.rejected_num_tokens,
        )

    def penalty(self, margin: Tensor) -> Tensor:
        """The target margin is ``1/(2 beta)``."""
        return (margin - 1 / (2 * self.beta)).square()


class SLiCLoss(PreferenceLoss):
    """Hinge: ``max(0, 1 - beta h)`` (SLiC-HF, arXiv 2305.10425, as in GPO, 2402.05749). At the reference: 1."""

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)

    def penalty(self, margin: Tensor) -> Tensor:
        """No gradient once the margin is won; its second derivative at 0 is 0, so the theory of IS is silent here."""
        return (1 - self.beta * margin).relu()
