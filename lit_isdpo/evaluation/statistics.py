"""What responses say of a policy, in numbers: its KL, win rates, and their intervals over prompts.

A log-ratio averaged over the data set is not a KL, because the data is not the policy's. The estimators of the KL are
unbiased for responses drawn at temperature 1 and top-p 1, and for those only.

Prompts are the sample: several responses to one prompt say more about that prompt, not about prompts. So a prompt's
values are averaged first, and the bootstrap draws whole prompts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.objective.metrics import Estimate, kl_values, token_kl
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import Response

ESTIMATORS = ("rao_blackwell", "k1", "k3")
"""Log keys of the fields of :class:`~lit_isdpo.objective.metrics.KLValues`."""

_ELEMENTS = 2**22  # of a chunk of resamples: 32 MiB in float64
_RIDGE = 1e-8  # keeps a separable fit finite, and moves no win rate by more than 1e-6
_MAX_NEWTON_STEPS = 200  # separable data, the slowest, takes some 30


class Interval(NamedTuple):
    """An estimate, its standard error, and a confidence interval.

    Of a single prompt the standard error is infinite and the interval the whole line: it says nothing about others.
    Where nothing was measured the mean is NaN.
    """

    mean: float
    stderr: float
    low: float
    high: float


@torch.no_grad()
def sampled_kl(
    policy: LogProbModel,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    *,
    pad_token_id: int,
    batch_size: int,
) -> Tensor:
    """KL(policy || reference) estimated on each of P responses that the policy sampled, ``(P, 3)``, in nats.

    The columns are those of ``ESTIMATORS``. For a response that was cut it is the KL of the cut response. Both
    distributions are those of the next token given that it is one: entries that only pad a vocabulary, of which one
    model may have more than the other, are never sampled and left out of both.

    Args:
        policy: the model that was sampled.
        reference: the model that the KL is taken to.
        prompts: token ids of P prompts.
        responses: to them.
        pad_token_id: padding.
        batch_size: responses per forward of the decoders; logits exist for fewer tokens at a time.
    """
    values = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        completions = [response.token_ids for response in responses[rows]]
        tokens = collate_completions(prompts[rows], completions, pad_token_id=pad_token_id).to(policy.device)
        targets = tokens.at_completions(tokens.completion_ids)  # (N,)
        own = policy.completion_states(tokens)
        with reference.scoring() as model:
            states = model.completion_states(tokens)
        token_logratios, kls = [], []
        for chunk in torch.arange(len(targets), device=targets.device).split(policy.logits_at_a_time):
            logits = policy.token_logits(own[chunk])[:, : policy.num_tokens]
            with reference.scoring() as model:
                ref_logits = model.token_logits(states[chunk])[:, : policy.num_tokens]
            common = min(logits.shape[1], ref_logits.shape[1])
            logps, ref_logps = logits[:, :common].log_softmax(dim=1), ref_logits[:, :common].log_softmax(dim=1)
            picked = targets[chunk, None]
            token_logratios.append((logps.gather(1, picked) - ref_logps.gather(1, picked))[:, 0])
            kls.append(token_kl(logps, ref_logps))
        logratios = tokens.spread(torch.cat(token_logratios)).sum(dim=1)
        estimates = kl_values(logratios, torch.cat(kls), tokens.completion_mask)
        values.append(torch.stack(estimates, dim=1).cpu())
    return torch.cat(values)


def bootstrap_interval(values: Tensor, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over prompts, with a percentile bootstrap interval that resamples prompts.

    Percentile, as its ends stay within the range of the values (a win rate's within 0 and 1), lean where the values
    lean, and need no jackknife, which BCa divides by and which is 0 where all values agree. The price is an interval
    that is too short by about ``1 / P`` of its width and by the tails of Student's t: little from 30 prompts on. Where
    all values are equal it is a point, however few they are. Of wins and losses it covers far too seldom near 0 and 1
    (:func:`win_rate_interval` is for these).

    Args:
        values: ``(P,)`` or ``(P, n)``, n responses to each of P prompts. NaN (no verdict) is left out, and a prompt
            that has nothing else, too.
        level: coverage, between 0 and 1.
        num_resamples: bootstrap draws.
        seed: of the draws.

    >>> bootstrap_interval(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).mean
    0.75
    """
    means = _prompt_means(values)
    num_prompts = len(means)
    draws = [counts @ means / num_prompts for counts in _resamples(num_prompts, num_prompts, num_resamples, seed)]
    interval = _interval(means.mean(), draws, num_prompts, level)
    return interval._replace(stderr=Estimate.of(means).stderr.item())  # in closed form: without the draws' noise


