"""Losses of responses that the policy itself has just sampled: the other side of the comparison with offline pairs.

What is climbed, by RLOO exactly and by the others in ways that they name, is the objective that DPO is derived from,

    J(pi) = E_{y ~ pi} r(y) - beta KL(pi || ref),        best at    pi* ~ ref exp(r / beta)

so the reward that a policy implies is ``beta log pi/ref`` up to a constant of the prompt, on-policy as offline: the
same held-out pairs measure both, by ``implied``. The samples depend on the policy, so the gradient is a score function,
``E (R - b) grad log pi``: advantages are numbers without gradient, and a loss is a surrogate, right in its gradient
alone; its value is no J and may rise while J rises. All hold for samples of the very policy that is updated, at
temperature 1 and top-p 1, once: then pi over the policy that sampled is 1, and neither an importance weight nor PPO's
clip has anything to do.

A new objective is one subclass of ``OnPolicyObjective`` and one YAML file. Shapes: P prompts, K responses to each, C
positions of the longest response. All log-probs are in nats, rewards in the reward's own unit.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import DPOLoss, PairLoss, checked

_STD_FLOOR = 1e-4  # GRPO: what keeps a group of equal rewards finite, as trainers set it


class Rollouts(NamedTuple):
    """K responses to each of P prompts, sampled at temperature 1 and top-p 1 from the very policy that is updated.

    Attributes:
        per_token_logps: ``(P, K, C)`` of the policy, with its gradient, in nats; 0 where masked.
        ref_per_token_logps: ``(P, K, C)`` of the reference, without gradient; 0 where masked.
        mask: ``(P, K, C)`` bool, true at response tokens, EOS included; every response has at least one.
        rewards: ``(P, K)`` fp32, without gradient.
    """

    per_token_logps: Tensor
    ref_per_token_logps: Tensor
    mask: Tensor
    rewards: Tensor

    @property
    def logps(self) -> Tensor:
        """``(P, K)`` ``log pi(y|x)``, summed over the response's tokens."""
        return self.per_token_logps.sum(dim=2)

    @property
    def ref_logps(self) -> Tensor:
        """``(P, K)`` ``log ref(y|x)``, likewise."""
        return self.ref_per_token_logps.sum(dim=2)

    @property
    def logratios(self) -> Tensor:
        """``(P, K)`` ``log pi(y|x) - log ref(y|x)``: of samples, the estimate k1 of KL(pi || ref)."""
        return self.logps - self.ref_logps

    @property
    def num_tokens(self) -> Tensor:
        """``(P, K)`` int64 length of the response in tokens, EOS included."""
        return self.mask.sum(dim=2)


class OnPolicyObjective(ABC):
    """Turns rewarded samples into losses whose gradient is minus that of what is climbed.

    Args:
        beta: strength of the KL penalty, in units of reward a nat, above 0: a policy that nothing holds implies no
            reward.

    Raises:
        InputError: ``beta`` is not a positive finite number.
    """

    def __init__(self, beta: float) -> None:
        self.beta = checked("beta", beta, above=0.0, of="model.objective")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """Computes the loss of each prompt, ``(P,)``, with the policy's gradient; K is at least 2."""
        assert rollouts.rewards.shape[1] >= 2, "a response is measured against others to the same prompt"
        return self.losses(rollouts)

    @abstractmethod
    def losses(self, rollouts: Rollouts) -> Tensor:
        """As ``__call__``."""

    def implied(self) -> PairLoss:
        """The offline loss by which held-out pairs measure this policy: here DPO's, of rewards ``beta log pi/ref``."""
        return DPOLoss(self.beta)


