from itertools import permutations

import pytest

from lit_isdpo.data.examples import by_score, choose_pairs

TEXTS, SCORES = ["a", "b", "c", "d"], [2.0, 4.0, 1.0, 4.0]


def texts(pairs, responses=TEXTS):
    return {(responses[better], responses[worse]) for better, worse in pairs}


def test_all_pairs_are_those_with_different_scores():
    pairs = texts(choose_pairs("p", TEXTS, SCORES, "all"))
    assert pairs == {("b", "a"), ("d", "a"), ("b", "c"), ("d", "c"), ("a", "c")}


@pytest.mark.parametrize("pairing", ["best_worst", "best_random", "all"])
@pytest.mark.parametrize("scores", [[], [1.0], [3.0, 3.0, 3.0]])
def test_ties_give_no_pair(pairing, scores):
    assert choose_pairs("p", TEXTS[: len(scores)], scores, pairing) == []


def test_best_against_worst():
    assert choose_pairs("p", ["a", "b", "c"], [2.0, 4.0, 1.0], "best_worst") == [(1, 2)]
    ((better, worse),) = texts(choose_pairs("p", TEXTS, SCORES, "best_worst"))
    assert (better in "bd", worse) == (True, "c")


@pytest.mark.parametrize("pairing", ["best_worst", "best_random", "all"])
def test_the_texts_decide_and_not_their_places(pairing):
    chosen = set()
    for order in permutations(range(4)):
        responses = [TEXTS[index] for index in order]
        pairs = choose_pairs("p", responses, [SCORES[index] for index in order], pairing)
        chosen.add(frozenset(texts(pairs, responses)))
    assert len(chosen) == 1


def test_the_best_meets_each_worse_one_about_equally_often():
    """Of 300 prompts with three worse responses, each is drawn 100 times but for 8.2 (one standard deviation)."""
    counts = [0, 0, 0, 0]
    for row in range(300):
        responses = [f"{text} {row}" for text in TEXTS]
        ((better, worse),) = choose_pairs("p", responses, [1.0, 9.0, 2.0, 3.0], "best_random")
        assert better == 1
        counts[worse] += 1
    assert all(70 < counts[worse] < 130 for worse in (0, 2, 3)), counts


def test_equal_scores_have_no_favourite_place():
    first = sum(by_score("p", [f"a {row}", f"b {row}"], [1.0, 1.0])[0] for row in range(300))
    assert 110 < first < 190
