"""A fit starts from the weights of its model; what is random is announced, and never random by surprise."""

import shutil
from pathlib import Path

import pytest
import yaml

from lit_isdpo.cli import main
from tests.runs import newest_run, read_metrics
from tests.test_cli import CONFIGS

SFT = ["--model=SFTModule", "--data=SFTDataModule"]
RANDOM = "random weights"
NEW_HEAD = "a random head"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> object:
    """Runs a command, and gives what it said."""

    def said(verb: str, *options: str) -> str:
        caplog.clear()
        main([verb, *options, f"--trainer.default_root_dir={tmp_path}"])
        return caplog.text

    return said


def test_only_the_rebuild_of_the_labs_references_draws_weights() -> None:
    def policy(config: Path) -> dict[str, object]:
        model = yaml.safe_load(config.read_text()).get("model", {})
        given: dict[str, object] = model.get("init_args", {}).get("policy", {})
        return given

    drawn = [config for config in CONFIGS.rglob("*.yaml") if policy(config).get("init") == "random"]
    assert drawn == [CONFIGS / "lab" / "reference.yaml"]


def test_fine_tuning_starts_from_the_users_weights(said: object, tiny: list[str], tmp_path: Path) -> None:
    assert callable(said)
    losses = []
    for file in ([], [f"--config={CONFIGS / 'sft.yaml'}", "--model.policy.compute_dtype=float32"]):
        assert RANDOM not in said("validate", *SFT, *file, *tiny)
        losses.append(read_metrics(newest_run(tmp_path))["val/loss"][0])
    assert losses[0] == losses[1]


def test_random_weights_are_announced(said: object, tiny: list[str], model_dir: str, tmp_path: Path) -> None:
    assert callable(said)
    options = [*SFT, *tiny, "--model.policy.init=random", "--probe.num_prompts=0"]
    fresh = said("fit", *options, "--trainer.max_steps=1")
    assert fresh.count(RANDOM) == 1
    assert f"{model_dir!r} gives only its architecture" in fresh
    last = f"--ckpt_path={newest_run(tmp_path) / 'checkpoints' / 'last.ckpt'}"
    assert RANDOM not in said("fit", *options, "--trainer.max_steps=2", last), "they are the checkpoint's"
    assert said("validate", *options).count(RANDOM) == 1


def test_a_new_head_is_announced(said: object, tiny: list[str], model_dir: str, tmp_path: Path) -> None:
    assert callable(said)
    options = ["--model=RewardModule", *tiny[1:]]
    fresh = said("fit", *options, f"--model.policy.path={model_dir}", "--trainer.max_steps=1")
    assert f"starts with a random head: {model_dir!r} is a language model" in fresh
    last = f"--ckpt_path={newest_run(tmp_path) / 'checkpoints' / 'last.ckpt'}"
    assert NEW_HEAD not in said("validate", *options, f"--model.policy.path={model_dir}", last)
    main(["export", last, f"--output_dir={tmp_path / 'scores'}"])
    assert NEW_HEAD not in said("validate", *options, f"--model.policy.path={tmp_path / 'scores'}")


@pytest.mark.parametrize(
    ("module", "option"),
    [("Preference", "policy"), ("Preference", "reference"), ("Reward", "policy")],
)
def test_a_folder_without_weights_is_refused(
    module: str, option: str, tiny: list[str], model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    options = ["--model=RewardModule", *tiny[1:]] if module == "Reward" else tiny
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *options, f"--model.{option}.path={folder}", "--trainer.max_steps=1"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"error: model.{option}.path: the folder {str(folder)!r} holds no loadable Hugging Face model: it has a "
        "configuration and no weights."
    )
