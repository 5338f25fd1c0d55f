"""Every response of a design, and what a language model says about all of them: sums instead of samples.

Given the log-probs of the next token at each node of a :class:`~lit_isdpo.lab.designs.ResponseTree`, everything about a
model's responses is a sum over nodes, for the process that is sampled with a limit of L + 1 new tokens: a response
still without an end there is *unfinished*. What the probe estimates from samples is exact here.

Shapes: P prompts, N nodes, K words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lit_isdpo.lab.designs import Design, ResponseTree
from lit_isdpo.policy.attention import autocast
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel

_CROWN = 100  # most tokens of a row that share its stem: larger wastes attention, smaller computes stems more often
_ROWS = 64  # rows of a forward: more no longer fit the processor's cache


@dataclass(frozen=True)
class ResponseDistribution:
    """What a model says about every response to P prompts.

    Attributes:
        tree: the numbering of the N nodes.
        next_logps: ``(P, N, K + 1)`` log-probs of the next token at each node, the end token last; float64, nats.
    """

    tree: ResponseTree
    next_logps: Tensor

    @cached_property
    def prefix_logps(self) -> Tensor:
        """``(P, N)`` log-prob that a response begins with the node's words."""
        levels = [self.next_logps.new_zeros(self.next_logps.shape[0], 1)]
        for length in range(self.tree.max_words):
            continued = self.next_logps[:, self.tree.level(length), :-1]  # (P, K^length, K)
            levels.append((levels[-1][..., None] + continued).flatten(1))
        return torch.cat(levels, dim=1)

    @cached_property
    def logps(self) -> Tensor:
        """``(P, N)`` log-prob of each response, its end token included."""
        return self.prefix_logps + self.next_logps[..., -1]

    @cached_property
    def longer(self) -> Tensor:
        """``(P, K^L)`` probability that a response begins with the words of each deepest node, and goes on behind."""
        deepest = self.tree.level(self.tree.max_words)
        going_on = self.next_logps[:, deepest, :-1].logsumexp(dim=2)
        return (self.prefix_logps[:, deepest] + going_on).exp()

    @property
    def unfinished(self) -> Tensor:
        """``(P,)`` probability that no end token is among the first ``max_words + 1`` tokens."""
        return self.longer.sum(dim=1)

    @property
    def outcomes(self) -> Tensor:
        """``(P, N + K^L)`` probability of each finished response, and of going on behind each deepest node."""
        return torch.cat([self.logps.exp(), self.longer], dim=1)

    def expectation(self, values: Tensor, longer: float | Tensor) -> Tensor:
        """``(P,)`` mean of a number that each response has.

        Args:
            values: ``(N,)`` or ``(P, N)``, of the node as a finished response.
            longer: of the responses that go on behind a deepest node: one number, or ``(K^L,)`` or ``(P, K^L)``.
        """
        return (self.logps.exp() * values).sum(dim=1) + (self.longer * longer).sum(dim=1)

    def kl(self, reference: "ResponseDistribution") -> Tensor:
        """``(P,)`` KL(self || reference) in nats, of responses stopped at ``max_words + 1`` tokens.

        By the chain rule the sum over nodes of the probability to come there times the KL of the next token: the
        expectation of the Rao-Blackwell estimator (arXiv 2504.10637).
        """
        next_kl = (self.next_logps.exp() * (self.next_logps - reference.next_logps)).sum(dim=2)  # (P, N)
        return (self.prefix_logps.exp() * next_kl).sum(dim=1)


