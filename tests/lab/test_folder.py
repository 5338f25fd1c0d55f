"""The environments' files: a function of the seed, disjoint splits, whole or not there, found by their names."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lit_isdpo.lab import designs, environments
from lit_isdpo.lab import folder as lab
from lit_isdpo.lab.designs import Design
from lit_isdpo.lab.environments import Enumerable, Environment, Posts
from lit_isdpo.lab.exact import ResponseDistribution
from lit_isdpo.lab.posts import Split, gold_reward, parse_prompt, split_of
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.types import InputError

NUM_PROMPTS: dict[Split, int] = {"train": 16, "validation": 8, "test": 8}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pairs and demonstrations, and of the enumerable tasks a reference that costs nothing."""
    for environment in (Posts, Enumerable):
        monkeypatch.setattr(environment, "num_pairs", NUM_PROMPTS)
        monkeypatch.setattr(environment, "num_demonstrations", {"train": 200, "validation": 1024})
    monkeypatch.setattr(environments, "shipped_reference", uniform)


def uniform(design: Design) -> ResponseDistribution:
    tokens = design.tree.num_words + 1
    next_logps = torch.full((len(design.prompts), len(design.tree), tokens), -math.log(tokens), dtype=torch.float64)
    return ResponseDistribution(design.tree, next_logps)


