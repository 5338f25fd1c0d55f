"""Reward sources: what they score, and what they refuse."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_pair
from lit_isdpo.evaluation.rewards import LabReward, RewardModel
from lit_isdpo.lab.environments import Posts
from lit_isdpo.lab.folder import MARKER
from lit_isdpo.lab.posts import render_prompt, sample_post
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reward_model import load_score_model
from lit_isdpo.types import InputError, PreferenceExample, Prompt, Reward, score

POST = render_prompt(sample_post(Random(0), "test"))


def test_the_labs_reward_is_its_gold_reward() -> None:
    reward = LabReward("lab:posts")
    responses, finished = ["price good", "price bad", ""], [True, True, False]
    assert reward([POST] * 3, responses, finished) == Posts()([POST] * 3, responses, finished)
    assert reward.identity == LabReward("posts").identity != LabReward("lab:verbosity").identity


def test_the_labs_reward_of_a_data_folder(tmp_path: Path) -> None:
    assert LabReward.for_folder(tmp_path) is None
    (tmp_path / MARKER).write_text(json.dumps({"design": "verbosity", "part": "pairs"}))
    reward = LabReward.for_folder(tmp_path)
    assert reward is not None
    assert reward.identity == LabReward("lab:verbosity").identity


class Told(Reward):
    """Gives what it was told to give."""

    identity = "told"

    def __init__(self, values: Any) -> None:
        self.values = values

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]) -> Any:
        return self.values


@pytest.mark.parametrize("values", [[1, 2.5], torch.tensor([[1], [2.5]]), np.array([1, 2.5]), (v for v in (1, 2.5))])
def test_a_reward_may_give_numbers_of_any_kind(values: Any) -> None:
    assert score(Told(values), ["a", "b"], ["x", "y"], [True, True], option="model.reward") == [1, 2.5]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "None."),
        (0.5, "0.5."),
        ([1.0], "1."),
        ([1.0, 2.0, 3.0], "3."),
        ([1.0, None], "None for 'y'."),
        (["good", "bad"], "'good' for 'x'."),
        ([1.0, math.nan], "nan for 'y'."),
        ([math.inf, 1.0], "inf for 'x'."),
        (torch.zeros(2, 2), "tensor([0., 0.]) for 'x'."),
    ],
)
def test_a_reward_that_does_not_score_every_response_is_named(values: Any, words: str) -> None:
    with pytest.raises(InputError) as refused:
        score(Told(values), ["a", "b"], ["x", "y"], [True, True], option="model.reward")
    rule = "model.reward: Told must give a finite number to each of 2 responses, and gave"
    assert str(refused.value) == f"{rule} {words}"


def test_what_the_labs_reward_refuses() -> None:
    with pytest.raises(InputError, match=r"no task 'lab:poems'; it has lab:posts, lab:verbosity"):
        LabReward("lab:poems")
    with pytest.raises(InputError, match="cannot read a conversation"):
        LabReward("lab:posts")([[{"role": "user", "content": POST}]], ["price good"], [True])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def scorer(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of random weights, with the lab's tokenizer."""
    torch.manual_seed(0)
    model = load_score_model(PolicyConfig(path=model_dir))
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


PROMPTS: list[Prompt] = [POST, "POST: price good TL;DR:", POST, POST]
RESPONSES = [" price good", " wine bad view good", "", " price good"]
FINISHED = [True, True, True, False]


def test_a_reward_model_scores_the_ids_of_training(scorer: Path) -> None:
    """As written out by hand; a response that was cut has no EOS, an empty one nothing else."""
    reward = RewardModel(str(scorer), batch_size=3)
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    tokenizer = reward.tokenizer
    scores = reward(PROMPTS, RESPONSES, FINISHED)
    for prompt, response, finished, given in zip(PROMPTS, RESPONSES, FINISHED, scores, strict=True):
        ids = tokenizer.encode(prompt) + tokenizer.encode(response, add_special_tokens=False)
        ids += [tokenizer.eos_token_id] * finished
        with torch.no_grad():
            assert given == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    pair = tokenize_pair(PreferenceExample(POST, RESPONSES[0], "bad"), TextEncoder(tokenizer), Limits(99, 60))
    with torch.no_grad():
        trained_on = model(torch.tensor([pair.prompt_ids + pair.chosen_ids])).logits.item()
    assert scores[0] == pytest.approx(trained_on, abs=1e-5)
    assert len(set(scores)) == 4


