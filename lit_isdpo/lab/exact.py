"""Exact values of a policy on a design: what the probe estimates from samples, and what no sample can tell."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_isdpo.lab.design_data import pair_logps, shipped_model, shipped_reference
from lit_isdpo.lab.designs import Design
from lit_isdpo.lab.enumeration import ResponseDistribution, enumerate_responses
from lit_isdpo.policy.logprob_model import LogProbModel


def expected_weight(policy_logps: Tensor, mu_logps: Tensor, denominator_logps: Tensor) -> Tensor:
    """``(P,)`` mean importance weight, not clipped, of two independent responses from mu.

    ``E[ pi(y) pi(y') / (d(y) d(y')) ] = (sum_y mu(y) pi(y) / d(y))^2``, where d is the policy that the weight divides
    by. For d = mu that is ``pi(S)^2``, the squared probability of mu's support S: below 1 as far as the policy, or
    already its reference, leaves S. For d = the reference, and mu the reference given S, it is ``(pi(S) / ref(S))^2``:
    1 at the reference.

    Args:
        policy_logps: ``(P, N)`` log pi of every response.
        mu_logps: ``(P, N)`` log mu; -inf outside its support.
        denominator_logps: ``(P, N)`` log d.
    """
    log_weighted = mu_logps + _within(mu_logps, policy_logps - denominator_logps)
    return log_weighted.logsumexp(dim=1).mul(2).exp()


def effective_sample_size(policy_logps: Tensor, mu_logps: Tensor) -> Tensor:
    """The weights' exact ``E[w]^2 / E[w^2]`` over prompts and pairs from mu, not clipped: a scalar from 0 to 1.

    For a prompt ``E[w^2] = (sum_y mu(y) (pi(y) / mu(y))^2)^2``, which no sample of feasible size estimates once the
    policy has left the data.
    """
    log_ratios = _within(mu_logps, policy_logps - mu_logps)
    first = expected_weight(policy_logps, mu_logps, mu_logps).mean()
    second = (mu_logps + 2 * log_ratios).logsumexp(dim=1).mul(2).exp().mean()
    return first**2 / second


def win_rate(policy: Tensor, reference: Tensor, values: Tensor) -> Tensor:
    """``(P,)`` probability that the policy's response has the larger value, ties counting one half.

    ``sum_y policy(y) (reference(value < v_y) + reference(value <= v_y)) / 2``: sorting serves instead of N x N pairs.

    Args:
        policy: ``(P, N)`` probabilities.
        reference: ``(P, N)`` probabilities of the other, independent response.
        values: ``(P, N)``.
    """
    ordered, order = values.sort(dim=1)
    cumulative = torch.nn.functional.pad(reference.gather(1, order).cumsum(dim=1), (1, 0))  # (P, N + 1)
    below = cumulative.gather(1, torch.searchsorted(ordered, values))
    not_above = cumulative.gather(1, torch.searchsorted(ordered, values, right=True))
    return (policy * (below + not_above)).sum(dim=1) / 2


def _within(mu_logps: Tensor, values: Tensor) -> Tensor:
    """The values where mu is not 0, and 0 elsewhere, where they may be infinite."""
    return values.masked_fill(mu_logps.isneginf(), 0)


def _same(model: LogProbModel, other: LogProbModel) -> bool:
    """Whether two models are one function in the same numerics."""
    tensors, others = model.model.state_dict(), other.model.state_dict()
    return (
        model.compute_dtype == other.compute_dtype
        and tensors.keys() == others.keys()
        and all(torch.equal(tensor.cpu(), others[name]) for name, tensor in tensors.items())
    )


class ExactEvaluation:
    """Exact values of policies on a design, and on one of its sets of pairs.

    Args:
        design: the task.
        part: the pairs that are trained on; ``None`` where these are demonstrations.
    """

    def __init__(self, design: Design, part: str | None) -> None:
        self.design = design
        self.part = part

    def applies_to(self, model: LogProbModel, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether the model speaks the design's vocabulary, and is given the design's prompts as they were written."""
        return (model.num_tokens or model.vocabulary_size) == self.design.tree.num_words + 1 and all(
            tuple(prompt) in self.design.prompts for prompt in prompts
        )

    def enumerate(self, model: LogProbModel) -> ResponseDistribution:
        """Every response of the model to every prompt; for the shipped tasks some seconds on one core.

        What the shipped reference says is summed once in a process: it is asked as the reference, as the policy before
        the first step, and as the writer of the pairs.
        """
        if _same(model, shipped_model(self.design)):
            return shipped_reference(self.design)
        return enumerate_responses(model, self.design.prompts, self.design.tree)

    def __call__(self, policy: ResponseDistribution, reference: ResponseDistribution | None) -> dict[str, float]:
        """Log keys, without a prefix: means over the prompts.

        ``kl`` is in nats, of responses stopped at one token more than the longest has words; ``win_rate`` is by gold
        reward against the reference; ``response_length`` in tokens; ``feature`` is the mean number of "very", or of
        words, among the words that the reward looks at. Where there are pairs, ``support_mass`` is the probability of a
        response that they could hold, ``expected_weight`` and ``expected_weight_true_mu`` are those of
        :func:`expected_weight` against the reference and against mu, and ``ess`` the effective sample size against mu.
        """
        design = self.design
        feature = design.feature.clamp(min=0)
        values = {
            "gold_reward": policy.expectation(design.gold, design.longer_gold),
            "feature": policy.expectation(feature, feature[design.tree.level(design.tree.max_words)]),
            "response_length": policy.expectation(design.tree.lengths + 1, design.tree.max_words + 1),
            "finished_fraction": 1 - policy.unfinished,
        }
        if reference is not None:
            values["kl"] = policy.kl(reference)
            gold = torch.cat([design.gold, design.longer_gold], dim=1)
            values["win_rate"] = win_rate(policy.outcomes, reference.outcomes, gold)
        if self.part is not None:
            mu_logps = pair_logps(design, self.part, shipped_reference(design))
            values["support_mass"] = policy.expectation(design.parts[self.part].support, 0.0)
            values["expected_weight_true_mu"] = expected_weight(policy.logps, mu_logps, mu_logps)
            values["ess"] = effective_sample_size(policy.logps, mu_logps)
            if reference is not None:
                values["expected_weight"] = expected_weight(policy.logps, mu_logps, reference.logps)
        return {key: float(value.mean()) for key, value in values.items()}
