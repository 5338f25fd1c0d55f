"""A reward model in training: the global batch, resume, export, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.evaluation.rewards import RewardModel
from lit_isdpo.types import InputError
from tests.runs import read_metrics
from tests.training.test_invariance import assert_alike, end_of, one_rank_is_two
from tests.training.test_resume import assert_same_log

KEYS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "rewards/mean"]


@pytest.fixture(scope="module")
def options(tiny: list[str], model_dir: str) -> list[str]:
    """The tiny fit, of a reward model; the probe's options stay, and are of no consequence."""
    return ["--model=RewardModule", f"--model.policy.path={model_dir}", *tiny[1:], "--trainer.max_steps=6"]


def fit(options: list[str], root: Path) -> Path:
    main(["fit", *options, f"--trainer.default_root_dir={root}"])
    return max(root.glob("version_*"))


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit([*options, "--checkpoint.monitor=val/rewards/accuracies"], tmp_path_factory.mktemp("run"))


def test_a_run_logs_both_stages_and_no_samples(run: Path) -> None:
    values = read_metrics(run)
    assert {f"{stage}/{key}" for stage in ("train", "val") for key in KEYS} <= set(values)
    assert not any("kl" in key or "response" in key for key in values)
    chosen, rejected = values["val/rewards/chosen"][6], values["val/rewards/rejected"][6]
    assert values["val/rewards/margins"][6] == pytest.approx(chosen - rejected, abs=1e-6)
    assert values["val/rewards/mean"][6] == pytest.approx((chosen + rejected) / 2, abs=1e-6)
    assert values["train/loss"][5] < values["train/loss"][0]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("reward_model.model.") for key in state)


def test_micro_batches_are_the_batch(run: Path, options: list[str], tmp_path: Path) -> None:
    assert_alike(run, fit([*options, "--data.micro_batch_size=2"], tmp_path), tolerance=1e-5)


def test_resume_is_bit_for_bit(run: Path, options: list[str], tmp_path: Path) -> None:
    stopped = fit([*options, "--trainer.max_steps=3"], tmp_path)
    resumed = fit([*options, f"--ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"], tmp_path)
    a, b = end_of(run), end_of(resumed)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)
    assert_same_log(run, resumed, since=3)


def test_export_scores_as_the_run_did(run: Path, pairs_file: str, options: list[str], tmp_path: Path) -> None:
    """The folder's scores give the run's own accuracy, loss and mean on the same pairs; it can be trained further."""
    last, folder = run / "checkpoints" / "last.ckpt", tmp_path / "scores"
    main(["export", f"--ckpt_path={last}", f"--output_dir={folder}"])
    main(
        ["test", *options, f"--data.test={pairs_file}", f"--ckpt_path={last}", f"--trainer.default_root_dir={tmp_path}"]
    )
    measured = {key: value for key, values in read_metrics(tmp_path / "version_0").items() for value in values.values()}
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    reward = RewardModel(str(folder), max_length=64, max_prompt_length=48)
    prompts, finished = [row["prompt"] for row in rows], [True] * len(rows)
    chosen, rejected = (
        torch.tensor(reward(prompts, [row[side] for row in rows], finished)) for side in ("chosen", "rejected")
    )
    assert measured["test/rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    assert measured["test/loss"] == pytest.approx(-torch.log(torch.sigmoid(chosen - rejected)).mean().item(), abs=1e-5)
    assert measured["test/rewards/mean"] == pytest.approx((chosen + rejected).mean().item() / 2, abs=1e-5)
    own, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert own.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    card = (folder / "README.md").read_text()
    assert "text-classification" in card
    assert "| val/rewards/accuracies |" in card
    further = fit([*options, f"--model.policy.path={folder}", "--trainer.max_steps=1"], tmp_path / "further")
    assert read_metrics(further)["val/loss"][0] == pytest.approx(read_metrics(run)["val/loss"][6], abs=1e-6)


def test_weights_and_margins_of_the_data(options: list[str], pairs_file: str, tmp_path: Path) -> None:
    """At one head for all, a weight of 2 doubles a pair's loss, and a margin is taken off its difference."""
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"w": 2, "m": 0.5}) + "\n" for row in rows[:1]))
    options = [*options, f"--data.val={tmp_path / 'pairs.jsonl'}"]
    values = []
    for number, columns in enumerate(([], ["--data.weight_column=w", "--data.margin_column=m"])):
        train = f"--data.train={tmp_path / 'pairs.jsonl'}" if columns else f"--data.train={pairs_file}"
        root = tmp_path / str(number)
        main(["validate", *options, train, *columns, f"--trainer.default_root_dir={root}", "--model.centering=0.1"])
        values.append({key: value[0] for key, value in read_metrics(root / "version_0").items()})
    margin, center = values[0]["val/rewards/margins"], 0.1 * (2 * values[0]["val/rewards/mean"]) ** 2
    assert values[0]["val/loss"] == pytest.approx(math.log(1 + math.exp(-margin)) + center, abs=1e-5)
    assert values[1]["val/loss"] == pytest.approx(2 * (math.log(1 + math.exp(0.5 - margin)) + center), abs=1e-5)


