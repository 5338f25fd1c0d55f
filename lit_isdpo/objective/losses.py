"""Per-pair losses; the weight and the mean over pairs are the caller's.

A loss is a ``PairLoss``. Most offline methods are one row of a single core, a ``PreferenceLoss``,

    r    = beta phi(u)                                   reward that the loss implies, of a response
    x    = clip( r_w - r_l ) + shift - m                 preference for the chosen response, without unit
    loss = w f(x) + auxiliary                            the weight w does not touch the auxiliary term

with u a response's utility (by default its log-ratio, policy over reference), phi a link, m a margin of the data and f
a penalty. A new loss is one subclass of either that overrides what it changes, and one YAML file.

Shapes: B pairs. All log-probs are sums over the response's tokens, EOS included, in nats, unless a name says mean.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.types import InputError

_MAX_EXPONENT = 20.0  # of chi-PO's link: the paper's own bound, far from where fp32 overflows


class PairLoss(ABC):
    """A loss of B pairs: a subclass gives ``__call__``, and what else it changes.

    Args:
        beta: strength of the implicit KL constraint, above 0; small beta lets the policy drift far.

    Attributes:
        needs_reference: whether the loss is a function of the reference at all.
        is_weighed: whether it weighs responses itself, so that a weighting would weigh them twice.

    Raises:
        InputError: ``beta`` is not a positive finite number.
    """

    needs_reference: bool = True
    is_weighed: bool = False

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = checked("beta", beta, above=0.0)

    @abstractmethod
    def __call__(self, pairs: PairLogps) -> Tensor:
        """Computes what a weight multiplies of each pair's loss, ``(B,)``, with the policy's gradient."""

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """A term beside it that importance weights do not touch, ``(B,)``: here none."""
        return torch.zeros_like(pairs.margins)

    def weighted(self, pairs: PairLogps, weights: Tensor | float = 1.0) -> Tensor:
        """All of each pair's loss, ``(B,)``, under ``(B,)`` weights."""
        return weights * self(pairs) + self.auxiliary(pairs)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``(r_w, r_l)``, each ``(B,)``: the rewards that the policy implies under this loss."""
        return self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios


class PreferenceLoss(PairLoss):
    """The core of the module's docstring; a subclass gives the penalty and overrides what else it changes."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Computes ``f(x)`` of each pair."""
        chosen, rejected = self.rewards(pairs)
        return self.penalty(self.clip(chosen - rejected) + self.shift(pairs) - pairs.margins)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta phi(u)`` of both responses."""
        chosen, rejected = self.utilities(pairs)
        return self.beta * self.link(chosen), self.beta * self.link(rejected)

    def utilities(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``(u_w, u_l)``, each ``(B,)``, in nats: here the summed log-ratios."""
        return pairs.chosen_logratios, pairs.rejected_logratios

    def link(self, utility: Tensor) -> Tensor:
        """Phi, ``(B,) -> (B,)``: here the identity."""
        return utility

    def clip(self, difference: Tensor) -> Tensor:
        """Bounds ``r_w - r_l``, ``(B,) -> (B,)``: here not at all."""
        return difference

    def shift(self, pairs: PairLogps) -> Tensor:
        """What the method itself adds to the preference, ``(B,)``: here nothing."""
        return torch.zeros_like(pairs.margins)

    @abstractmethod
    def penalty(self, preference: Tensor) -> Tensor:
        """F, ``(B,) -> (B,)``: the loss of a preference ``x``."""


