"""Enumeration against scoring each response on its own, and against what the probe samples."""

import math

import pytest
import torch

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.evaluation.statistics import sampled_kl
from lit_isdpo.lab.designs import Design, ResponseTree
from lit_isdpo.lab.exact import ResponseDistribution, enumerate_responses
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference
from tests.lab.conftest import toy_model

END = 3
TREE = ResponseTree(num_words=3, max_words=4)  # rows of a stem of one word and a crown of three levels
PROMPTS = [[0, 1], [2], [1, 1, 0]]


@pytest.fixture(scope="module")
def model(toy: Design) -> LogProbModel:
    return toy_model(toy, seed=1)


@pytest.fixture(scope="module")
def policy(model: LogProbModel) -> ResponseDistribution:
    return enumerate_responses(model, PROMPTS, TREE)


@pytest.fixture(scope="module")
def reference(toy: Design) -> ResponseDistribution:
    return enumerate_responses(toy_model(toy, seed=2), PROMPTS, TREE)


def responses(tree: ResponseTree) -> list[list[int]]:
    return [[word for word in row if word >= 0] for row in tree.words.tolist()]


def test_nodes_are_numbered_level_by_level() -> None:
    tree = ResponseTree(num_words=6, max_words=6)
    assert len(tree) == 1 + 6 + 36 + 216 + 1296 + 7776 + 46_656
    assert tree.level(0) == slice(0, 1)
    assert tree.level(6) == slice(9331, 55_987)
    assert tree.words[tree.find([5, 0, 3])].tolist() == [5, 0, 3, -1, -1, -1]
    small = ResponseTree(num_words=3, max_words=3)
    assert [small.find(words) for words in responses(small)] == list(range(40))
    assert small.lengths.tolist() == [0, *[1] * 3, *[2] * 9, *[3] * 27]


def test_every_response_has_the_log_prob_that_it_has_alone(model: LogProbModel, policy: ResponseDistribution) -> None:
    every = responses(TREE)
    for number, prompt in enumerate(PROMPTS):
        batch = collate_completions([prompt] * len(every), [[*words, END] for words in every], pad_token_id=END)
        torch.testing.assert_close(policy.logps[number].float(), model(batch).logps, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("num_words", "max_words"), [(3, 1), (3, 2), (3, 6)])
def test_rows_without_a_stem_and_with_a_long_one(model: LogProbModel, num_words: int, max_words: int) -> None:
    tree = ResponseTree(num_words, max_words)
    found = enumerate_responses(model, [[0, 1]], tree)
    some = responses(tree)[:: 1 if len(tree) < 50 else 29]
    batch = collate_completions([[0, 1]] * len(some), [[*words, END] for words in some], pad_token_id=END)
    nodes = [tree.find(words) for words in some]
    torch.testing.assert_close(found.logps[0, nodes].float(), model(batch).logps, atol=2e-5, rtol=0)


def test_eager_attention_and_bfloat16_see_the_same_tree(
    model: LogProbModel, toy: Design, policy: ResponseDistribution
) -> None:
    eager = toy_model(toy, seed=1)
    eager.model.set_attn_implementation("eager")
    found = enumerate_responses(eager, PROMPTS, TREE)
    torch.testing.assert_close(found.next_logps, policy.next_logps, atol=1e-5, rtol=0)
    half = enumerate_responses(LogProbModel(model.model, compute_dtype=torch.bfloat16), PROMPTS, TREE)
    assert 0 < (half.next_logps - policy.next_logps).abs().max() < 0.1


def test_probabilities_sum_to_one(policy: ResponseDistribution) -> None:
    torch.testing.assert_close(policy.logps.exp().sum(dim=1) + policy.unfinished, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(policy.next_logps.exp().sum(dim=2), torch.ones(3, 121, dtype=torch.float64))


def test_kl_is_that_of_the_stopped_responses(policy: ResponseDistribution, reference: ResponseDistribution) -> None:
    """Finished ones, and those of five words without an end, each with its own log-ratio."""

    def stopped(distribution: ResponseDistribution) -> torch.Tensor:
        deepest = TREE.level(4)
        unfinished = distribution.prefix_logps[:, deepest, None] + distribution.next_logps[:, deepest, :3]
        return torch.cat([distribution.logps, unfinished.flatten(1)], dim=1)

    logps, ref_logps = stopped(policy), stopped(reference)
    torch.testing.assert_close(policy.kl(reference), (logps.exp() * (logps - ref_logps)).sum(dim=1))
    assert policy.kl(policy).tolist() == [0, 0, 0]
    assert policy.kl(reference).min() > 0.2


def test_the_sampled_estimators_estimate_the_exact_values(
    model: LogProbModel, toy: Design, policy: ResponseDistribution, reference: ResponseDistribution
) -> None:
    """Rao-Blackwell, k1 and k3, the reward and the share without an end: within four standard errors."""
    number, prompts = 3000, PROMPTS[:1] * 3000
    kept = ResidentReference(toy_model(toy, seed=2))
    sampling = Sampling(num_responses=number, max_new_tokens=5, batch_size=number)
    (drawn,) = sample(model, PROMPTS[:1], sampling, Vocabulary(str, [END], END))
    kl = sampled_kl(model, kept, prompts, drawn, pad_token_id=END, batch_size=number)
    texts = ["x" * sum(token != END for token in response.token_ids) for response in drawn]
    rewards = [len(text) if response.finished else -10.0 for text, response in zip(texts, drawn, strict=True)]
    exact = [policy.kl(reference)[0]] * 3 + [
        policy.expectation(TREE.lengths, longer=-10)[0],
        1 - policy.unfinished[0],
        policy.expectation(TREE.lengths + 1, longer=5)[0],
    ]
    finished = torch.tensor([float(response.finished) for response in drawn])
    num_tokens = torch.tensor([float(len(response.token_ids)) for response in drawn])
    columns = [*kl.unbind(dim=1), torch.tensor(rewards), finished, num_tokens]
    for values, value in zip(columns, exact, strict=True):
        assert values.mean().item() == pytest.approx(value.item(), abs=4 * values.std().item() / math.sqrt(number))
    errors = kl.std(dim=0)
    assert errors[0] < errors[1], "Rao-Blackwell is the least noisy one"
