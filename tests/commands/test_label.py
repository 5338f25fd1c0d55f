"""From ``predict`` with a reward to a file of pairs, and from that to a fit."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lit_isdpo.cli import main
from lit_isdpo.commands.label import PreferenceLabels
from lit_isdpo.lab.posts import gold_reward, render_prompt, sample_post
from lit_isdpo.types import InputError
from tests.ranks import DDP, run_on_ranks
from tests.runs import read_metrics


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lab's reference, and twelve posts whose own pairs play no part."""
    rng = Random(0)
    rows = [{"prompt": render_prompt(sample_post(rng, "train")), "chosen": "a", "rejected": "b"} for _ in range(12)]
    file = tmp_path_factory.mktemp("posts") / "posts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model.policy.path=lab:posts",
        f"--data.test={file}",
        "--data.batch_size=5",
        "--data.max_length=128",
        "--model.sampling.num_responses=3",
        "--model.sampling.max_new_tokens=40",
        "--labels.reward=LabReward",
        "--labels.reward.task=lab:posts",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
    ]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pairs_of_the_reference_have_weights_of_one(arguments: list[str], tmp_path: Path) -> None:
    """Policy, reference and mu are one model: what predict says of its samples is what the first step computes."""
    main(["predict", *arguments, "--labels.pairing=all", f"--trainer.default_root_dir={tmp_path}"])
    run = tmp_path / "version_0"
    predictions, pairs = read(run / "predictions.jsonl"), read(run / "pairs.jsonl")
    assert [row["row_id"] for row in predictions] == [row_id for row_id in range(12) for _ in range(3)]
    assert set(predictions[0]) == {"row_id", "prompt", "response", "finished"}
    assert len({row["response"] for row in predictions[:3]}) > 1
    assert len(pairs) > 12
    for pair in pairs:
        assert pair["chosen_score"] == gold_reward(pair["prompt"], pair["chosen"], finished=True)
        assert pair["rejected_score"] == gold_reward(pair["prompt"], pair["rejected"], finished=True)
        assert pair["chosen_score"] > pair["rejected_score"]
    main(
        [
            "fit",
            *(argument for argument in arguments if not argument.startswith("--data.test")),
            f"--data.train={run / 'pairs.jsonl'}",
            f"--data.val={run / 'pairs.jsonl'}",
            "--model.mu=data",
            "--probe.num_prompts=0",
            "--trainer.max_steps=1",
            "--trainer.log_every_n_steps=1",
            f"--trainer.default_root_dir={tmp_path / 'fit'}",
        ]
    )
    metrics = read_metrics(tmp_path / "fit" / "version_0")
    for key in ("weights/mean", "weights/max", "weights/ess"):
        assert metrics[f"val/{key}"][0] == pytest.approx(1, abs=1e-4), key
    assert metrics["val/logratios/importance"][0] == pytest.approx(0, abs=1e-4)


def test_a_temperature_is_counted_in(arguments: list[str], tmp_path: Path) -> None:
    """At half the temperature, samples are likelier under what was sampled than under the policy itself."""
    options = ["--model.sampling.temperature=0.5", "--model.sampling.top_p=0.9"]
    main(["predict", *arguments, *options, f"--trainer.default_root_dir={tmp_path}"])
    pairs = read(tmp_path / "version_0" / "pairs.jsonl")
    main(
        [
            "validate",
            *(argument for argument in arguments if not argument.startswith("--data.test")),
            f"--data.val={tmp_path / 'version_0' / 'pairs.jsonl'}",
            "--model.mu=data",
            "--probe.num_prompts=0",
            f"--trainer.default_root_dir={tmp_path / 'validate'}",
        ]
    )
    metrics = read_metrics(tmp_path / "validate" / "version_0")
    sampled = sum(pair["chosen_behavior_logps"] + pair["rejected_behavior_logps"] for pair in pairs) / len(pairs)
    plain = sum(metrics[f"val/logps/{side}"][0] for side in ("chosen", "rejected"))
    assert metrics["val/logratios/importance"][0] == pytest.approx(plain - sampled, abs=1e-3)
    assert plain < sampled - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.sampling.num_responses=1"], "labels.reward: a pair needs two responses; set model.sampling.num"),
        (["--labels.pairing=some"], "labels.pairing"),
        (["--labels.seed=3"], "labels.seed is that of the noise, and labels.noise_temperature 0 makes none"),
        (["--labels.reward.task=lab:nothing"], "the lab has no task 'lab:nothing'"),
        (["--model.sampling.max_new_tokens=1"], "labels: no pair came out of 36 responses to 12 rows, 36 responses un"),
    ],
)
def test_what_gives_no_labels_is_said(
    arguments: list[str], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["predict", *arguments, *options, f"--trainer.default_root_dir={tmp_path}"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "all"}, "without labels.reward nothing is labelled"),
        ({"noise_temperature": -1.0}, "labels.noise_temperature must be a number of at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PreferenceLabels(**options)


def test_text_and_conversations_do_not_go_into_one_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    row = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "5"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    posts = next(argument.partition("=")[2] for argument in arguments if argument.startswith("--data.test"))
    both = f'--data.test=["{posts}", "{tmp_path / "chats.jsonl"}"]'
    with pytest.raises(SystemExit):
        main(["predict", *arguments, both, f"--trainer.default_root_dir={tmp_path}"])
    assert "data.test mixes sources whose prompts are text with others" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_write_one_file(arguments: list[str], tmp_path: Path) -> None:
    """Over gloo, 12 rows in batches of 3 and 2 a rank; each row is labelled once, and the file is in their order."""
    options = ["--labels.pairing=all", "--data.batch_size=6", f"--trainer.default_root_dir={tmp_path}"]
    printed = run_on_ranks([["predict", *arguments, *options, *DDP]])
    run = tmp_path / "version_0"
    ranks = [read(run / f"predictions-{rank}.jsonl") for rank in range(2)]
    assert [sorted({row["row_id"] for row in rows}) for rows in ranks] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    pairs = read(run / "pairs.jsonl")
    prompts = {row["row_id"]: row["prompt"] for rows in ranks for row in rows}
    order = [row_id for pair in pairs for row_id, prompt in prompts.items() if prompt == pair["prompt"]]
    assert order == sorted(order)
    assert {row_id % 2 for row_id in order} == {0, 1}
    assert f"Wrote {len(pairs)} pairs to {run / 'pairs.jsonl'}" in printed
    assert "36 responses to 12 rows" in printed
