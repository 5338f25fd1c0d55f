"""Rows drawn from known distributions: where they lie, what they say of themselves, and how they are labelled."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_pair
from lit_isdpo.lab import designs
from lit_isdpo.lab.designs import Design, PairsPart
from lit_isdpo.lab.environments import Enumerable
from lit_isdpo.lab.exact import ResponseDistribution, enumerate_responses, pair_logps, shipped_reference
from lit_isdpo.lab.labelling import PairRow
from lit_isdpo.lab.posts import Split
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import PreferenceExample


def uniform(design: Design) -> ResponseDistribution:
    """A reference that says nothing, and costs nothing to enumerate."""
    tokens = design.tree.num_words + 1
    next_logps = torch.full((len(design.prompts), len(design.tree), tokens), -math.log(tokens), dtype=torch.float64)
    return ResponseDistribution(design.tree, next_logps)


def draw_pairs(
    design: Design,
    part: str,
    *,
    split: Split,
    num_pairs: int,
    seed: int,
    reference: ResponseDistribution | None = None,
) -> tuple[list[PairRow], dict[str, int]]:
    environment = Enumerable(lambda: design)
    environment.num_pairs = {split: num_pairs}
    return environment.sample_pairs(part, split, seed, reference=reference)


def node_of(design: Design, text: str) -> int:
    words = design.read(text)
    assert words is not None
    return design.tree.find(words)


def test_pairs_are_a_function_of_seed_split_and_part(toy: Design) -> None:
    def draw(split: Split = "train", seed: int = 0, part: str = "pairs") -> list[PairRow]:
        return draw_pairs(toy, part, split=split, num_pairs=20, seed=seed)[0]

    assert draw() == draw()
    assert draw() != draw(seed=1)
    assert draw() != draw(split="test")
    assert draw() != draw(part="pairs_wrong_mu")


def test_pairs_lie_in_the_support_and_know_the_policy_that_wrote_them(toy: Design) -> None:
    rows, counts = draw_pairs(toy, "pairs", split="train", num_pairs=4000, seed=0)
    mu_logps = pair_logps(toy, "pairs", shipped_reference(toy))
    assert mu_logps.exp().sum(dim=1).tolist() == pytest.approx([1, 1])
    assert counts["pairs"] == len(rows) == 4000
    drawn = Counter[tuple[int, int]]()
    for row in rows:
        prompt = toy.prompts.index(tuple(toy.read(row["prompt"]) or ()))
        assert row["chosen"] != row["rejected"]
        for side in ("chosen", "rejected"):
            node = node_of(toy, row[side])
            drawn[prompt, node] += 1
            assert toy.parts["pairs"].support[node]
            assert row[f"{side}_behavior_logps"] == mu_logps[prompt, node]
            assert row[f"{side}_gold"] == toy.gold[prompt, node]
    # Of 12 responses those drawn twice for a pair are drawn anew: P(y) goes as mu(y) (1 - mu(y)).
    for prompt in (0, 1):
        mu = mu_logps[prompt].exp()
        expected = mu * (1 - mu) / (mu * (1 - mu)).sum()
        for node in range(40):
            share, error = expected[node].item(), math.sqrt(expected[node].item() / 4000)
            assert drawn[prompt, node] / 4000 == pytest.approx(share, abs=4 * error)
        assert counts["identical"] / 4000 == pytest.approx(
            ((mu_logps.exp() ** 2).sum(dim=1) / (1 - (mu_logps.exp() ** 2).sum(dim=1))).mean().item(), abs=0.03
        )


def test_wrong_mu_is_that_of_words_drawn_uniformly(toy: Design) -> None:
    rows, _ = draw_pairs(toy, "pairs_wrong_mu", split="train", num_pairs=10, seed=0)
    assert [row["chosen_behavior_logps"] for row in rows] == pytest.approx([-3 * math.log(3)] * 10)
    assert all(len(row["chosen"].split()) == len(row["rejected"].split()) == 3 for row in rows)


def test_a_wrong_mu_is_said_of_the_same_pairs() -> None:
    design = designs.verbosity()

    def draw(part: str) -> list[PairRow]:
        rows, _ = draw_pairs(design, part, split="test", num_pairs=16, seed=0, reference=uniform(design))
        return rows

    for right, wrong in zip(draw("pairs"), draw("pairs_wrong_mu"), strict=True):
        assert wrong["chosen_behavior_logps"] == wrong["rejected_behavior_logps"] == pytest.approx(-6 * math.log(6))
        assert {**wrong, "chosen_behavior_logps": 0, "rejected_behavior_logps": 0} == {
            **right,
            "chosen_behavior_logps": 0,
            "rejected_behavior_logps": 0,
        }


def test_a_temperature_sharpens_the_writer_of_the_pairs(toy: Design) -> None:
    """At temperature 1/2 two responses of the support have twice the reference's difference of log-probs."""
    support = toy.parts["pairs"].support
    sharp = replace(toy, parts={"sharp": PairsPart(support, temperature=0.5)})
    reference = shipped_reference(toy)
    ours, theirs = pair_logps(sharp, "sharp", reference)[:, support], reference.logps[:, support]
    assert ours.exp().sum(dim=1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(ours.diff(dim=1), 2 * theirs.diff(dim=1))
    rows, _ = draw_pairs(sharp, "sharp", split="train", num_pairs=10, seed=0)
    said = pair_logps(sharp, "sharp", reference)
    for row in rows:
        prompt = toy.prompts.index(tuple(toy.read(row["prompt"]) or ()))
        assert row["chosen_behavior_logps"] == said[prompt, node_of(toy, row["chosen"])]


def test_labels_are_bradley_terrys_with_a_tenth_turned_round() -> None:
    """Pairs in which the better response wins: sigmoid(gap), then 0.9 of that and 0.1 of the rest."""
    design = designs.length()
    rows, _ = draw_pairs(design, "pairs", split="train", num_pairs=8000, seed=0, reference=uniform(design))
    gaps = [row["chosen_gold"] - row["rejected_gold"] for row in rows]
    wins = sum(gap > 0 for gap in gaps)
    likely = [1 / (1 + math.exp(-abs(gap))) for gap in gaps]
    expected = [0.9 * p + 0.1 * (1 - p) for p in likely]
    error = math.sqrt(sum(p * (1 - p) for p in expected))
    assert wins == pytest.approx(sum(expected), abs=4 * error)
    assert abs(wins - sum(likely)) > 4 * error, "without the turned ones there would be more"
    sure = [gap for gap in gaps if abs(gap) > 5]  # here Bradley-Terry hardly ever errs
    assert sum(gap < 0 for gap in sure) / len(sure) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / len(sure)))