class RLOOObjective(OnPolicyObjective):
    """REINFORCE, leave one out (arXiv 2402.14740): ``-mean_i A_i log pi(y_i|x)``, whole responses as single actions.

    ``A_i = R_i - mean_{j != i} R_j``, and the penalty is a part of the reward: ``R = r - beta log pi/ref``. As the
    others know nothing of ``y_i``, their mean takes off variance and no more, and ``E (log pi/ref) grad log pi`` is the
    gradient of KL(pi || ref): the gradient is that of J, without bias.

    Args:
        beta: above 0.
    """

    def __init__(self, beta: float = 0.05) -> None:
        super().__init__(beta)

    def losses(self, rollouts: Rollouts) -> Tensor:
        """The penalised reward carries no gradient."""
        returns = rollouts.rewards - self.beta * rollouts.logratios.detach()
        return _score_function(returns, rollouts.logps)


class GRPOObjective(OnPolicyObjective):
    """Group-relative policy optimisation (arXiv 2402.03300, eq. 3) with one update a batch of samples.

    ``A_i = (r_i - mean r) / (std r + 1e-4)``, and the loss of a token is ``beta k3_t - (pi/sg pi) A_i``, with
    ``k3_t = ref/pi - 1 - log ref/pi`` of that token, averaged over the response's tokens, then over the K responses.
    The ratio ``pi/sg pi`` is 1 in value, so the paper's clip would never act, and is left out.

    It is not J that this climbs. The mean holds ``r_i`` itself, which shortens the reward's gradient to ``(K-1)/K``.
    The gradient of k3 is ``(1 - ref/pi) grad log pi``, in expectation that of KL(ref || pi), the other direction, at
    the states that the policy visits. Of a single token, unscaled, the two balance at ``pi = ref / (1 - a)``, with
    ``a = (K-1)/K (r - E r) / beta``; J is best at ``ref exp(r / beta)``, normalised. To first order they differ by the
    factor ``(K-1)/K``, and the order of responses is the same: ``implied`` ranks pairs as the balance does, its margins
    are approximate. The scale makes beta a penalty per standard deviation of each prompt; the average over tokens
    favours long responses among the bad and short ones among the good.

    Args:
        beta: above 0.
        scale_rewards: whether advantages are divided by their standard deviation; Dr. GRPO (arXiv 2503.20783) does not.
        length_normalization: whether a response's tokens are averaged; if not, they are summed, as Dr. GRPO argues.
    """

    def __init__(self, beta: float = 0.04, scale_rewards: bool = True, length_normalization: bool = True) -> None:
        super().__init__(beta)
        self.scale_rewards = scale_rewards
        self.length_normalization = length_normalization

    def losses(self, rollouts: Rollouts) -> Tensor:
        """``ref/pi`` of a sampled token is at most ``1/pi``, so it needs no bound."""
        advantages = rollouts.rewards - rollouts.rewards.mean(dim=1, keepdim=True)
        if self.scale_rewards:
            advantages = advantages / (rollouts.rewards.std(dim=1, keepdim=True) + _STD_FLOOR)
        ratios = (rollouts.per_token_logps - rollouts.per_token_logps.detach()).exp()
        log_inverse = rollouts.ref_per_token_logps - rollouts.per_token_logps
        k3 = log_inverse.exp() - 1 - log_inverse
        responses = ((self.beta * k3 - ratios * advantages[:, :, None]) * rollouts.mask).sum(dim=2)
        if self.length_normalization:
            responses = responses / rollouts.num_tokens
        return responses.mean(dim=1)


