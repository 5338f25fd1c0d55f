"""Where a gold reward is known, and where it is not."""

from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from lit_isdpo.lab.folder import MARKER
from lit_isdpo.lab.posts import render_prompt, sample_post
from lit_isdpo.training.probe import find_gold_reward


def folder_of(root: Path, task: str | None) -> Path:
    folder = root / str(task)
    folder.mkdir(exist_ok=True)
    if task is not None:
        (folder / MARKER).write_text(f'{{"design": "{task}", "part": "pairs"}}')
    return folder


@pytest.mark.parametrize(
    ("tasks", "known"),
    [
        (["posts"], True),
        (["posts", "posts"], True),
        (["posts", "verbosity"], False),
        (["posts", None], False),
        ([], False),
    ],
)
def test_one_task_has_a_gold_reward_and_a_mixture_has_none(tmp_path: Path, tasks, known: bool) -> None:
    folders = [folder_of(tmp_path, task) for task in tasks]
    datamodule = SimpleNamespace(splits=SimpleNamespace(folders=lambda stage: folders))
    reward = find_gold_reward(datamodule, "val", render_prompt(sample_post(Random(0), "train")))
    assert (reward is not None) == known
    assert find_gold_reward(datamodule, "val", "no post") is None
