"""On-policy losses: their expected gradients by enumeration of every draw, their values by hand."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import DPOLoss, IPOLoss, IRPOLoss, PreferenceLoss, SimPOLoss
from lit_isdpo.objective.metrics import RowMetrics
from lit_isdpo.objective.on_policy import (
    GRPOObjective,
    OnlineDPOObjective,
    OnPolicyObjective,
    RLOOObjective,
    Rollouts,
    on_policy_kl,
    rollout_columns,
)
from lit_isdpo.types import InputError
from tests.conftest import pair_logps

LN2 = math.log(2)


class World(NamedTuple):
    """All N responses there are, and where a table of logits, (contexts, V), has their tokens."""

    contexts: Tensor  # (N, C)
    tokens: Tensor  # (N, C)
    mask: Tensor  # (N, C)
    size: tuple[int, int]

    def per_token(self, table: Tensor) -> Tensor:
        return table.log_softmax(dim=1)[self.contexts, self.tokens].masked_fill(~self.mask, 0.0)


FIVE_ARMS = World(torch.zeros(5, 1).long(), torch.arange(5)[:, None], torch.ones(5, 1).bool(), (1, 5))
TWO_TOKENS = World(  # token 0 is EOS; the context is 0 at the start, else the token before
    torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]),
    torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]),
    torch.tensor([[True, False]] + [[True, True]] * 6),
    (3, 3),
)
WORLDS = pytest.mark.parametrize("world", [FIVE_ARMS, TWO_TOKENS], ids=["five_arms", "two_tokens"])
GROUPS = pytest.mark.parametrize("number", [2, 3])


def tables(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """The policy's logits, the reference's, and a reward of each response."""
    generator = torch.Generator().manual_seed(3)
    policy, ref = torch.randn(2, *world.size, generator=generator, dtype=torch.float64)
    rewards = torch.randn(len(world.tokens), generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), ref, rewards


def every_draw(world: World, policy: Tensor, ref: Tensor, rewards: Tensor, number: int) -> tuple[Rollouts, Tensor]:
    """All N^K draws of K responses as so many prompts, and the probability of each."""
    draws = torch.cartesian_prod(*[torch.arange(len(world.tokens))] * number)  # (N^K, K)
    per_token = world.per_token(policy)
    rollouts = Rollouts(per_token[draws], world.per_token(ref)[draws], world.mask[draws], rewards[draws])
    return rollouts, per_token.sum(dim=1).detach()[draws].sum(dim=1).exp()


def gradient(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(value, parameter, retain_graph=True)[0]


def expected_gradient(loss: Callable[[Rollouts], Tensor], world: World, number: int) -> Tensor:
    policy, ref, rewards = tables(world)
    rollouts, probabilities = every_draw(world, policy, ref, rewards, number)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    return gradient(probabilities @ loss(rollouts), policy)


def true_values(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """``E r`` and ``KL(pi || ref)``, functions of the policy's table, which comes last."""
    policy, ref, rewards = tables(world)
    logps, ref_logps = world.per_token(policy).sum(dim=1), world.per_token(ref).sum(dim=1)
    return logps.exp() @ rewards, logps.exp() @ (logps - ref_logps), policy


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-2


@WORLDS
@GROUPS
def test_rloo_has_the_gradient_of_the_penalised_reward(world: World, number: int) -> None:
    reward, kl, policy = true_values(world)
    exactly(expected_gradient(RLOOObjective(0.7), world, number), -gradient(reward - 0.7 * kl, policy))


@WORLDS
@GROUPS
def test_the_on_policy_kl_has_the_gradient_and_the_mean_of_the_kl(world: World, number: int) -> None:
    _, kl, policy = true_values(world)
    exactly(expected_gradient(on_policy_kl, world, number), gradient(kl, policy))
    rollouts, probabilities = every_draw(world, *tables(world), number)
    exactly(probabilities @ on_policy_kl(rollouts), kl)


@WORLDS
@GROUPS
def test_grpo_unscaled_shortens_the_rewards_gradient(world: World, number: int) -> None:
    """``r_i - mean`` is ``(K-1)/K`` of ``r_i`` minus the others' mean; beta is too small to be seen."""
    reward, _, policy = true_values(world)
    objective = GRPOObjective(1e-20, scale_rewards=False, length_normalization=False)
    exactly(expected_gradient(objective, world, number), -(number - 1) / number * gradient(reward, policy))