class OnlineDPOObjective(OnPolicyObjective):
    """Online DPO (arXiv 2402.04792): the best against the worst of the K responses, as a pair of any offline loss.

    The first one counts among equals. A prompt whose rewards are all equal states no preference and has a loss of 0.

    Args:
        loss: of the pair, its auxiliary term included; ``beta`` is its own.
    """

    def __init__(self, loss: PairLoss) -> None:
        super().__init__(loss.beta)
        self.loss = loss

    def losses(self, rollouts: Rollouts) -> Tensor:
        """No gradient goes through the choice of the pair."""
        pairs = self.pairs(rollouts)
        return self.loss.weighted(pairs) * ~_equal(rollouts.rewards)

    def pairs(self, rollouts: Rollouts) -> PairLogps:
        """One pair of each of the P prompts: the policy wrote it, so mu is the policy."""
        chosen, rejected = rollouts.rewards.argmax(dim=1), rollouts.rewards.argmin(dim=1)
        prompts = torch.arange(len(chosen), device=chosen.device)
        logps, ref_logps, num_tokens = rollouts.logps, rollouts.ref_logps, rollouts.num_tokens
        unknown = torch.full_like(ref_logps[:, 0], torch.nan)
        return PairLogps(
            chosen_logps=logps[prompts, chosen],
            rejected_logps=logps[prompts, rejected],
            ref_chosen_logps=ref_logps[prompts, chosen],
            ref_rejected_logps=ref_logps[prompts, rejected],
            mu_chosen_logps=logps.detach()[prompts, chosen],
            mu_rejected_logps=logps.detach()[prompts, rejected],
            chosen_num_tokens=num_tokens[prompts, chosen],
            rejected_num_tokens=num_tokens[prompts, rejected],
            margins=torch.zeros_like(unknown),
            chosen_alignment=unknown,
            rejected_alignment=unknown,
        )

    def implied(self) -> PairLoss:
        """The pair's loss itself."""
        return self.loss


def on_policy_kl(rollouts: Rollouts) -> Tensor:
    """KL(pi || ref) of each prompt, ``(P,)``, in nats: a term beside an offline loss, as in HyPO (arXiv 2406.01462).

    The value is the mean log-ratio of the samples (k1). That one's own gradient is ``grad log pi``, in expectation 0,
    and would hold nothing; the gradient here is RLOO's of rewards ``-log pi/ref``, without bias. Rewards are not looked
    at; K is at least 2.

    >>> rollouts = Rollouts(torch.tensor([[[-1.0], [-2.0]]]), torch.tensor([[[-1.5], [-1.0]]]), torch.ones(1, 2, 1) > 0,
    ...                     torch.zeros(1, 2))
    >>> on_policy_kl(rollouts)
    tensor([-0.2500])
    """
    assert rollouts.rewards.shape[1] >= 2, "a response is measured against others to the same prompt"
    logratios = rollouts.logratios.detach()
    surrogate = _score_function(-logratios, rollouts.logps)
    return logratios.mean(dim=1) + (surrogate - surrogate.detach())


def rollout_columns(losses: Tensor, rollouts: Rollouts, finished: Tensor) -> dict[str, Tensor]:
    """What is logged about P prompts with K responses each.

    ``loss`` is a surrogate's value. ``reward/std`` is the standard deviation within a prompt (correction 1), and
    ``reward/equal_fraction`` the share of prompts whose K rewards are all equal, which teach nothing but the penalty.
    ``kl/k1`` is the samples' mean log-ratio and ``entropy`` their mean ``-log pi(y|x)``, both in nats a response;
    ``response_length`` is in tokens, EOS included; ``finished_fraction`` is of responses.

    Args:
        losses: ``(P,)``.
        rollouts: of the P prompts, K at least 2.
        finished: ``(P, K)`` bool, true at responses that end with EOS.
    """
    return {
        "loss": losses,
        "reward/mean": rollouts.rewards.mean(dim=1),
        "reward/std": rollouts.rewards.std(dim=1),
        "reward/equal_fraction": _equal(rollouts.rewards).float(),
        "kl/k1": rollouts.logratios.detach().mean(dim=1),
        "entropy": -rollouts.logps.detach().mean(dim=1),
        "response_length": rollouts.num_tokens.float().mean(dim=1),
        "finished_fraction": finished.to(losses.device).float().mean(dim=1),
    }


def _score_function(returns: Tensor, logps: Tensor) -> Tensor:
    """``-mean_i (R_i - mean_{j != i} R_j) log pi(y_i)``, ``(P, K), (P, K) -> (P,)``; returns are without gradient."""
    num_responses = returns.shape[1]
    others = (returns.sum(dim=1, keepdim=True) - returns) / (num_responses - 1)
    return -((returns - others) * logps).mean(dim=1)


def _equal(rewards: Tensor) -> Tensor:
    """``(P, K) -> (P,)`` bool: whether all K are the same number."""
    return (rewards == rewards[:, :1]).all(dim=1)