def win_rate_interval(scores: Tensor, *, level: float = 0.95) -> Interval:
    """The win rate over prompts, with Wilson's interval at the effective number of comparisons.

    ``n = p (1 - p) / stderr^2``: as many independent wins and losses would have this standard error, whatever the
    prompts have in common and however many ties there are (Korn and Graubard 1998; with Wilson's interval, Dean and
    Pagano 2015). It is at most the number of scores, and the number of prompts where all of these agree, where the
    standard error is 0 and says nothing. The quantile is that of Student's t with ``P - 1`` degrees of freedom.

    A bootstrap of 30 prompts, one response each, covers a true win rate of 0.99 in 27 % of all samples, since most of
    them hold no loss; this interval in 96 %. Over 2 to 100 prompts and rates of 0.5 to 0.99 it covers in 90 to 100 %,
    more than it says where there are few prompts or many ties.

    Args:
        scores: ``(P,)`` or ``(P, n)``, 1 a win, 0 a loss, 1/2 a tie, anything between counts in part. NaN is left out,
            and a prompt that has nothing else, too.
        level: coverage, between 0 and 1.

    >>> wins = torch.ones(10)
    >>> [round(value, 2) for value in win_rate_interval(wins)]
    [1.0, 0.0, 0.66, 1.0]
    """
    assert 0 < level < 1
    means = _prompt_means(scores)
    num_prompts = len(means)
    rate, stderr = (value.item() for value in Estimate.of(means))
    if num_prompts < 2:
        return Interval(rate, torch.inf, -torch.inf, torch.inf)
    num_scores = int((~scores.isnan()).sum())
    size = min(num_scores, rate * (1 - rate) / stderr**2) if stderr > 0 else num_prompts
    quantile = float(stdtrit(num_prompts - 1, (1 + level) / 2))
    shrinkage = 1 + quantile**2 / size
    middle = (rate + quantile**2 / (2 * size)) / shrinkage
    half = quantile * math.sqrt(rate * (1 - rate) / size + quantile**2 / (4 * size**2)) / shrinkage
    return Interval(rate, stderr, max(0.0, middle - half), min(1.0, middle + half))


def win_scores(rewards: Tensor, other_rewards: Tensor) -> Tensor:
    """The share of another's m responses to the same prompt that each response beats; a tie counts one half.

    Args:
        rewards: ``(P, n)``.
        other_rewards: ``(P, m)``.

    Returns:
        ``(P, n)``, between 0 and 1.

    >>> win_scores(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([[0.7500, 0.0000]])
    """
    own, others = rewards[:, :, None], other_rewards[:, None, :]
    return ((own > others).float() + (own == others).float() / 2).mean(dim=2)


def win_rates(scores: Tensor, length_differences: Tensor) -> dict[str, Interval]:
    """``win_rate`` of ``(P, n)`` scores, NaN where there is none, and the length-controlled ``win_rate_lc``.

    Length is best counted in characters, which a reader sees, and not in one tokenizer's tokens.
    """
    return {
        "win_rate": win_rate_interval(scores),
        "win_rate_lc": length_controlled_win_rate(scores, length_differences),
    }


def repetition(token_ids: Sequence[int], size: int = 3) -> float:
    """The share of a response's n-grams that repeat an earlier one of it (seq-rep-n of arXiv 1908.04319).

    >>> repetition([1, 2, 3, 1, 2, 3])
    0.25
    >>> repetition([1, 2])
    0.0
    """
    grams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def flatten(values: dict[str, Interval]) -> dict[str, float]:
    """Plain numbers: each key's mean, and beside it ``_stderr``, ``_low`` and ``_high``."""
    parts = {"": "mean", "_stderr": "stderr", "_low": "low", "_high": "high"}
    return {f"{key}{end}": getattr(value, part) for key, value in values.items() for end, part in parts.items()}


