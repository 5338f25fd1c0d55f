"""Reward sources: what they score, and what they refuse."""

import json
from pathlib import Path
from random import Random

import pytest

from lit_isdpo.evaluation.rewards import LabReward
from lit_isdpo.lab.folder import MARKER
from lit_isdpo.lab.posts import GoldReward, render_prompt, sample_post
from lit_isdpo.types import InputError

POST = render_prompt(sample_post(Random(0), "test"))


def test_the_labs_reward_is_its_gold_reward() -> None:
    reward = LabReward("lab:posts")
    responses, finished = ["price good", "price bad", ""], [True, True, False]
    assert reward([POST] * 3, responses, finished) == GoldReward()([POST] * 3, responses, finished)
    assert reward.identity == LabReward("posts").identity != LabReward("lab:verbosity").identity


def test_the_labs_reward_of_a_data_folder(tmp_path: Path) -> None:
    assert LabReward.for_folder(tmp_path) is None
    (tmp_path / MARKER).write_text(json.dumps({"design": "verbosity", "part": "pairs"}))
    reward = LabReward.for_folder(tmp_path)
    assert reward is not None
    assert reward.identity == LabReward("lab:verbosity").identity


def test_what_the_labs_reward_refuses() -> None:
    with pytest.raises(InputError, match=r"no task 'lab:poems'; it has lab:posts, lab:verbosity"):
        LabReward("lab:poems")
    with pytest.raises(InputError, match="cannot read a conversation"):
        LabReward("lab:posts")([[{"role": "user", "content": POST}]], ["price good"], [True])