@WORLDS
@GROUPS
def test_grpos_penalty_has_the_gradient_of_the_other_kl(world: World, number: int) -> None:
    """``E_pi (1 - ref/pi) grad log pi`` is ``grad KL(ref || pi)`` of the next token where the policy goes."""
    policy, ref, _ = tables(world)
    objective = GRPOObjective(1.0, scale_rewards=False, length_normalization=False)

    def penalty(rollouts: Rollouts) -> Tensor:
        return objective(rollouts._replace(rewards=torch.zeros_like(rollouts.rewards)))

    kls = (ref.softmax(dim=1) * (ref.log_softmax(dim=1) - policy.log_softmax(dim=1))).sum(dim=1)
    visits = torch.ones(1, dtype=torch.float64)
    if world is TWO_TOKENS:
        visits = torch.cat([visits, policy.detach().softmax(dim=1)[0, 1:]])
    exactly(expected_gradient(penalty, world, number), gradient(visits @ kls, policy))
    rollouts, probabilities = every_draw(world, *tables(world), number)
    exactly(probabilities @ penalty(rollouts), true_values(world)[1])  # its value is of the KL that J names


@GROUPS
def test_where_nothing_is_left_to_climb(number: int) -> None:
    """RLOO rests where rewards are ``beta log pi/ref``, GRPO on one token at ``pi = ref / (1 - a)``."""
    policy, ref, _ = tables(FIVE_ARMS)
    logratios = (policy.log_softmax(dim=1) - ref.log_softmax(dim=1))[0].detach()
    grpo = GRPOObjective(0.7, scale_rewards=False, length_normalization=False)
    for objective, rewards in (
        (RLOOObjective(0.7), 0.7 * logratios + 3),
        (grpo, 0.7 * number / (number - 1) * (1 - (-logratios).exp()) + 3),
    ):
        rollouts, probabilities = every_draw(FIVE_ARMS, policy, ref, rewards, number)
        rests = gradient(probabilities @ objective(rollouts), policy)
        torch.testing.assert_close(rests, torch.zeros_like(rests), rtol=0, atol=1e-10)
        moves = gradient(probabilities @ objective(rollouts._replace(rewards=rollouts.rewards * 2)), policy)
        assert moves.abs().max() > 1e-2


def single_tokens(logps: list[float], ref_logps: list[float], rewards: list[float]) -> Rollouts:
    """One prompt, responses of one token."""
    per_token = torch.tensor(logps)[None, :, None].requires_grad_()
    return Rollouts(
        per_token, torch.tensor(ref_logps)[None, :, None], torch.ones_like(per_token).bool(), torch.tensor([rewards])
    )


def gradients(losses: Tensor, rollouts: Rollouts) -> list[float]:
    """Of the responses' first tokens."""
    return [round(value, 6) + 0.0 for value in gradient(losses.sum(), rollouts.per_token_logps)[0, :, 0].tolist()]


def test_rloo_by_hand() -> None:
    """Log-ratios 2, 0, -2, so returns 2 - 1, 0, 1 + 1; the others' means are 1, 3/2, 1/2."""
    rollouts = single_tokens([-1.0, -2.0, -4.0], [-3.0, -2.0, -2.0], [2.0, 0.0, 1.0])
    losses = RLOOObjective(0.5)(rollouts)
    torch.testing.assert_close(losses, torch.tensor([-(0 * -1.0 - 1.5 * -2.0 + 1.5 * -4.0) / 3]))
    assert gradients(losses, rollouts) == [0.0, 0.5, -0.5]


def test_the_on_policy_kl_by_hand() -> None:
    """Log-ratios 2, 0, -1: the others' means are -1/2, 1/2, 1."""
    rollouts = single_tokens([-1.0, -2.0, -3.0], [-3.0, -2.0, -2.0], [5.0, math.nan, 7.0])
    losses = on_policy_kl(rollouts)
    torch.testing.assert_close(losses, torch.tensor([1 / 3]))
    assert gradients(losses, rollouts) == [round(value / 3, 6) for value in (2.5, -0.5, -2.0)]


