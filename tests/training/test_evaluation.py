"""The verb ``test`` as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lit_isdpo.cli import main
from tests.ranks import DDP, run_on_ranks

REWARD = ["--evaluation.reward=LabReward", "--evaluation.reward.task=lab:posts"]


@pytest.fixture
def options(tiny: list[str], pairs_file: str, model_dir: str) -> list[str]:
    """Of an evaluation on 4 prompts, 2 responses to each."""
    return [*tiny, f"--data.test={pairs_file}", f"--model.reference.path={model_dir}", "--evaluation.num_responses=2"]


def evaluation(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return content


def test_an_evaluation_twice(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the second one prints and writes is the same; the files that it reads are those of the first."""
    arguments = ["test", *options, *REWARD, f"--trainer.default_root_dir={tmp_path}"]
    main(arguments)
    assert "wins against the chosen" in capsys.readouterr().out
    first = evaluation(tmp_path / "version_0")
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "evaluations").rglob("shards/*/*.parquet")}
    main(arguments)
    assert evaluation(tmp_path / "version_1") == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "evaluations").rglob("shards/*/*.parquet")} == shards
    metrics = first["metrics"]
    assert metrics["test/kl/rao_blackwell"] == pytest.approx(0, abs=1e-6), "the policy is its reference"
    for key in ("gold_reward", "win_rate", "win_rate_lc", "win_rate_vs_chosen", "reference/gold_reward"):
        assert metrics[f"test/{key}_low"] <= metrics[f"test/{key}"] <= metrics[f"test/{key}_high"]
    table = pd.read_parquet(first["files"]["policy"])
    assert len(table) == 4 * 2
    assert metrics["test/gold_reward"] == pytest.approx(table.filter(like="reward/lab:posts").mean().item(), abs=1e-6)


def test_supervised_training_has_no_reference_and_says_so(
    tiny: list[str], pairs_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--model=SFTModule", "--data=SFTDataModule", *tiny, f"--data.test={pairs_file}", *REWARD]
    main(["test", *arguments, f"--trainer.default_root_dir={tmp_path}"])
    assert "There is no reference" in caplog.text
    metrics = evaluation(tmp_path / "version_0")["metrics"]
    assert "test/win_rate_vs_chosen" in metrics
    assert not any("kl/" in key or key == "test/win_rate" for key in metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluation.num_responses=0"], "evaluation.num_responses must be at least 1"),
        (["--evaluation.temperature=0"], "evaluation.temperature must be above 0"),
        (["--evaluation.top_p=1.5"], "evaluation.top_p must be above 0 and at most 1"),
        (["--evaluation.engine_options={seed: 1}"], "evaluation.engine_options are vLLM's"),
        (
            ["--evaluation.num_prompts=2", "--evaluation.kl_prompts=4"],
            "kl_prompts: 4 prompts are more than",
        ),
        (["--model=SFTModule", "--evaluation.kl_prompts=4"], "evaluation.kl_prompts: without model.reference"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["test", *arguments[:1], *tiny, *arguments[1:], f"--trainer.default_root_dir={tmp_path}"])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_other_verbs_leave_judges_and_rewards_alone(tiny: list[str], tmp_path: Path) -> None:
    judge = ["--evaluation.judge=Judge", "--evaluation.judge.model=m", "--evaluation.judge.api_key_env=NO_SUCH_KEY"]
    main(["validate", *tiny, *judge, f"--trainer.default_root_dir={tmp_path}"])


@pytest.mark.slow
def test_two_ranks_are_one(options: list[str], tmp_path: Path) -> None:
    """Responses are those of shards, whoever draws them: 7 prompts, two a shard."""
    options = [*options, *REWARD, "--evaluation.num_prompts=7", "--evaluation.batch_size=4", "--data.batch_size=8"]
    main(["test", *options, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    run_on_ranks([["test", *options, f"--trainer.default_root_dir={tmp_path / 'two'}", *DDP]])
    one, two = (evaluation(tmp_path / name / "version_0")["metrics"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)