class DPOLoss(PreferenceLoss):
    """Logistic: ``-log sigmoid(beta h)`` (DPO, arXiv 2305.18290 eq. 7). At the reference: ln 2."""

    def penalty(self, preference: Tensor) -> Tensor:
        """``logsigmoid`` is exact where ``sigmoid`` saturates."""
        return -logsigmoid(preference)


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
            raise InputError(f"model.loss.logratio must be 'sum' or 'mean', not {logratio!r}.")
        self.logratio = logratio

    def utilities(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Summed or per-token log-ratios. The importance weight always uses sums."""
        chosen, rejected = super().utilities(pairs)
        if self.logratio == "sum":
            return chosen, rejected
        return chosen / pairs.chosen_num_tokens, rejected / pairs.rejected_num_tokens

    def penalty(self, preference: Tensor) -> Tensor:
        """The preference ``beta h`` is to be 1/2; the factor makes the square that of ``h``."""
        return (preference - 0.5).square() / self.beta**2


class SLiCLoss(PreferenceLoss):
    """Hinge: ``max(0, 1 - beta h)`` (SLiC-HF, arXiv 2305.10425, as in GPO, 2402.05749). At the reference: 1."""

    def penalty(self, preference: Tensor) -> Tensor:
        """No gradient once the margin is won; its second derivative at 0 is 0, so the theory of IS is silent here."""
        return (1 - preference).relu()


class CDPOLoss(DPOLoss):
    """Conservative DPO: ``(1-e) L(h) + e L(-h)``, L the logistic loss and e the share of flipped labels.

    E. Mitchell's note of 2023, see arXiv 2403.00409. The optimum is a finite ``log((1-e)/e)``. At the reference: ln 2.

    Args:
        beta: above 0.
        label_smoothing: e, at least 0 and below 1/2.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(beta)
        self.label_smoothing = checked("label_smoothing", label_smoothing, least=0.0, below=0.5)

    def penalty(self, preference: Tensor) -> Tensor:
        """Cross-entropy with a smoothed label."""
        e = self.label_smoothing
        return -(1 - e) * logsigmoid(preference) - e * logsigmoid(-preference)


class RobustDPOLoss(CDPOLoss):
    """Robust DPO: ``[(1-e) L(h) - e L(-h)] / (1-2e)`` (arXiv 2403.00409), arguments as of cDPO. At the reference: ln 2.

    An unbiased estimate of the loss on clean labels where a share e of them is flipped; it may fall below 0.
    """

    def penalty(self, preference: Tensor) -> Tensor:
        """The flipped label's loss is taken off."""
        e = self.label_smoothing
        return (-(1 - e) * logsigmoid(preference) + e * logsigmoid(-preference)) / (1 - 2 * e)


class RPOLoss(DPOLoss):
    """DPO + SFT: ``-log sigmoid(beta h) - beta eta log pi(y_w)``, summed over tokens (RPO, arXiv 2405.16436).

    At the reference: ``ln 2 + beta eta NLL(y_w)``. Mind the factor beta: at beta 0.01 the published eta leaves the
    likelihood a weight of 5e-5 a nat.

    Args:
        beta: above 0.
        eta: weight of the likelihood, at least 0; the authors use 0.005.
    """

    def __init__(self, beta: float = 0.1, eta: float = 0.005) -> None:
        super().__init__(beta)
        self.eta = checked("eta", eta, least=0.0)

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """Negative log-likelihood of the chosen response."""
        return -self.beta * self.eta * pairs.chosen_logps


class IRPOLoss(DPOLoss):
    """DPO + SFT with the mean-token likelihood: ``-log sigmoid(beta h) - alpha log pi(y_w) / len_w``.

    The loss of iterative RPO (arXiv 2404.19733). At the reference: ``ln 2 + alpha NLL(y_w) / len_w``.

    Args:
        beta: above 0.
        alpha: weight of the likelihood, at least 0; the authors use 1.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 1.0) -> None:
        super().__init__(beta)
        self.alpha = checked("alpha", alpha, least=0.0)

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """Negative log-likelihood of a token of the chosen response."""
        return -self.alpha * pairs.chosen_logps / pairs.chosen_num_tokens


class ChiPOLoss(DPOLoss):
    """Chi-PO: ``-log sigmoid( clip_{+-2R}[ beta phi(s_w) - beta phi(s_l) ] )`` (arXiv 2407.13399, algorithm 1).

    ``phi(s) = exp(alpha s) + gamma s``, in terms of the log-ratio s; with alpha = gamma = 1 it is the paper's
    ``z + log z``, the link of a mixed chi-squared and KL regularisation, which makes leaving the data costly. At the
    reference: ln 2.

    With alpha 1.25, gamma 0.1 and no clip it held better than all else that trains on pairs alone here, and better
    still beside the KL of the policy's own samples: ``notebooks/figures/remedies_final/report.md``.

    Args:
        beta: above 0.
        alpha: exponent of the density ratio, above 0.
        gamma: weight of the log-ratio (the KL part), at least 0.
        reward_bound: R, the largest reward there is, above 0; preferences beyond ``2 R`` have no gradient. ``inf`` does
            not clip.
    """

    def __init__(
        self, beta: float = 0.1, alpha: float = 1.0, gamma: float = 1.0, reward_bound: float = math.inf
    ) -> None:
        super().__init__(beta)
        self.alpha = checked("alpha", alpha, above=0.0)
        self.gamma = checked("gamma", gamma, least=0.0)
        self.reward_bound = checked("reward_bound", reward_bound, above=0.0, finite=False)

    def link(self, utility: Tensor) -> Tensor:
        """The exponent is bounded, so that two ratios that overflow do not make a NaN."""
        return (self.alpha * utility).clamp(max=_MAX_EXPONENT).exp() + self.gamma * utility

    def clip(self, difference: Tensor) -> Tensor:
        """To the difference that two rewards between 0 and R, or -R and R, can have."""
        return difference.clamp(-2 * self.reward_bound, 2 * self.reward_bound)


class LengthRegularizedDPOLoss(DPOLoss):
    """R-DPO: ``-log sigmoid(beta h + alpha (len_w - len_l))`` (arXiv 2403.19159).

    A chosen response that is longer needs less of a preference. At the reference: ``softplus(-alpha (len_w - len_l))``.

    Args:
        beta: above 0.
        alpha: a token's worth, at least 0.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.01) -> None:
        super().__init__(beta)
        self.alpha = checked("alpha", alpha, least=0.0)

    def shift(self, pairs: PairLogps) -> Tensor:
        """Difference of lengths, EOS included on both sides."""
        return self.alpha * (pairs.chosen_num_tokens - pairs.rejected_num_tokens).to(pairs.margins.dtype)


class SimPOLoss(DPOLoss):
    """SimPO: ``-log sigmoid(beta [mean log pi(y_w) - mean log pi(y_l)] - gamma)`` (arXiv 2405.14734, eq. 6).

    It has no reference and no closed form at the start. Importance weights still need a mu.

    Args:
        beta: above 0; the mean log-prob of a token is small, so it is some 2 to 10.
        gamma_beta_ratio: gamma as a share of beta, at least 0.
    """

    needs_reference = False

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.25) -> None:
        super().__init__(beta)
        self.gamma_beta_ratio = checked("gamma_beta_ratio", gamma_beta_ratio, least=0.0)
        checked("beta x gamma_beta_ratio", beta * gamma_beta_ratio)

    def utilities(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Mean log-probs of a token."""
        return pairs.chosen_logps / pairs.chosen_num_tokens, pairs.rejected_logps / pairs.rejected_num_tokens

    def shift(self, pairs: PairLogps) -> Tensor:
        """The target margin, gamma."""
        return torch.full_like(pairs.margins, -self.gamma_beta_ratio * self.beta)


def bradley_terry_losses(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor, *, centering: float = 0.0
) -> Tensor:
    """A reward model's ``-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2``, ``(B,)``, in nats.

    The first term is the negative log-likelihood of the Bradley-Terry model (arXiv
    2203.02155, eq. 1; with margins, arXiv 2307.09288, eq. 2). It knows only differences; the second (arXiv 2312.09244,
    eq. 7) keeps the rewards of different prompts around 0.

    Args:
        chosen_rewards: ``(B,)``.
        rejected_rewards: ``(B,)``.
        margins: ``(B,)`` what the difference must exceed.
        centering: at least 0.

    >>> import torch
    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> round(bradley_terry_losses(one, zero, zero).item(), 4), round(bradley_terry_losses(one, zero, one).item(), 4)
    (0.3133, 0.6931)
    """
    losses = -logsigmoid(chosen_rewards - rejected_rewards - margins)
    return losses + centering * (chosen_rewards + rejected_rewards).square()


def checked(
    name: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
    of: str = "model.loss",
) -> float:
    """The value, if it is in range; ``least`` is allowed itself, ``above`` and ``below`` are not.

    Args:
        name: the argument's, as the user writes it.
        value: of the argument.
        least: smallest value.
        above: the value is larger.
        below: the value is smaller.
        finite: whether infinity is refused.
        of: the option whose argument it is.

    Raises:
        InputError: the value is out of range, or NaN.
    """
    held = abs(value) <= torch.finfo(torch.float32).max or (value == math.inf and not finite)
    if held and value >= least and value > above and (value < below or not finite):
        return value
    limits = {"at least": least, "above": above, "below": below}
    bounds = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    kind = "a finite number" if finite else "a number"
    raise InputError(f"{of}.{name} must be {' '.join([kind, ' and '.join(bounds)]).strip()}, not {value}.")