def of_two_lengths() -> Rollouts:
    """Rewards 3 and 1; the first response has two tokens, ref/pi 1 and 2, the second one with ref/pi 1/2."""
    logps = torch.tensor([[[-1.0, -2.0], [-1.0, 0.0]]], requires_grad=True)
    ref_logps = torch.tensor([[[-1.0, -2.0 + LN2], [-1.0 - LN2, 0.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    return Rollouts(logps, ref_logps, mask, torch.tensor([[3.0, 1.0]]))


def test_grpo_by_hand() -> None:
    """The mean is 2, the standard deviation root 2; k3 is 0, 1 - ln 2 and ln 2 - 1/2, its slope 0, -1 and 1/2."""
    beta = 0.5
    for scale, per_token in ((False, False), (True, False), (False, True), (True, True)):
        rollouts = of_two_lengths()
        losses = GRPOObjective(beta, scale_rewards=scale, length_normalization=per_token)(rollouts)
        advantage = 1 / (math.sqrt(2) + 1e-4) if scale else 1.0
        length = 2 if per_token else 1
        first, second = (beta * (1 - LN2) - 2 * advantage) / length, beta * (LN2 - 0.5) + advantage
        torch.testing.assert_close(losses, torch.tensor([(first + second) / 2]))
        expected = [
            [-advantage / length / 2, (-beta - advantage) / length / 2],
            [(beta / 2 + advantage) / 2, 0.0],
        ]
        torch.testing.assert_close(gradient(losses.sum(), rollouts.per_token_logps), torch.tensor([expected]))


def test_grpo_is_finite_where_rewards_are_nearly_equal() -> None:
    """The floor of the standard deviation, to the digit: the deviation itself is ``1e-4``, so the advantage halves."""
    wide = [math.sqrt(0.5) * 1e-4, -math.sqrt(0.5) * 1e-4]  # standard deviation 1e-4, mean 0
    rollouts = single_tokens([-1.0, -1.0], [-1.0, -1.0], wide)
    half = math.sqrt(0.5) / 2  # a deviation of root 1/2 over twice 1e-4
    assert gradients(GRPOObjective()(rollouts), rollouts) == pytest.approx([-half / 2, half / 2], abs=1e-5)


def test_online_dpo_by_hand() -> None:
    """The third response is best, the second worst: h = (-4 + 2) - (-2 + 3) = -3."""
    rollouts = single_tokens([-1.0, -2.0, -4.0], [-3.0, -3.0, -2.0], [2.0, 0.0, 5.0])
    losses = OnlineDPOObjective(DPOLoss(0.5))(rollouts)
    torch.testing.assert_close(losses, torch.tensor([math.log(1 + math.exp(1.5))]))
    slope = 0.5 / (1 + math.exp(-1.5))
    assert gradients(losses, rollouts) == [0.0, round(slope, 6), -round(slope, 6)]


def random_rollouts(prompts: int = 3, number: int = 4, length: int = 5, dtype: torch.dtype = torch.float32) -> Rollouts:
    """Responses of 1 to C tokens; no two rewards of a prompt are equal."""
    generator = torch.Generator().manual_seed(5)
    shape = (prompts, number, length)
    logps, ref_logps = -torch.rand(2, *shape, generator=generator, dtype=dtype) * 3
    lengths = torch.randint(1, length + 1, (prompts, number, 1), generator=generator)
    mask = torch.arange(length) < lengths
    rewards = torch.randn(prompts, number, generator=generator, dtype=dtype)
    return Rollouts((logps * mask).requires_grad_(), ref_logps * mask, mask, rewards)


LOSSES: list[Callable[[Rollouts], Tensor]] = [
    RLOOObjective(0.3),
    GRPOObjective(0.3),
    GRPOObjective(0.3, scale_rewards=False),
    GRPOObjective(0.3, length_normalization=False),
    OnlineDPOObjective(DPOLoss(0.3)),
    OnlineDPOObjective(IRPOLoss(0.3)),
    on_policy_kl,
]
EACH = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: getattr(loss, "__name__", type(loss).__name__))


@EACH
def test_a_constant_of_the_prompt_and_the_order_of_its_responses_change_nothing(
    loss: Callable[[Rollouts], Tensor],
) -> None:
    rollouts = random_rollouts(dtype=torch.float64)
    losses = loss(rollouts)
    assert losses.shape == (3,)
    slopes = gradient(losses.sum(), rollouts.per_token_logps)
    order = torch.tensor([2, 0, 3, 1])
    moved = rollouts._replace(rewards=rollouts.rewards + torch.tensor([[1.0], [-2.0], [30.0]]))
    shuffled = Rollouts(*(field[:, order] for field in rollouts))
    for same in (moved, shuffled):
        again = loss(same)
        torch.testing.assert_close(again, losses)
        torch.testing.assert_close(gradient(again.sum(), rollouts.per_token_logps), slopes)


@EACH
def test_padding_changes_nothing_and_prompts_do_not_mix(loss: Callable[[Rollouts], Tensor]) -> None:
    rollouts = random_rollouts()
    losses = loss(rollouts)
    slopes = gradient(losses.sum(), rollouts.per_token_logps)
    blank = torch.zeros(3, 4, 2)
    padded = Rollouts(
        torch.cat([rollouts.per_token_logps.detach(), blank], dim=2).requires_grad_(),
        torch.cat([rollouts.ref_per_token_logps, blank], dim=2),
        torch.cat([rollouts.mask, blank.bool()], dim=2),
        rollouts.rewards,
    )
    torch.testing.assert_close(loss(padded), losses)
    torch.testing.assert_close(gradient(loss(padded).sum(), padded.per_token_logps)[:, :, :5], slopes)
    for prompt in range(3):
        alone = Rollouts(*(field[prompt : prompt + 1] for field in rollouts))
        torch.testing.assert_close(loss(alone), losses[prompt : prompt + 1])


@EACH
def test_one_response_has_nothing_to_be_measured_against(loss: Callable[[Rollouts], Tensor]) -> None:
    with pytest.raises(AssertionError, match="measured against others"):
        loss(single_tokens([-1.0], [-1.0], [1.0]))


@pytest.mark.parametrize(
    "loss", [GRPOObjective(0.3), OnlineDPOObjective(DPOLoss(0.3)), OnlineDPOObjective(SimPOLoss())]
)
def test_gradients_where_the_value_is_a_function_of_the_policy(loss: OnPolicyObjective) -> None:
    """GRPO's penalty, which is all that is left of it where rewards are equal; the pair of online DPO."""
    rollouts = random_rollouts(prompts=2, number=3, length=3, dtype=torch.float64)
    if isinstance(loss, GRPOObjective):
        rollouts = rollouts._replace(rewards=torch.zeros(2, 3, dtype=torch.float64))
    mask = rollouts.mask.double()

    def of(per_token: Tensor) -> Tensor:
        return loss(rollouts._replace(per_token_logps=per_token * mask))

    assert torch.autograd.gradcheck(of, (rollouts.per_token_logps,))


@pytest.mark.parametrize("loss", [DPOLoss(0.5), IPOLoss("mean", 0.5), IRPOLoss(0.5, 2.0), SimPOLoss()])
def test_online_dpo_is_the_offline_loss_of_the_best_and_the_worst(loss: PreferenceLoss) -> None:
    """Four responses of 1 to 4 tokens of -1 nat each, of -2 under the reference; two best, two worst: the first."""
    mask = torch.arange(4) < torch.tensor([3, 4, 2, 1])[:, None]
    rollouts = Rollouts(-mask[None].float(), -2 * mask[None].float(), mask[None], torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    pair = pair_logps(
        torch.tensor([-4.0]), torch.tensor([-3.0]), ref=(-8.0, -6.0), num_tokens=(4, 3), alignment=(math.nan, math.nan)
    )._replace(mu_chosen_logps=torch.tensor([-4.0]), mu_rejected_logps=torch.tensor([-3.0]))
    objective = OnlineDPOObjective(loss)
    expected = PairLogps(*(field.float() for field in pair))
    actual = PairLogps(*(field.float() for field in objective.pairs(rollouts)))
    torch.testing.assert_close(actual, expected, equal_nan=True)
    torch.testing.assert_close(objective(rollouts), loss(pair) + loss.auxiliary(pair))


def test_the_pairs_mu_is_the_policy_without_gradient() -> None:
    pairs = OnlineDPOObjective(DPOLoss(0.5)).pairs(random_rollouts())
    assert pairs.chosen_logps.requires_grad
    assert not any(field.requires_grad for field in pairs[2:])
    assert not any(ratios.any() for ratios in pairs.importance_logratios)


def test_equal_rewards_are_no_preference() -> None:
    """Not even the likelihood of a response that nothing chose; the other prompt is as it was."""
    rollouts = random_rollouts(prompts=2)
    objective = OnlineDPOObjective(IRPOLoss(0.5))
    equal = rollouts._replace(rewards=torch.stack([torch.full((4,), 0.1), rollouts.rewards[1]]))
    losses = objective(equal)
    assert losses[0] == 0
    torch.testing.assert_close(losses[1], objective(rollouts)[1])
    slopes = gradient(losses.sum(), rollouts.per_token_logps)
    assert not slopes[0].any()
    assert slopes[1].any()


def test_equal_rewards_leave_the_penalty_alone() -> None:
    """Whatever the rewards are: RLOO is then beta times the KL's gradient."""
    rollouts = random_rollouts(dtype=torch.float64)
    equal = rollouts._replace(rewards=torch.full((3, 4), 7.0, dtype=torch.float64))
    slopes = gradient(RLOOObjective(0.3)(equal).sum(), rollouts.per_token_logps)
    torch.testing.assert_close(slopes, 0.3 * gradient(on_policy_kl(rollouts).sum(), rollouts.per_token_logps))
    at_reference = equal._replace(ref_per_token_logps=rollouts.per_token_logps.detach())
    for objective in (RLOOObjective(0.3), GRPOObjective(0.3)):
        assert not gradient(objective(at_reference).sum(), rollouts.per_token_logps).any()


def test_the_defaults_are_those_that_are_documented() -> None:
    assert vars(RLOOObjective()) == {"beta": 0.05}
    assert vars(GRPOObjective()) == {"beta": 0.04, "scale_rewards": True, "length_normalization": True}
    loss = IPOLoss("sum", 0.3)
    assert vars(OnlineDPOObjective(loss)) == {"beta": 0.3, "loss": loss}


def test_what_held_out_pairs_are_measured_by() -> None:
    for objective in (RLOOObjective(0.3), GRPOObjective(0.3)):
        assert type(objective.implied()) is DPOLoss
        assert objective.implied().beta == 0.3
    loss = IPOLoss("sum", 0.3)
    assert OnlineDPOObjective(loss).implied() is loss


@pytest.mark.parametrize("objective", [RLOOObjective, GRPOObjective])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_beta_out_of_range_is_refused(objective: Callable[[float], OnPolicyObjective], beta: float) -> None:
    with pytest.raises(InputError, match=rf"^model\.objective\.beta must be a finite number above 0, not {beta}\.$"):
        objective(beta)


def test_metrics_against_numpy() -> None:
    """Five prompts in updates of three and two, the last of each not counted; the second prompt's rewards are equal."""
    rollouts = random_rollouts(prompts=5)
    rewards = rollouts.rewards.clone()
    rewards[1] = 0.5
    rollouts = rollouts._replace(rewards=rewards)
    losses = RLOOObjective()(rollouts)
    finished = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    metrics = RowMetrics()
    for part, num_counted in ((slice(0, 3), 2), (slice(3, 5), 1)):
        of_part = Rollouts(*(field[part] for field in rollouts))
        metrics.update(rollout_columns(losses[part], of_part, finished[part]), num_counted)
    kept = [0, 1, 3]
    logps, ref_logps = (
        field.detach().double().numpy()[kept].sum(axis=2)
        for field in (rollouts.per_token_logps, rollouts.ref_per_token_logps)
    )
    of_kept = rewards.double().numpy()[kept]
    expected = {
        "loss": losses.detach().double().numpy()[kept].mean(),
        "reward/mean": of_kept.mean(),
        "reward/std": np.std(of_kept, axis=1, ddof=1).mean(),
        "reward/equal_fraction": 1 / 3,
        "kl/k1": (logps - ref_logps).mean(),
        "entropy": -logps.mean(),
        "response_length": rollouts.mask.numpy()[kept].sum(axis=2).mean(),
        "finished_fraction": finished.numpy()[kept].mean(),
    }
    values = metrics.compute()
    assert {key: value.item() for key, value in values.items()} == pytest.approx(expected, rel=1e-5)
    assert list(values) == list(expected)


def test_metrics_are_kept_in_float64_without_gradient_and_added_up_over_ranks() -> None:
    """2^24 + 1 is no fp32 number."""
    rank, other = RowMetrics(), RowMetrics()
    rollouts = random_rollouts(prompts=2)
    finished = torch.ones(2, 4).bool()
    for metrics in (rank, other):
        metrics.update(rollout_columns(torch.tensor([2.0**24, 1.0], requires_grad=True), rollouts, finished), 2)
        metrics.update(rollout_columns(torch.tensor([1.0, 1.0]), rollouts, finished), 2)
    other.merge_state(rank)
    assert other.totals()["loss"] == (2**25 + 6, 8)
    assert not other.sums.requires_grad
    assert {value.dtype for value in other.compute().values()} == {torch.float32}
    before = rank.compute()
    rank.update(rollout_columns(torch.tensor([math.nan, math.nan]), rollouts, finished), 0)
    assert rank.compute() == before


def test_equal_means_equal_to_the_last_digit() -> None:
    """A standard deviation of equal numbers need not be 0; two of three equal ones are no equal group."""
    metrics = RowMetrics()
    rollouts = random_rollouts(prompts=3, number=3)
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [0.1, 0.2, 0.1]])
    rollouts = rollouts._replace(rewards=rewards)
    metrics.update(rollout_columns(torch.zeros(3), rollouts, torch.ones(3, 3).bool()), 3)
    assert metrics.compute()["reward/equal_fraction"].item() == pytest.approx(1 / 3)
