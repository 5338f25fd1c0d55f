"""The two designs as their text states them."""

import math

import pytest
import torch

from lit_isdpo.lab.designs import Design, _correlated, length, verbosity
from lit_isdpo.lab.environments import Enumerable
from lit_isdpo.types import InputError

BOTH = pytest.mark.parametrize("build", [verbosity, length])


@BOTH
def test_a_design_has_eight_prompts_and_is_the_same_every_time(build: object) -> None:
    assert callable(build)
    design = build()
    assert len(set(design.prompts)) == 8
    assert torch.equal(build.__wrapped__().gold, design.gold)  # type: ignore[attr-defined]
    assert design.target.sum(dim=1).tolist() == pytest.approx([1] * 8)
    assert not design.target[:, design.feature < 0].any()
    assert not any((part.support & (design.feature < 0)).any() for part in design.parts.values())


def test_verbosity_is_paid_until_two_and_punished_from_four() -> None:
    """What is left of the gold reward after g(c) has mean 0 and deviation 0.7 over a prompt's responses."""
    design = verbosity()
    whole = design.tree.level(6)
    count = (design.tree.words[whole] == 0).sum(dim=1)
    assert torch.equal(design.feature[whole], count)
    g = torch.tensor([0, 0.8, 1.4, 0.8, -1, -3, -5], dtype=torch.float64)
    rest = design.gold[:, whole] - g[count]
    assert rest.mean(dim=1).tolist() == pytest.approx([0] * 8, abs=1e-9)
    assert rest.std(dim=1, correction=0).tolist() == pytest.approx([0.7] * 8)
    assert design.gold[:, : whole.start].unique().tolist() == [-5]


def test_verbosity_is_a_sum_over_words_and_two_words_in_a_row() -> None:
    """Six words w0 ... w5 against a b a b a b: a change in the middle touches one word and two pairs of neighbours."""
    design = verbosity()

    def rest(words: list[int]) -> torch.Tensor:
        return design.gold[:, design.tree.find(words)]

    # The effect of the last word, given the one before it, is the same whatever the first four are.
    for start in ([1, 2, 3, 4], [5, 5, 1, 2]):
        assert (rest([*start, 1, 2]) - rest([*start, 1, 3])).tolist() == pytest.approx(
            (rest([4, 4, 4, 4, 1, 2]) - rest([4, 4, 4, 4, 1, 3])).tolist()
        )
    assert (rest([1, 2, 3, 4, 5, 1]) - rest([1, 2, 3, 4, 5, 2])).std() > 0.01, "it depends on the prompt"


def test_verbosity_demonstrations_have_binomially_many_very() -> None:
    design = verbosity()
    for count in range(7):
        expected = math.comb(6, count) * 0.1**count * 0.9 ** (6 - count)
        assert design.target[:, design.feature == count].sum(dim=1).tolist() == pytest.approx([expected] * 8)
    assert design.target[:, design.feature >= 3].sum(dim=1).mean() == pytest.approx(0.0158, abs=1e-3)
    for part in design.parts.values():
        assert design.feature[part.support].unique().tolist() == [0, 1, 2]
        assert part.support.sum() == 5**6 + 6 * 5**5 + 15 * 5**4
    assert not design.parts["pairs_wrong_mu"].true_mu


def test_length_is_paid_until_four_and_quality_is_a_mean() -> None:
    design = length()
    g = [-1, -0.2, 0.5, 1, 1.4, 0.8, -0.5, -2, -3.5]
    assert design.gold[:, 0].tolist() == [-1] * 8
    of_word = design.gold[:, 1:5] - g[1]  # 0.7 times the quality of each word
    assert of_word.mean(dim=1).tolist() == pytest.approx([0] * 8, abs=1e-9)
    assert of_word.std(dim=1, correction=0).tolist() == pytest.approx([0.7] * 8)
    for words in ([2], [0, 3], [3, 3, 1, 2], [0] * 7, [1, 2, 3, 0, 0, 1, 2, 3]):
        expected = g[len(words)] + of_word[:, words].mean(dim=1)
        assert design.gold[:, design.tree.find(words)].tolist() == pytest.approx(expected.tolist())
    for words in range(1, 9):
        expected = math.comb(7, words - 1) * 0.35 ** (words - 1) * 0.65 ** (8 - words)
        assert design.target[:, design.feature == words].sum(dim=1).tolist() == pytest.approx([expected] * 8)
    assert design.feature[design.parts["pairs"].support].unique().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert design.feature[design.parts["pairs_hole"].support].unique().tolist() == [1, 2, 3, 4]
    assert design.feature[design.parts["pairs_sharp"].support].unique().tolist() == [1, 2, 3, 4, 5]


@BOTH
def test_scores_of_demonstrations_and_of_gold_correlate_by_three_tenths(build: object) -> None:
    quality = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    other = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    score = _correlated(0.5 * quality + 3 * other, quality)
    assert (score * quality).mean().item() == pytest.approx(0.3)
    assert score.mean().item() == pytest.approx(0)
    assert (score**2).mean().item() == pytest.approx(1)


def test_gold_of_text(toy: Design) -> None:
    """Three words with one "b"; the empty one; and what counts as unfinished: cut, too long, or other text."""
    texts = [" b a c", "", " a", " a a a a", " a d", " a  b", "a"]
    finished = [True, True, False, True, True, True, True]
    expected = [3.5, 0, -4, -4, -4, -4, -4]
    assert Enumerable(lambda: toy)([" c c"] * 7, texts, finished) == expected
    for prompt in ("", " a", " c c c", " d d", "c c"):
        with pytest.raises(InputError, match="lab:toy knows its eight prompts"):
            toy.gold_reward(prompt, " a", finished=True)


def test_gold_of_text_is_that_of_its_node() -> None:
    design = verbosity()
    prompt = design.render(design.prompts[3])
    node = design.tree.find([1, 0, 2, 0, 5, 4])
    assert design.gold_reward(prompt, " good very clear very kind warm", finished=True) == design.gold[3, node]
    assert design.gold_reward(prompt, " good very clear very kind", finished=True) == -5


def test_of_a_response_that_goes_on_verbosity_reads_six_words_and_length_gives_the_worst() -> None:
    design = verbosity()
    prompt, six = design.render(design.prompts[3]), " good very clear very kind warm"
    gold = design.gold_reward(prompt, six, finished=True)
    for text, finished in ((six, False), (f"{six} very", False), (f"{six} very very", True)):
        assert design.gold_reward(prompt, text, finished) == gold
    assert design.gold_reward(prompt, " good very", finished=False) == -5
    other = length()
    prompt, eight = other.render(other.prompts[0]), " red" * 8
    assert other.gold_reward(prompt, f"{eight} red", finished=False) == -5 != other.gold_reward(prompt, eight, True)
