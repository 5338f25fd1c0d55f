"""The gold reward rule by rule, and the random parts against the numbers of the design."""

import math
from random import Random

import pytest

from lit_isdpo.lab import posts
from lit_isdpo.lab.environments import Posts
from lit_isdpo.lab.labelling import first_wins
from lit_isdpo.types import InputError

# The post tells safety, price, speed, smell, color and box; it has no quality, comfort, noise or weight.
PROMPT = "POST: price good safety poor smell fine speed fair color great box superb TL;DR:"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        (" safety poor", 1.0),
        (" price good", 1.0),
        (" speed fair", 0.6),
        (" color great", 0.1),
        (" smell fine", 0.0),
        (" box superb", -0.2),
        (" safety good", -1.0),  # another value
        (" quality good", -1.0),  # an attribute the post has not
        (" safety poor safety poor", 0.5),  # 1 - 0.5
        (" safety poor safety good", 0.5),  # the repetition takes precedence over wrong
        (" safety good safety poor", -1.5),  # ... and over right: -1 - 0.5
        (" quality good quality bad", -1.5),
        (" safety", -0.5),  # an attribute without a value
        (" poor", -0.5),
        (" safety poor price", 0.5),
        (" safety safety poor", 0.5),  # the first word is malformed, then a first mention
        (" safety poor good", 0.5),
        (" Safety poor", -1.0),  # two malformed words
        (" safety poor price good speed fair", 2.6),
        (" safety poor price good speed fair smell fine", 2.3),  # 2.6 + 0 - 0.3
        (" safety poor price good speed fair smell fine color great", 2.1),  # 2.6 + 0 + 0.1 - 2 * 0.3
        (" safety poor price good speed fair safety poor", 1.8),  # 2.6 - 0.5 - 0.3: a repetition is a mention too
        (" safety poor price good speed fair oops oops", 1.6),  # malformed words are not
        ("safety\n poor", 1.0),  # whatever space stands between the words
    ],
)
def test_gold_reward_of_each_rule(response: str, expected: float) -> None:
    assert posts.gold_reward(PROMPT, response, finished=True) == expected
    assert posts.gold_reward(PROMPT, response, finished=False) == pytest.approx(expected - 1)


def test_gold_reward_takes_each_importance_from_the_table() -> None:
    expected = dict(zip(posts.ATTRIBUTES, (1, 1, 0.8, 0.8, 0.6, 0.4, 0.2, 0.1, 0, -0.2), strict=True))
    others = ["safety", "price", "quality", "comfort", "speed"]
    for attribute, importance in expected.items():
        facts = dict.fromkeys([attribute, *(other for other in others if other != attribute)][:5], "fine")
        prompt = posts.render_prompt({**facts, "noise" if attribute != "noise" else "speed": "bad"})
        assert posts.gold_reward(prompt, f" {attribute} fine", finished=True) == importance


def test_gold_rewards_of_a_batch_are_those_of_its_rows() -> None:
    other = PROMPT.replace("safety poor", "safety bad")
    rewards = Posts()([PROMPT, other, PROMPT], [" safety poor"] * 3, [True, True, False])
    assert rewards == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "Name three primary colors.",
        "",
        "POST: TL;DR:",
        PROMPT + " ",
        PROMPT.removesuffix(" TL;DR:"),
        PROMPT.replace(" box superb", ""),  # five facts
        PROMPT.replace("box superb", "safety superb"),  # an attribute twice
        PROMPT.replace("box", "bus"),
        PROMPT.replace("superb", "purple"),
        PROMPT.replace(" superb", "  superb"),
    ],
)
def test_a_text_that_is_not_a_post_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="this prompt is not"):
        posts.gold_reward(text, " safety poor", finished=True)


def test_posts_have_six_attributes_and_are_read_back_from_their_prompt() -> None:
    rng = Random(0)
    seen_attributes, seen_values = set(), set()
    for _ in range(200):
        post = posts.sample_post(rng, "train")
        assert len(post) == 6
        assert posts.parse_prompt(posts.render_prompt(post)) == post
        seen_attributes |= set(post)
        seen_values |= set(post.values())
    assert seen_attributes == set(posts.ATTRIBUTES)
    assert seen_values == set(posts.VALUES)


def test_splits_share_no_post_whatever_the_order_of_its_facts() -> None:
    rng = Random(0)
    for split in ("train", "validation", "test"):
        for _ in range(100):
            post = posts.sample_post(rng, split)
            assert posts.split_of(post) == split
            assert posts.split_of(dict(rng.sample(list(post.items()), 6))) == split
    every_split = [posts.split_of({"safety": a, "price": b}) for a in posts.VALUES for b in posts.VALUES]
    assert {split: every_split.count(split) for split in set(every_split)} == pytest.approx(
        {"train": 32, "validation": 16, "test": 16}, abs=12
    )


def test_demonstrations_tell_two_to_four_facts_15_percent_of_them_wrong() -> None:
    rng = Random(0)
    num_facts, num_wrong, num_demonstrations = [], 0, 2000
    for _ in range(num_demonstrations):
        post = posts.sample_post(rng, "train")
        words = posts.sample_demonstration(rng, post).split()
        told = dict(zip(words[::2], words[1::2], strict=True))
        num_facts.append(len(told))  # a repeated attribute would be missing here, and its words too
        assert len(words) == 2 * len(told)
        assert set(told) <= set(post)
        assert set(told.values()) <= set(posts.VALUES)
        num_wrong += sum(post[attribute] != value for attribute, value in told.items())
    for number in (2, 3, 4):
        assert num_facts.count(number) / num_demonstrations == pytest.approx(1 / 3, abs=0.04)  # 4 sigma
    assert num_wrong / sum(num_facts) == pytest.approx(0.15, abs=0.014)  # 3 sigma


@pytest.mark.parametrize("margin", [-1.0, 0.0, 0.3, 2.0])
def test_labels_follow_bradley_terry_at_temperature_one_half(margin: float) -> None:
    rng, number = Random(0), 10_000
    wins = sum(first_wins(rng, 0.5 + margin, 0.5, posts.LABEL_TEMPERATURE) for _ in range(number))
    expected = 1 / (1 + math.exp(-margin / 0.5))
    assert wins / number == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / number))