def test_pairs_are_a_function_of_the_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    contents = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        lab.write_part(tmp_path / name, "posts", "pairs", seed)
        contents.append({file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir())})
    assert list(contents[0]) == ["environment.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    assert contents[0] == contents[1]
    assert all(contents[0][name] != contents[2][name] for name in contents[0])
    assert torch.equal(state, torch.random.get_rng_state())

    marker = json.loads(contents[0]["environment.json"])
    assert (marker["design"], marker["format"], marker["seed"]) == ("posts", 1, 3)
    prompts = set()
    for split, number in NUM_PROMPTS.items():
        rows = read(tmp_path / "a" / f"{split}.jsonl")
        assert marker["counts"][split]["prompts"] == number
        assert marker["counts"][split]["pairs"] == len(rows)
        assert list(rows[0]) == [
            *("prompt", "chosen", "rejected"),
            *("chosen_behavior_logps", "rejected_behavior_logps", "chosen_gold", "rejected_gold"),
        ]
        assert all(split_of(parse_prompt(row["prompt"])) == split for row in rows)
        assert prompts.isdisjoint(row["prompt"] for row in rows)
        prompts |= {row["prompt"] for row in rows}


def test_demonstrations_are_a_function_of_the_seed_and_disjoint(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        lab.write_part(tmp_path / name, "posts", "sft", seed)
    train = read(tmp_path / "a" / "train.jsonl")
    assert train == read(tmp_path / "b" / "train.jsonl") != read(tmp_path / "c" / "train.jsonl")
    assert len(train) == 200
    assert set(train[0]) == {"prompt", "completion"}
    validation = read(tmp_path / "a" / "validation.jsonl")
    assert len({row["prompt"] for row in train}) == 200
    for split, rows in (("train", train), ("validation", validation)):
        assert {split_of(parse_prompt(row["prompt"])) for row in rows} == {split}
    # Two to four facts, .85 right: 3 * (.85 * .47 - .15) - .3 / 3, give or take four standard errors.
    rewards = [gold_reward(row["prompt"], row["completion"], finished=True) for row in validation]
    assert sum(rewards) / len(rewards) == pytest.approx(0.65, abs=0.12)


def test_names_are_resolved_to_folders_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = lab.resolve("lab:posts", tmp_path)
    assert pairs.parent.parent == tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(lab, "write_part", lambda *_: pytest.fail("written twice"))
        assert lab.resolve("lab:posts/pairs@0", tmp_path) == pairs
    assert lab.resolve("lab:posts@1", tmp_path) != pairs
    assert json.loads((lab.resolve("lab:posts@1", tmp_path) / "environment.json").read_text())["seed"] == 1

    assert {file.name for file in lab.resolve("lab:posts/sft", tmp_path).iterdir()} == {
        *("train.jsonl", "validation.jsonl", "environment.json")
    }
    assert lab.environment_of(lab.resolve("lab:posts/sft", tmp_path)) == "posts"
    reference = lab.resolve("lab:posts", tmp_path, default="reference")
    assert reference == lab.resolve("lab:posts/reference", tmp_path)
    assert load_causal_lm(PolicyConfig(path=str(reference))).config.hidden_size == 96
    init = lab.resolve("lab:posts/init", tmp_path)
    assert not (init / "model.safetensors").exists()
    assert len(AutoTokenizer.from_pretrained(init)) == AutoConfig.from_pretrained(init).vocab_size
    assert {folder.name for folder in pairs.parent.iterdir()} == {"pairs", "sft", "reference", "init"}


@pytest.mark.parametrize("source", ["lab:", "lab:post", "lab:posts/", "lab:posts/test", "lab:posts@x", "lab:posts@-1"])
def test_an_unknown_name_is_refused_with_what_there_is(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{source!r}.*lab:posts/pairs.*sft.*reference.*init") as error:
        lab.resolve(source, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, name: str, part: str, seed: int) -> None:
        (folder / "train.jsonl").write_text("half of ")
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "write_part", fail)
    with pytest.raises(KeyboardInterrupt):
        lab.resolve("lab:posts", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(next(tmp_path.iterdir()).iterdir()) == []


def test_of_two_writers_the_first_to_finish_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_while_another_does(folder: Path, name: str, part: str, seed: int) -> None:
        (folder / "train.jsonl").write_text("second")
        target = folder.parent.parent / "pairs"
        target.mkdir()
        (target / "train.jsonl").write_text("first")

    monkeypatch.setattr(lab, "write_part", write_while_another_does)
    pairs = lab.resolve("lab:posts", tmp_path)
    assert (pairs / "train.jsonl").read_text() == "first"
    assert [path.name for path in pairs.parent.iterdir()] == ["pairs"]


@pytest.mark.parametrize("content", [None, "", "not json", "[]", '{"design": "other"}'])
def test_other_folders_are_of_no_environment(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / lab.MARKER).write_text(content)
    assert lab.environment_of(tmp_path) is None


def test_the_gold_reward_is_found_by_the_marker(tmp_path: Path) -> None:
    folder = lab.resolve("lab:posts", tmp_path)
    reward = lab.ENVIRONMENTS[lab.environment_of(folder)]
    assert isinstance(reward, Posts)
    row = read(folder / "test.jsonl")[0]
    assert reward([row["prompt"]], [row["chosen"]], [True]) == [row["chosen_gold"]]


def test_an_enumerable_task_has_files_of_the_same_kind(tmp_path: Path) -> None:
    hole = lab.resolve("lab:length/pairs_hole@2", tmp_path)
    assert hole.name == "pairs_hole"
    assert {folder.name for folder in tmp_path.iterdir()} == {hole.parent.name}
    assert hole.parent.name.startswith("length-2-")
    marker = json.loads((hole / lab.MARKER).read_text())
    assert (marker["design"], marker["part"], marker["seed"]) == ("length", "pairs_hole", 2)
    assert marker["counts"]["train"]["pairs"] == 16
    rows = read(hole / "train.jsonl")
    assert len(rows) == 16
    assert all(1 <= len(row["chosen"].split()) <= 4 for row in rows)
    assert lab.environment_of(hole) == "length"
    reward = lab.ENVIRONMENTS["length"]
    assert reward([rows[0]["prompt"]], [rows[0]["chosen"]], [True]) == [rows[0]["chosen_gold"]]
    sft = lab.resolve("lab:verbosity/sft", tmp_path)
    assert all(len(row["completion"].split()) == 6 for row in read(sft / "train.jsonl"))
    init = lab.resolve("lab:verbosity/init", tmp_path)
    assert len(AutoTokenizer.from_pretrained(init)) == AutoConfig.from_pretrained(init).vocab_size == 7


def test_exact_values_are_found_by_the_marker(tmp_path: Path) -> None:
    exact = lab.exact_evaluation_for(lab.resolve("lab:length/pairs_hole", tmp_path))
    assert exact is not None
    assert (exact.design, exact.part) == (designs.length(), "pairs_hole")
    demonstrations = lab.exact_evaluation_for(lab.resolve("lab:length/sft", tmp_path))
    assert demonstrations is not None
    assert demonstrations.part is None
    assert lab.exact_evaluation_for(lab.resolve("lab:posts", tmp_path)) is None
    assert lab.exact_evaluation_for(tmp_path) is None


@pytest.mark.parametrize("source", ["lab:posts/pairs_hole", "lab:length/pairs_wrong_mu", "lab:verbosity/pairs_hole"])
def test_a_part_of_another_environment_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has .*lab:verbosity/pairs_wrong_mu, .*lab:length/pairs_hole, "):
        lab.resolve(source, tmp_path)


@pytest.mark.parametrize("environment", lab.ENVIRONMENTS.values(), ids=lab.ENVIRONMENTS)
def test_the_shipped_reference_has_the_architecture_of_init(environment: Environment) -> None:
    shipped, built = AutoConfig.from_pretrained(environment.reference).to_dict(), environment.build_config().to_dict()
    differing = {key for key in shipped.keys() | built.keys() if shipped.get(key) != built.get(key)}
    assert differing <= {"_name_or_path", "transformers_version", "use_cache"}