def test_what_is_refused(run: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    root = f"--trainer.default_root_dir={tmp_path}"
    for arguments, message in (
        (["predict", *options, root, last], "predict: responses are sampled from a policy"),
        (["fit", *options, root, "--model.centering=-1"], "model.centering must be a finite number of at least 0"),
        (["fit", *options, root, "--model.policy.path=./nowhere"], "model.policy.path: no such folder"),
        (["fit", *options, root, "--model.policy.peft={peft_type: LORA}"], "peft: a reward model is trained whole"),
        (["fit", *options, root, "--model.policy.dtype=bfloat16"], "the weights of a reward model are float32"),
        (["fit", *options, root, "--model.policy.init=random"], "a reward model begins with pretrained weights"),
        (["fit", *options, root, "--trainer.strategy=fsdp2"], "trainer.strategy: a reward model is not sharded"),
        (["fit", *options, root, "--data=SFTDataModule"], "data: a reward model is trained on pairs"),
        (["export", last, f"--output_dir={tmp_path / 'x'}", "--as_adapter=true"], "holds a whole model and no adapter"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        errors = capsys.readouterr().err
        assert message in errors, errors
    with pytest.raises(InputError, match="holds no policy"):
        load_policy(run / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_two_ranks_are_one(options: list[str], tmp_path: Path) -> None:
    """DDP over gloo, with accumulation, on 7 validation pairs, so that one rank's last batch is filled up."""
    one_rank_is_two([*options, "--data.val_size=7", "--data.micro_batch_size=2"], tmp_path)


@pytest.mark.slow
def test_the_labs_reward_model_learns_the_gold_reward(tmp_path: Path) -> None:
    """``configs/reward.yaml`` as it stands, and its head's numbers; gold rewards are columns of the pairs."""
    config = Path(__file__).parents[2] / "configs" / "reward.yaml"
    main(["fit", f"--config={config}", f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"])
    run, folder = tmp_path / "version_0", tmp_path / "scores"
    main(["export", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--output_dir={folder}"])
    reward = RewardModel(str(folder), max_length=512)
    (pairs,) = tmp_path.glob("lab/posts-0-*/pairs")
    measured = {}
    for split in ("validation", "test"):
        rows = [json.loads(line) for line in (pairs / f"{split}.jsonl").read_text().splitlines()]
        prompts, finished = [row["prompt"] for row in rows], [True] * len(rows)
        chosen, rejected = (
            torch.tensor(reward(prompts, [row[side] for row in rows], finished)) for side in ("chosen", "rejected")
        )
        gold = torch.tensor([row["chosen_gold"] - row["rejected_gold"] for row in rows])
        accuracies = [((x > 0).float() + (x == 0).float() / 2).mean().item() for x in (chosen - rejected, gold)]
        correlation = torch.corrcoef(torch.stack([chosen - rejected, gold]))[0, 1].item()
        measured[split] = accuracies[0], correlation
        assert accuracies[1] == pytest.approx({"validation": 0.813, "test": 0.834}[split], abs=1e-3)
    # Processors round differently, and training ends as far apart on two of them as with two seeds.
    for accuracy, correlation in measured.values():
        assert accuracy == pytest.approx(0.66, abs=0.06)
        assert correlation == pytest.approx(0.42, abs=0.06)


def test_the_former_name_of_the_model_option_still_works(
    run: Path, options: list[str], model_dir: str, tmp_path: Path
) -> None:
    config = (run / "config.yaml").read_text()
    assert "  policy:\n" in config
    former = config.replace("    backbone: null\n", "").replace("    policy:\n", "    backbone:\n")
    (tmp_path / "former.yaml").write_text(former)
    last = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    again = fit([f"--config={tmp_path / 'former.yaml'}", last, "--trainer.max_steps=7"], tmp_path / "resumed")
    assert set(read_metrics(again)["train/loss"]) == {6}
    others = [option for option in options if "policy.path" not in option]
    straight = fit([*others, f"--model.backbone.path={model_dir}"], tmp_path / "straight")
    assert read_metrics(straight)["train/loss"] == read_metrics(run)["train/loss"]
