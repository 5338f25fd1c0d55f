"""What is said of a mistake names the option and what it takes, and suggests what may have been meant."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lit_isdpo.cli import main
from lit_isdpo.cli.parser_errors import explain_option


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--trainer.max_epochs two", "--trainer.max_epochs: 'two' is not an integer or null"),
        ("--trainer.max_epochs=", "--trainer.max_epochs: '' is not an integer or null"),
        ("--data.batch_size=[8]", "--data.batch_size: '[8]' is not an integer"),
        ("--data.val_size some", "--data.val_size: 'some' is not a number"),
        ("--model.loss.beta one", "--model.loss.beta: 'one' is not a number"),
        ("--trainer.fast_dev_run maybe", "--trainer.fast_dev_run: 'maybe' is not an integer, true or false"),
        ("--data.columns prompt", "--data.columns: 'prompt' is not a mapping of names to values or null"),
        (
            "--data.truncation_mode keep_ends",
            "--data.truncation_mode: 'keep_ends' is not 'keep_end', 'keep_start' or 'drop'; did you mean keep_end?",
        ),
        ("--model.loss.beta", "--model.loss.beta: a value is missing"),
        ("--model.loss.betta 0.1", "--model.loss.betta: there is no such option; did you mean --model.loss.beta?"),
        (
            "--model.loss=IPOLoss --model.loss.logratios sum",
            "--model.loss.logratios: there is no such option; did you mean --model.loss.logratio?",
        ),
        ("--data.tran x", "--data.tran: there is no such option; did you mean --data.train?"),
        ("--beta 0.1", "--beta: there is no such option; did you mean --model.loss.beta?"),
        ("--lr 0.1", "--lr: there is no such option; did you mean --model.optimizer.lr?"),
        ("--max_steps 3", "--max_steps: there is no such option; did you mean --trainer.max_steps?"),
        (
            "--batch_size 3",
            "--batch_size: there is no such option; did you mean --data.batch_size, --probe.batch_size or "
            "--evaluation.batch_size?",
        ),
        (
            "--model RewardModule --centring 1",
            "--centring: there is no such option; did you mean --model.centering?",
        ),
        ("--model.polcy.path x", "--model.polcy.path: there is no such option; did you mean --model.policy.path?"),
        (
            "--model RewardModul",
            "--model: 'RewardModul' is no file and no class; known are OnlineModule, PreferenceModule, RewardModule, "
            "SFTModule; did you mean RewardModule?",
        ),
        ("--model=torch.nn.Linear", "--model: 'torch.nn.Linear' is a class of another kind; known are "),
        (
            "--model=nowhere.Module",
            "--model: 'nowhere.Module' is no file and no class (No module named 'nowhere'); known",
        ),
        (
            "--evaluation.reward Nope",
            "--evaluation.reward: 'Nope' is no file and no class; known are LabReward, RewardModel",
        ),
        ("--trainer.callbacks EarlyStoping", "no file and no class; did you mean EarlyStopping?"),
        ("--model.optimizer AdamWW", "--model.optimizer: 'AdamWW' is no file and no class; did you mean AdamW?"),
        (
            "--model.schedule cosine",
            "--model.schedule: 'cosine' is no config file; it has options of its own: model.schedule.decay, ",
        ),
        ("--model OnlineModule", "model.reward is missing, and has no default; it takes LabReward or RewardModel"),
        ("--config .", "--config: '.' is a folder; name a file in it."),
        ("--ckpt_path=", "ckpt_path is empty"),
        ("--trainer.barebones=true", "trainer.barebones is not supported"),
        ("--trainer.default_root_dir=/dev/null", "trainer.default_root_dir: '/dev/null' is a file"),
        ("--trainer.logger WandbLogger", "A package is not installed: Requirement 'wandb"),
        ("--trainer.logger MLFlowLogger", "A package is not installed: Requirement 'mlflow"),
    ],
)
def test_flags(
    arguments: str, expected: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    assert expected in said(["fit", *tiny, root, "--trainer.max_steps=1", *arguments.split()], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("fti", "there is no verb 'fti'; the verbs are fit, validate, "),
        ("fti", "; did you mean fit?"),
        ("exprot --ckpt_path x", "; did you mean export?"),
        (
            "fit --model.optimizer.lr 1",
            "--model.optimizer.lr: name the class first, as in --model.optimizer torch.optim.AdamW",
        ),
        (
            "fit --trainer.strategy fsdp2 --trainer.strategy.cpu_offload true",
            "--trainer.strategy.cpu_offload: name the class first, as in --trainer.strategy FSDP2Strategy",
        ),
        (
            "fit --trainer.max_steps.x 1",
            "--trainer.max_steps.x: there is no such option; --trainer.max_steps takes a value",
        ),
        ("--trainer.max_steps 3 fit", "the verb comes first, its options behind it: lit-isdpo fit --..."),
        ("", "a verb is missing"),
        ("export", "the following arguments are required: ckpt_path, output_dir"),
        ("export --ckpt x", "--ckpt: there is no such option; did you mean --ckpt_path?"),
    ],
)
def test_verbs(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in said(arguments.split(), capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("trainer:\n  max_steps: many\n", "trainer.max_steps: 'many' is not an integer"),
        ("trainer:\n  max_step: 3\n", "trainer.max_step: there is no such option; did you mean trainer.max_steps?"),
        ("max_steps: 3\n", "max_steps: there is no such option; did you mean trainer.max_steps?"),
        (
            "trainer:\n  callbacks:\n  - class_path: EarlyStoppin\n    init_args: {monitor: x}\n",
            "trainer.callbacks: 'EarlyStoppin' is no file and no class; did you mean EarlyStopping?",
        ),
        ("trainer:\n  logger:\n    init_args: {save_dir: x}\n", "trainer.logger: the class_path is missing beside {"),
        ("trainer: null\n", "trainer is null; leave the section out for its defaults."),
        ("probe: null\n", "probe is null; leave the section out for its defaults."),
        ("model: null\n", "model is missing, and has no default"),
        ("trainer:\n  max_steps: [1\nmodel: x\n", "file.yaml' is not valid YAML: "),
        ("- a\n", "file.yaml' does not map names to values"),
        ("", "file.yaml' does not map names to values"),
        ("\udcff", "file.yaml' is not valid YAML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_config_files(content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.yaml").write_bytes(content.encode(errors="surrogateescape"))
    assert expected in said(["fit", f"--config={tmp_path / 'file.yaml'}"], capsys)


@pytest.mark.parametrize("verb", ["fit", "study"])
def test_a_config_file_of_a_similar_name(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart.yaml").touch()
    missing = tmp_path / "quickstrat.yaml"
    expected = f"--config: no such file: {str(missing)!r}; did you mean {tmp_path / 'quickstart.yaml'}?"
    assert said([verb, "--config", str(missing)], capsys) == expected


def test_what_is_not_known_stays() -> None:
    parser = ArgumentParser()
    assert explain_option("something else", [], parser) == "something else"
    assert explain_option('Parser key "trainer.max_steps": no', ["fit"], parser) == "trainer.max_steps: no"