def length_controlled_win_rate(
    scores: Tensor, length_differences: Tensor, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The win rate that would be left if the responses were as long as the ones they are compared with.

    After AlpacaEval 2 (arXiv 2404.04475): a logistic regression of the preference,

        P(win) = sigmoid( theta + phi tanh(d / sd(d)) ),   d: length less the other's,

    evaluated at ``d = 0``, which is ``sigmoid(theta)``. Its third term, the difficulty of each instruction, is left
    out: it is fitted on many models' responses to one fixed set of instructions. Lengths that all differ by the same
    cannot be told from quality; what comes out is then the plain win rate. Data that a threshold in d separates leaves
    theta open within bounds, and the estimate with it: look at the interval.

    Args:
        scores: ``(P, n)``, 1 a win, 0 a loss, anything between counts in part; NaN is left out. Each prompt weighs
            the same.
        length_differences: ``(P, n)``, in any unit.
        level: coverage of the percentile bootstrap interval over prompts.
        num_resamples: bootstrap draws; the regression is fitted anew in each.
        seed: of the draws.
    """
    known = ~scores.isnan()
    kept = known.any(dim=1)
    known, scores, differences = known[kept], scores[kept].double(), length_differences[kept].double()
    num_prompts, num_responses = scores.shape
    spread = differences[known].std(correction=0) if num_prompts else torch.tensor(0)
    terms = (differences / spread).tanh() if spread > 0 else torch.zeros_like(differences)
    terms, scores = terms.flatten(), scores.nan_to_num().flatten()
    share = (known / known.sum(dim=1, keepdim=True)).flatten()

    def win_rates(counts: Tensor) -> Tensor:
        """``(R, P)`` how often each prompt counts -> ``(R,)``."""
        weights = counts.repeat_interleave(num_responses, dim=1) * share / num_prompts
        return _fit_logistic(terms, scores, weights)[:, 0].sigmoid()

    draws = map(win_rates, _resamples(num_prompts, num_prompts * num_responses, num_resamples, seed))
    estimate = win_rates(torch.ones(1, num_prompts, dtype=torch.float64))[0]
    return _interval(estimate, list(draws), num_prompts, level)


def _prompt_means(values: Tensor) -> Tensor:
    """``(P,)`` or ``(P, n)``, NaN where there is no value -> the means of the prompts that have one, float64."""
    means = values.double().reshape(len(values), -1).nanmean(dim=1)
    return means[~means.isnan()]


def _resamples(num_prompts: int, row_size: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Chunks ``(R, P)`` of how often each resample has each prompt, R such that ``R * row_size`` stays small."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in torch.arange(num_resamples).split(max(1, _ELEMENTS // max(1, row_size))):
        drawn = torch.randint(max(1, num_prompts), (len(chunk), num_prompts), generator=generator)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _interval(mean: Tensor, draws: list[Tensor], num_prompts: int, level: float) -> Interval:
    assert 0 < level < 1
    if num_prompts < 2:
        return Interval(mean.item() if num_prompts else torch.nan, torch.inf, -torch.inf, torch.inf)
    drawn = torch.cat(draws)
    low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(mean.item(), drawn.std().item(), low, high)


def _fit_logistic(term: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Minimises R weighted cross-entropies of ``sigmoid(theta + phi term)`` at once, by Newton steps.

    Full steps overshoot where the data is nearly separable. Steps of the length ``log(1 + r) / r``, with r the largest
    change of a logit, never do (arXiv 1703.04599), and become full ones as r vanishes.

    Args:
        term: ``(N,)`` float64, between -1 and 1.
        scores: ``(N,)`` float64, between 0 and 1.
        weights: ``(R, N)`` float64, each row adds up to 1.

    Returns:
        ``(R, 2)``, theta and phi.
    """
    features = torch.stack([torch.ones_like(term), term], dim=1)  # (N, 2)
    products = features[:, :, None] * features[:, None, :]  # (N, 2, 2)
    ridge = _RIDGE * torch.eye(2, dtype=torch.float64)
    parameters = torch.zeros(len(weights), 2, dtype=torch.float64)
    for _ in range(_MAX_NEWTON_STEPS):
        probs = (parameters @ features.T).sigmoid()  # (R, N)
        gradient = (weights * (probs - scores)) @ features + _RIDGE * parameters
        hessian = ((weights * probs * (1 - probs)) @ products.flatten(1)).unflatten(1, (2, 2)) + ridge
        step = torch.linalg.solve(hessian, gradient)
        change = step.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)
        parameters = parameters - step * change.log1p() / change
        if change.max() < 1e-9:
            break
    return parameters
