"""Demonstrations and pairs of a design, drawn from distributions that are known exactly instead of generated."""

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from random import Random

from torch import Tensor

from lit_isdpo.lab.designs import FLIPPED, Design
from lit_isdpo.lab.enumeration import ResponseDistribution, enumerate_responses
from lit_isdpo.lab.pairs import PairRow
from lit_isdpo.lab.posts import Split, first_wins
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel


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


def sample_pairs(
    design: Design, part: str, *, split: Split, num_pairs: int, seed: int, reference: ResponseDistribution | None = None
) -> tuple[list[PairRow], dict[str, int]]:
    """Draws pairs, an eighth for each prompt.

    Args:
        design: the task.
        part: the name of the pairs.
        split: other pairs of the same prompts.
        num_pairs: rows that are wanted.
        seed: the rows are a function of it, given the reference and the machine's arithmetic.
        reference: what wrote them; by default the shipped one.

    Returns:
        The rows, and the counts ``pairs`` and ``identical``, draws of two equal responses, which are repeated.
    """
    drawn_as = part if design.parts[part].true_mu else "pairs"  # with a wrong mu they are the very same pairs
    rng = Random(f"{design.name}/{drawn_as}/{split}/{seed}")
    mu_logps = pair_logps(design, part, reference or shipped_reference(design))
    behavior = behavior_logps(design, part, mu_logps)
    cumulative = [list(accumulate(row)) for row in mu_logps.exp().tolist()]
    counts = Counter(pairs=num_pairs, identical=0)
    rows = []
    for number in range(num_pairs):
        prompt = number % len(design.prompts)
        while True:
            pair = rng.choices(range(len(design.tree)), cum_weights=cumulative[prompt], k=2)
            if pair[0] != pair[1]:
                break
            counts["identical"] += 1
        golds = [float(design.gold[prompt, node]) for node in pair]
        labelled = first_wins(rng, *golds, temperature=1.0)
        flipped = rng.random() < FLIPPED
        chosen, rejected = (0, 1) if labelled != flipped else (1, 0)
        rows.append(
            PairRow(
                prompt=design.render(design.prompts[prompt]),
                chosen=_text(design, pair[chosen]),
                rejected=_text(design, pair[rejected]),
                chosen_behavior_logps=float(behavior[prompt, pair[chosen]]),
                rejected_behavior_logps=float(behavior[prompt, pair[rejected]]),
                chosen_gold=golds[chosen],
                rejected_gold=golds[rejected],
            )
        )
    return rows, dict(counts)


def sample_demonstrations(design: Design, *, split: Split, num: int, seed: int) -> Iterator[dict[str, str]]:
    """Draws demonstrations from the design's target, an eighth for each prompt."""
    rng = Random(f"{design.name}/sft/{split}/{seed}")
    cumulative = [list(accumulate(row)) for row in design.target.tolist()]
    for number in range(num):
        prompt = number % len(design.prompts)
        (node,) = rng.choices(range(len(design.tree)), cum_weights=cumulative[prompt])
        yield {"prompt": design.render(design.prompts[prompt]), "completion": _text(design, node)}


def _text(design: Design, node: int) -> str:
    words = design.tree.words[node]
    return design.render(words[: int(design.tree.lengths[node])].tolist())