def test_a_score_alone_is_the_score_in_a_batch(scorer: Path) -> None:
    together = RewardModel(str(scorer))(PROMPTS, RESPONSES, FINISHED)
    alone = RewardModel(str(scorer), batch_size=1)(PROMPTS, RESPONSES, FINISHED)
    assert together == pytest.approx(alone, abs=1e-6)


def test_conversations_go_through_the_chat_template(scorer: Path, tmp_path: Path) -> None:
    shutil.copytree(scorer, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(scorer)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    conversation: Prompt = [{"role": "user", "content": "price good"}]
    text = "<|im_start|>user\nprice good<|im_end|>\n<|im_start|>assistant\n"
    chat, plain = RewardModel(str(tmp_path)), RewardModel(str(scorer))
    ids = [*tokenizer.encode(text + "bad<|im_end|>", add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        expected = chat.model.model(torch.tensor([ids])).logits.item()
    assert chat([conversation], ["bad"], [True]) == pytest.approx([expected], abs=1e-5)
    always = RewardModel(str(tmp_path), chat_template="always")
    assert always(["price good"], ["bad"], [True]) == pytest.approx([expected], abs=1e-5)
    # Without a template a conversation is a transcript, whose space a policy writes itself.
    transcript = plain(["\n\nHuman: price good\n\nAssistant:"], [" bad"], [True])
    assert plain([conversation] * 2, ["bad", " bad"], [True] * 2) == pytest.approx([*transcript, *transcript])


def test_the_identity_is_the_weights_and_what_they_read(scorer: Path, tmp_path: Path) -> None:
    identity = RewardModel(str(scorer)).identity
    assert identity.startswith(str(scorer))
    assert identity == RewardModel(str(scorer), batch_size=1).identity, "nothing that leaves the scores alone"
    assert identity != RewardModel(str(scorer), max_length=64).identity
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    with torch.no_grad():
        model.score.weight += 0.1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(scorer).save_pretrained(tmp_path)
    assert identity.split()[1] != RewardModel(str(tmp_path)).identity.split()[1]


def test_a_missing_padding_id_is_the_tokenizers_or_an_error(scorer: Path, tmp_path: Path) -> None:
    shutil.copytree(scorer, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    expected = RewardModel(str(scorer))(PROMPTS, RESPONSES, FINISHED)
    assert RewardModel(str(tmp_path))(PROMPTS, RESPONSES, FINISHED) == pytest.approx(expected, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(scorer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"reward\.path: .* has no padding id.*; set pad_token_id in its config\.json"):
        RewardModel(str(tmp_path))


def test_what_a_reward_model_refuses(scorer: Path, model_dir: str) -> None:
    for arguments, message in (
        ({"path": model_dir}, "causal language model without a head"),
        ({"path": "./nowhere"}, r"reward\.path: no such folder"),
        ({"batch_size": 0}, r"reward\.batch_size must be at least 1"),
        ({"max_length": 4096}, r"reward\.max_length: 4096 tokens are more than the model's 2048"),
        ({"max_length": 8, "max_prompt_length": 8}, r"reward\.max_prompt_length must be at least 1 and less than"),
        ({"chat_template": "always"}, r"reward\.chat_template is 'always'"),
    ):
        with pytest.raises(InputError, match=message):
            RewardModel(**{"path": str(scorer), **arguments})


@pytest.mark.parametrize("arguments", [["RewardModel", "path"], ["LabReward", "task"]], ids=lambda value: value[0])
def test_a_config_names_a_reward_by_its_class(arguments: list[str], scorer: Path) -> None:
    name, option = arguments
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    given = parser.parse_args([f"--reward={name}", f"--reward.{option}={scorer if option == 'path' else 'lab:posts'}"])
    assert type(parser.instantiate_classes(given).reward).__name__ == name