@torch.no_grad()
def enumerate_responses(
    model: LogProbModel, prompts: Sequence[Sequence[int]], tree: ResponseTree
) -> ResponseDistribution:
    """Asks the model for the next token at every node.

    A row of the batch is ``[prompt | stem | crown]``: a stem of words, and below it the whole tree of the last few
    levels, in which a token attends only to its ancestors. So nearly every token of a forward is a node of its
    own; a key-value cache would hold 46,656 copies of the prompt instead. The mask is additive, because eager
    attention gets a boolean one silently wrong.

    Args:
        model: with a vocabulary of the tree's words and the end token. What pads it behind these is left out, as it is
            where responses are sampled.
        prompts: token ids of P prompts.
        tree: the responses.

    Returns:
        The distribution, on the CPU.
    """
    num_words, device = tree.num_words, model.model.device
    assert model.vocabulary_size >= num_words + 1
    depth = max(d for d in range(1, tree.max_words + 1) if d == 1 or len(ResponseTree(num_words, d)) - 1 <= _CROWN)
    stem_length = tree.max_words - depth
    crown = ResponseTree(num_words, depth)
    crown_words = (torch.arange(len(crown) - 1) % num_words).to(device)  # nodes 1, 2, ...: the root is the stem's end
    stems = tree.words[tree.level(stem_length), :stem_length].to(device)  # (R, S)
    next_logps = []
    for prompt in prompts:
        ids = torch.tensor(prompt, device=device)
        trunk = len(prompt) + stem_length
        positions = torch.cat([torch.arange(trunk), trunk - 1 + crown.lengths[1:]]).to(device)
        mask = _crown_mask(crown, trunk).to(device)
        rows = []
        for some in stems.split(_ROWS):
            input_ids = torch.cat(
                [ids.expand(len(some), -1), some, crown_words.expand(len(some), -1)], dim=1
            )  # (rows, trunk + crown)
            with autocast(device, model.compute_dtype):
                output = model.model.base_model(
                    input_ids=input_ids,
                    attention_mask=mask.expand(len(some), 1, -1, -1),
                    position_ids=positions.expand(len(some), -1),
                    use_cache=False,
                )
            logits = model.head(output.last_hidden_state[:, len(prompt) - 1 :])[..., : num_words + 1]
            rows.append(logits.double().log_softmax(dim=2).cpu())
        next_logps.append(_in_order_of_nodes(torch.cat(rows), stem_length, crown))
    return ResponseDistribution(tree, torch.stack(next_logps))


def _crown_mask(crown: ResponseTree, trunk: int) -> Tensor:
    """``(1, 1, T, T)`` additive: the trunk is causal, a node of the crown sees the trunk, its ancestors and itself."""
    length = trunk + len(crown) - 1
    ancestors = torch.eye(len(crown), dtype=torch.bool)
    for node in range(1, len(crown)):
        ancestors[node] |= ancestors[(node - 1) // crown.num_words]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[trunk:, trunk:] = ancestors[1:, 1:]
    return torch.zeros(length, length).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


def _in_order_of_nodes(rows: Tensor, stem_length: int, crown: ResponseTree) -> Tensor:
    """``(R, S + crown, V) -> (N, V)``; a node on several stems is taken from the first."""
    levels = [rows[:: crown.num_words ** (stem_length - length), length] for length in range(stem_length + 1)]
    for length in range(1, crown.max_words + 1):
        nodes = crown.level(length)
        levels.append(rows[:, stem_length + nodes.start : stem_length + nodes.stop].flatten(0, 1))
    return torch.cat(levels)


@cache
def shipped_model(design: Design) -> LogProbModel:
    """The reference that comes with the package."""
    return LogProbModel(load_causal_lm(PolicyConfig(path=str(design.reference))))


@cache
def shipped_reference(design: Design) -> ResponseDistribution:
    """The responses of the reference that comes with the package."""
    return enumerate_responses(shipped_model(design), design.prompts, design.tree)


def pair_logps(design: Design, part: str, reference: ResponseDistribution) -> Tensor:
    """``(P, N)`` log mu, the true distribution of a response of a pair: the reference's on the part's support.

    The part's temperature sharpens or flattens it.

    It is exact for two independent responses; of the data those pairs are left out in which both are the same.
    """
    within = (reference.logps / design.parts[part].temperature).masked_fill(~design.parts[part].support, -math.inf)
    return within - within.logsumexp(dim=1, keepdim=True)


def behavior_logps(design: Design, part: str, mu_logps: Tensor) -> Tensor:
    """``(P, N)`` what the part's data says that the log-probs of its responses are: true, or wrong on purpose."""
    if design.parts[part].true_mu:
        return mu_logps
    uniform = -design.tree.lengths * math.log(design.tree.num_words)
    return uniform.to(mu_logps).expand_as(mu_logps)


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
        shipped, tensors = shipped_model(self.design), model.model.state_dict()
        others = shipped.model.state_dict()
        if (
            model.compute_dtype == shipped.compute_dtype
            and tensors.keys() == others.keys()
            and all(torch.equal(tensor.cpu(), others[name]) for name, tensor in tensors.items())
        ):
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