def test_every_row_of_the_shipped_designs_is_in_its_support() -> None:
    for design in (designs.verbosity(), designs.length()):
        for name, part in design.parts.items():
            rows, _ = draw_pairs(design, name, split="test", num_pairs=64, seed=0, reference=uniform(design))
            assert Counter(row["prompt"] for row in rows) == {design.render(prompt): 8 for prompt in design.prompts}
            nodes = [node_of(design, text) for row in rows for text in (row["chosen"], row["rejected"])]
            assert part.support[nodes].all()


def test_demonstrations_are_drawn_from_the_target() -> None:
    environment = Enumerable(designs.length)
    environment.num_demonstrations = {"train": 4000}
    rows = list(environment.sample_demonstrations("train", 0))
    assert rows == list(environment.sample_demonstrations("train", 0))
    lengths = Counter(len(row["completion"].split()) for row in rows)
    for words in range(1, 9):
        share = math.comb(7, words - 1) * 0.35 ** (words - 1) * 0.65 ** (8 - words)
        assert lengths[words] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share / 4000))


def test_pairs_of_uneven_length_are_scored_as_enumerated() -> None:
    """Text, end token, padding and collation as in training, against the tree; the end token fills rows up, too."""
    design, environment = designs.length(), Enumerable(designs.length)
    model, tokenizer = (
        LogProbModel(load_causal_lm(PolicyConfig(path=str(design.reference)))),
        environment.build_tokenizer(),
    )
    exact = enumerate_responses(model, design.prompts[:1], design.tree)
    texts = [design.render(words) for words in ([1], [3, 0, 2, 2, 1, 0, 3, 3], [2, 2, 2], [0, 1], [3] * 5, [1, 0] * 3)]
    pairs = [
        tokenize_pair(
            PreferenceExample(design.render(design.prompts[0]), *two),
            TextEncoder(tokenizer),
            Limits(64, 32),
        )
        for two in zip(texts[:3], texts[3:], strict=True)
    ]
    batch = collate_pairs(pairs, [0, 1, 2], pad_token_id=tokenizer.eos_token_id)
    scored = model(batch.tokens)
    assert scored.num_tokens.tolist() == [2, 9, 4, 3, 6, 7]
    nodes = [node_of(design, text) for text in texts]
    torch.testing.assert_close(scored.logps, exact.logps[0, nodes].float(), atol=1e-4, rtol=0)
