"""The KL estimators and their standard errors on policies whose KL is an exact sum over all responses.

A population of 200 prompts, to each of which a policy and a reference answer as random trees over two words and an end,
cut at three tokens. Each replication draws 30 prompts and 4 responses to each, as an evaluation does.
"""

import pytest
import torch
from torch import Tensor

from lit_isdpo.evaluation.statistics import ESTIMATORS, bootstrap_interval
from lit_isdpo.lab.designs import ResponseTree
from lit_isdpo.lab.exact import ResponseDistribution
from lit_isdpo.objective.metrics import kl_values, token_kl

TREE = ResponseTree(num_words=2, max_words=2)
END = TREE.num_words
REPLICATIONS, PROMPTS, RESPONSES = 400, 30, 4


def population() -> tuple[Tensor, Tensor]:
    """Log-probs ``(200, N, 3)`` of policy and reference; how far they are apart differs between prompts."""
    generator = torch.Generator().manual_seed(0)
    reference, change = torch.randn(2, 200, len(TREE), 3, generator=generator, dtype=torch.float64)
    distance = torch.rand(200, 1, 1, generator=generator, dtype=torch.float64)
    return (reference + distance * change).log_softmax(dim=2), reference.log_softmax(dim=2)


def exact_kl(policy: Tensor, reference: Tensor) -> float:
    """Mean over the population, as the sum over all responses of ``pi log(pi / ref)``: no chain rule."""
    pi, ref = (ResponseDistribution(TREE, logps) for logps in (policy, reference))
    finished = (pi.logps.exp() * (pi.logps - ref.logps)).sum(dim=1)
    # A response that is cut after three tokens is one of K outcomes behind a deepest node.
    deepest = TREE.level(TREE.max_words)
    cut, ref_cut = (d.prefix_logps[:, deepest, None] + d.next_logps[:, deepest, :END] for d in (pi, ref))
    return float((finished + (cut.exp() * (cut - ref_cut)).sum(dim=(1, 2))).mean())


def replications(policy: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Each estimator's values, ``(REPLICATIONS, PROMPTS, RESPONSES)``."""
    generator = torch.Generator().manual_seed(1)
    shape = (REPLICATIONS, PROMPTS, RESPONSES)
    prompts = torch.randint(200, shape[:2], generator=generator)[..., None].expand(shape).flatten()
    nodes = torch.zeros_like(prompts)
    going_on = torch.ones_like(prompts, dtype=torch.bool)
    logratios = torch.zeros(len(prompts), dtype=torch.float64)
    masks, kls = [], []
    for length in range(TREE.max_words + 1):
        logps, ref_logps = policy[prompts, nodes], reference[prompts, nodes]
        tokens = torch.multinomial(logps.exp(), 1, generator=generator)
        own = (logps - ref_logps).gather(1, tokens)[:, 0]
        logratios += own.where(going_on, torch.zeros_like(own))
        masks.append(going_on)
        kls.append(token_kl(logps, ref_logps))
        going_on = going_on & (tokens[:, 0] != END)
        if length < TREE.max_words:
            nodes = torch.where(going_on, TREE.num_words * nodes + 1 + tokens[:, 0], nodes)
    mask = torch.stack(masks, dim=1)
    values = kl_values(logratios, torch.stack(kls, dim=1)[mask], mask)
    return {name: column.view(shape) for name, column in zip(ESTIMATORS, values, strict=True)}


def test_estimators_are_unbiased_and_their_standard_errors_are_right() -> None:
    """Of 400 replications: the mean, and the spread of what a replication is off in its own standard errors."""
    policy, reference = population()
    exact = exact_kl(policy, reference)
    assert exact == pytest.approx(
        float(ResponseDistribution(TREE, policy).kl(ResponseDistribution(TREE, reference)).mean()), rel=1e-12
    )
    stderrs = {}
    for name, values in replications(policy, reference).items():
        found = [bootstrap_interval(sample, num_resamples=2) for sample in values]
        means, errors = (torch.tensor([getattr(each, part) for each in found]) for part in ("mean", "stderr"))
        bias_in_errors = (means.mean() - exact) / (means.std() / REPLICATIONS**0.5)
        assert abs(bias_in_errors) < 4, name
        z_scores = (means - exact) / errors
        # Student's t of 29 degrees of freedom has variance 1.07; that of a sample of 400 is known to 0.08. The rare
        # responses that carry k3's mean are missing from most samples, which then are low and seem sure of it.
        expected = {"rao_blackwell": (0.8, 1.4), "k1": (0.8, 1.4), "k3": (1.6, 4.0)}[name]
        assert expected[0] < z_scores.var().item() < expected[1], name
        stderrs[name] = errors.mean().item()
        # What an interval over responses would say: too little, as those to one prompt go together.
        as_if_independent = values.flatten(1).std(dim=1) / (PROMPTS * RESPONSES) ** 0.5
        if name == "rao_blackwell":
            assert ((means - exact) / as_if_independent).var() > 1.6
    assert stderrs["rao_blackwell"] < min(stderrs["k1"], stderrs["k3"])
