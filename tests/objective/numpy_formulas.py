"""Every formula of the objective once more, in float64 NumPy, as the papers state it: one equation a function.

Nothing here is shared with the package, and nothing is written the package's way: no core that the losses have in
common, no log space where the paper has none (but in a sum of exponentials), derivatives worked out by hand. Shapes: B
pairs; log-probs in nats, summed over the response's tokens, EOS included.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Pairs(NamedTuple):
    """What the equations look at, each ``(B,)``; the names are those of ``PairLogps``."""

    chosen_logps: Array
    rejected_logps: Array
    ref_chosen_logps: Array
    ref_rejected_logps: Array
    mu_chosen_logps: Array
    mu_rejected_logps: Array
    chosen_num_tokens: Array
    rejected_num_tokens: Array
    margins: Array
    chosen_alignment: Array
    rejected_alignment: Array

    @property
    def s_w(self) -> Array:
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def s_l(self) -> Array:
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def h(self) -> Array:
        return self.s_w - self.s_l

    @property
    def b_w(self) -> Array:
        return self.chosen_logps - self.mu_chosen_logps

    @property
    def b_l(self) -> Array:
        return self.rejected_logps - self.mu_rejected_logps


class Loss(NamedTuple):
    """A loss ``(B,)`` and its derivatives by the policy's log-prob of the chosen and of the rejected response."""

    value: Array
    by_chosen: Array
    by_rejected: Array


def softplus(x: Array) -> Array:
    """``-log sigmoid(-x)``."""
    return np.logaddexp(0, x)


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def dpo(p: Pairs, beta: float) -> Loss:
    """2305.18290 eq. 7: ``-log sigmoid(beta h)``; a margin m of the data is taken off ``beta h`` (2307.09288 eq. 2)."""
    x = beta * p.h - p.margins
    slope = -beta * sigmoid(-x)
    return Loss(softplus(-x), slope, -slope)


def ipo(p: Pairs, beta: float) -> Loss:
    """2310.12036 eq. 17: ``(h - 1/(2 beta))^2``; with a margin ``h`` is to be ``(1/2 + m) / beta``."""
    away = p.h - (0.5 + p.margins) / beta
    return Loss(away**2, 2 * away, -2 * away)


def ipo_per_token(p: Pairs, beta: float) -> Loss:
    """The same of the mean log-ratios of a token."""
    away = p.s_w / p.chosen_num_tokens - p.s_l / p.rejected_num_tokens - (0.5 + p.margins) / beta
    return Loss(away**2, 2 * away / p.chosen_num_tokens, -2 * away / p.rejected_num_tokens)


def slic(p: Pairs, beta: float) -> Loss:
    """2305.10425 as in 2402.05749: ``max(0, 1 - beta h)``."""
    short = 1 + p.margins - beta * p.h
    slope = np.where(short > 0, -beta, 0.0)
    return Loss(np.maximum(0, short), slope, -slope)


def cdpo(p: Pairs, beta: float, e: float) -> Loss:
    """``-(1-e) log sigmoid(x) - e log sigmoid(-x)``; its derivative by x is ``sigmoid(x) - (1-e)``."""
    x = beta * p.h - p.margins
    slope = beta * ((1 - e) * -sigmoid(-x) + e * sigmoid(x))
    return Loss((1 - e) * softplus(-x) + e * softplus(x), slope, -slope)


