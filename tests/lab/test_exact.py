"""The moments of the importance weights in closed form, by hand and by drawing pairs."""

import math
from dataclasses import replace

import pytest
import torch

from lit_isdpo.lab.designs import Design
from lit_isdpo.lab.exact import (
    ExactEvaluation,
    behavior_logps,
    effective_sample_size,
    enumerate_responses,
    expected_weight,
    pair_logps,
    shipped_reference,
    win_rate,
)
from tests.lab.conftest import toy_model


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


REF, MU, PI = logs(0.4, 0.4, 0.2), logs(0.5, 0.5, 0), logs(0.2, 0.1, 0.7)  # the support is the first two


def test_expected_weight_by_hand() -> None:
    """Against mu pi(S)^2 = .3^2; against the reference (.5 * .2 / .4 + .5 * .1 / .4)^2 = (.3 / .8)^2."""
    assert expected_weight(PI, MU, MU).item() == pytest.approx(0.09)
    assert expected_weight(PI, MU, REF).item() == pytest.approx(0.140625)
    assert expected_weight(REF, MU, REF).item() == pytest.approx(1)
    assert expected_weight(REF, MU, MU).item() == pytest.approx(0.64)
    assert expected_weight(MU, MU, MU).item() == pytest.approx(1)


def test_effective_sample_size_by_hand() -> None:
    """E[w] = .3^2 and E[w^2] = (.2^2 / .5 + .1^2 / .5)^2 = .1^2, so .0081 / .01; 1 where all weights are equal."""
    assert effective_sample_size(PI, MU).item() == pytest.approx(0.81)
    assert effective_sample_size(REF, MU).item() == pytest.approx(1)


def test_win_rate_by_hand() -> None:
    """Values 2, 1, 2: the policy's first and third beat .3 and tie .7, its second ties .3 and loses."""
    policy, reference = torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[0.6, 0.3, 0.1]])
    wins = win_rate(policy, reference, torch.tensor([[2.0, 1.0, 2.0]]))
    assert wins.item() == pytest.approx(0.8 * (0.3 + 0.7 / 2) + 0.2 * 0.3 / 2)
    assert win_rate(policy, policy, torch.tensor([[2.0, 1.0, 2.0]])).item() == pytest.approx(0.5)


def test_moments_are_those_of_drawn_pairs(toy: Design) -> None:
    reference = enumerate_responses(toy_model(toy, seed=0), toy.prompts[:1], toy.tree)
    policy = enumerate_responses(toy_model(toy, seed=3), toy.prompts[:1], toy.tree)
    mu_logps = pair_logps(toy, "pairs", reference)
    torch.manual_seed(0)
    drawn = torch.multinomial(mu_logps[0].exp(), 200_000, replacement=True).view(2, -1)
    for denominator in (mu_logps, reference.logps, behavior_logps(toy, "pairs_wrong_mu", mu_logps)):
        weights = (policy.logps - denominator)[0, drawn].sum(dim=0).exp()
        error = weights.std().item() / math.sqrt(weights.numel())
        assert expected_weight(policy.logps, mu_logps, denominator).item() == pytest.approx(
            weights.mean().item(), abs=4 * error
        )
    weights = (policy.logps - mu_logps)[0, drawn].sum(dim=0).exp()
    assert effective_sample_size(policy.logps, mu_logps).item() == pytest.approx(
        (weights.mean() ** 2 / (weights**2).mean()).item(), rel=0.03
    )


def test_values_of_the_reference_and_of_another_policy(toy: Design) -> None:
    exact = ExactEvaluation(toy, "pairs")
    reference, policy = exact.enumerate(toy_model(toy, seed=0)), exact.enumerate(toy_model(toy, seed=3))
    at_reference, values = exact(reference, reference), exact(policy, reference)
    assert at_reference["kl"] == 0
    assert at_reference["expected_weight"] == pytest.approx(1)
    assert values["ess"] < at_reference["ess"] < 1  # two prompts with different probabilities of the support
    assert values["kl"] > 0.2
    assert at_reference["win_rate"] == pytest.approx(0.5)
    gold = torch.cat([toy.gold, toy.longer_gold], dim=1)
    outcomes = policy.outcomes[:, :, None] * reference.outcomes[:, None, :]
    difference = gold[:, :, None] - gold[:, None, :]
    by_pairs = (outcomes * ((difference > 0).double() + (difference == 0).double() / 2)).sum(dim=(1, 2))
    assert values["win_rate"] == pytest.approx(by_pairs.mean().item())
    short = (toy.tree.lengths == 1) | (toy.tree.lengths == 2)
    assert values["support_mass"] == pytest.approx(policy.logps.exp()[:, short].sum().item() / 2)
    # The toy's gold is the number of words and half a point for each "b"; words longer than the tree count -4.
    by_hand = sum(
        math.exp(logp) * (len(words) + 0.5 * words.count(1))
        for logps in policy.logps.tolist()
        for logp, words in zip(logps, ([w for w in row if w >= 0] for row in toy.tree.words.tolist()), strict=True)
    )
    assert values["gold_reward"] == pytest.approx(by_hand / 2 - 4 * policy.unfinished.mean().item())
    assert values["finished_fraction"] == pytest.approx(1 - policy.unfinished.mean().item())
    beginnings = policy.longer * torch.arange(27)  # a gold of its own for each beginning of three words
    toy = replace(toy, longer_gold=torch.arange(27, dtype=torch.float64).expand(2, -1))
    by_beginning = ExactEvaluation(toy, None)(policy, None)["gold_reward"]
    assert by_beginning == pytest.approx((by_hand + beginnings.sum().item()) / 2)
    demonstrations = ExactEvaluation(toy, None)(policy, None)
    assert demonstrations.keys() == {"gold_reward", "feature", "response_length", "finished_fraction"}


def test_the_shipped_reference_is_summed_once(toy: Design) -> None:
    exact = ExactEvaluation(toy, "pairs")
    same, other = toy_model(toy, seed=0), toy_model(toy, seed=3)
    assert exact.enumerate(same) is shipped_reference(toy)
    assert torch.equal(enumerate_responses(same, toy.prompts, toy.tree).next_logps, shipped_reference(toy).next_logps)
    assert exact.enumerate(other) is not shipped_reference(toy)
    with torch.no_grad():
        next(same.model.parameters()).view(-1)[0] += 1e-3  # one number of one tensor
    assert exact.enumerate(same) is not shipped_reference(toy)


def test_it_applies_to_the_designs_own_prompts_and_vocabulary(toy: Design) -> None:
    exact, model = ExactEvaluation(toy, "pairs"), toy_model(toy, seed=0)
    assert exact.applies_to(model, [[2, 2], [0, 1]])
    assert not exact.applies_to(model, [[2, 2], [1]])


def test_padding_of_a_vocabulary_is_left_out(toy: Design) -> None:
    """A model with three more rows, which say much; as it is sampled, so it is summed."""
    exact, model, padded = ExactEvaluation(toy, "pairs"), toy_model(toy, seed=3), toy_model(toy, seed=3)
    padded.model.resize_token_embeddings(7)
    with torch.no_grad():
        padded.model.get_input_embeddings().weight[4:] = torch.randn(3, 64)
    assert not exact.applies_to(padded, toy.prompts)
    padded.num_tokens = 4
    assert exact.applies_to(padded, toy.prompts)
    found, expected = exact.enumerate(padded), exact.enumerate(model)
    torch.testing.assert_close(found.next_logps, expected.next_logps, atol=1e-6, rtol=0)