def robust_dpo(p: Pairs, beta: float, e: float) -> Loss:
    """2403.00409: ``[-(1-e) log sigmoid(x) + e log sigmoid(-x)] / (1-2e)``."""
    x = beta * p.h - p.margins
    slope = beta * ((1 - e) * -sigmoid(-x) - e * sigmoid(x)) / (1 - 2 * e)
    return Loss(((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e), slope, -slope)


def chi_po(p: Pairs, beta: float, alpha: float, gamma: float, bound: float) -> Loss:
    """2407.13399 algorithm 1, the exponent bounded at 20 (its appendix), ``phi(s) = exp(alpha s) + gamma s``."""

    def phi(s: Array) -> tuple[Array, Array]:
        power = np.exp(np.where(alpha * s < 20, alpha * s, 20))
        return power + gamma * s, np.where(alpha * s < 20, alpha * power, 0) + gamma

    (phi_w, slope_w), (phi_l, slope_l) = phi(p.s_w), phi(p.s_l)
    difference = beta * phi_w - beta * phi_l
    inside = np.abs(difference) < 2 * bound
    x = np.where(inside, difference, 2 * bound * np.sign(difference) if np.isfinite(bound) else difference) - p.margins
    slope = np.where(inside, -beta * sigmoid(-x), 0)
    return Loss(softplus(-x), slope * slope_w, -slope * slope_l)


def r_dpo(p: Pairs, beta: float, alpha: float) -> Loss:
    """2403.19159: ``-log sigmoid(beta h + alpha (len_w - len_l))``: what is longer needs less of a preference."""
    x = beta * p.h + alpha * p.chosen_num_tokens - alpha * p.rejected_num_tokens - p.margins
    slope = -beta * sigmoid(-x)
    return Loss(softplus(-x), slope, -slope)


def simpo(p: Pairs, beta: float, gamma: float) -> Loss:
    """2405.14734 eq. 6: ``-log sigmoid(beta/len_w log pi(y_w) - beta/len_l log pi(y_l) - gamma)``."""
    x = beta / p.chosen_num_tokens * p.chosen_logps - beta / p.rejected_num_tokens * p.rejected_logps - gamma
    slope = -beta * sigmoid(p.margins - x)
    return Loss(softplus(p.margins - x), slope / p.chosen_num_tokens, -slope / p.rejected_num_tokens)


def likelihood(p: Pairs, factor: float) -> Loss:
    """2405.16436: ``- factor log pi(y_w)``, the factor being beta eta."""
    return Loss(-factor * p.chosen_logps, np.full_like(p.h, -factor), np.zeros_like(p.h))


def mean_likelihood(p: Pairs, alpha: float) -> Loss:
    """2404.19733: ``- alpha log pi(y_w) / len_w``."""
    return Loss(-alpha * p.chosen_logps / p.chosen_num_tokens, -alpha / p.chosen_num_tokens, np.zeros_like(p.h))


def importance(p: Pairs, epsilon: float) -> tuple[Array, Array]:
    """2506.08681, the authors' code: ``exp(min(b_w + b_l, 2 epsilon))``, and which pairs were cut."""
    return np.exp(np.minimum(p.b_w + p.b_l, 2 * epsilon)), (p.b_w + p.b_l > 2 * epsilon).astype(float)


def importance_by_response(p: Pairs, epsilon: float) -> tuple[Array, Array]:
    """``exp(min(b_w, epsilon)) exp(min(b_l, epsilon))``, and the share of the pair's ratios that were cut."""
    weights = np.exp(np.minimum(p.b_w, epsilon) + np.minimum(p.b_l, epsilon))
    return weights, ((p.b_w > epsilon).astype(float) + (p.b_l > epsilon)) / 2


def wpo(p: Pairs) -> tuple[Array, Array]:
    """2406.11827 eq. 2: ``min(1, u_w u_l)``."""
    product = np.exp(p.chosen_alignment) * np.exp(p.rejected_alignment)
    return np.minimum(1, product), (p.chosen_alignment > -p.rejected_alignment).astype(float)


def effective_sample_size(weights: Array) -> float:
    """Kish: ``(sum w)^2 / sum w^2``; of weights relative to the largest, which changes nothing."""
    relative = weights / weights.max()
    return float(relative.sum() ** 2 / (relative**2).sum())


def bradley_terry(chosen: Array, rejected: Array, margins: Array, centering: float) -> Loss:
    """2203.02155 eq. 1 with the margin of 2307.09288 eq. 2, and the centering of 2312.09244 eq. 7."""
    x = chosen - rejected - margins
    pull, push = 2 * centering * (chosen + rejected), sigmoid(-x)
    return Loss(softplus(-x) + centering * (chosen + rejected) ** 2, pull - push, pull + push)


class Completions(NamedTuple):
    """Log-probs of S completions from the logits at each of their tokens.

    Attributes:
        logps: ``(S,)`` sums.
        alignment: ``(S,)`` 2406.11827: mean of ``log pi(y_t) - log sum_v pi(v)^2``.
        by_logits: for each completion ``(C, V)``, the derivative of its log-prob by its logits.
        token_logps: for each completion ``(C,)``.
    """

    logps: Array
    alignment: Array
    by_logits: list[Array]
    token_logps: list[Array]


def completions(logits: list[Array], ids: list[list[int]]) -> Completions:
    """From the logits ``(C, V)`` that predict each completion's C tokens."""
    logps, alignment, by_logits, token_logps = [], [], [], []
    for rows, tokens in zip(logits, ids, strict=True):
        relative = rows - rows.max(axis=1, keepdims=True)
        logs = relative - np.log(np.exp(relative).sum(axis=1, keepdims=True))
        probs, own = np.exp(logs), logs[np.arange(len(tokens)), tokens]
        logps.append(own.sum())
        alignment.append((own - np.log((probs**2).sum(axis=1))).mean())
        by_logits.append(np.eye(rows.shape[1])[tokens] - probs)
        token_logps.append(own)
    return Completions(np.array(logps), np.array(alignment), by_logits, token_logps)
