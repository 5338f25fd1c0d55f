"""Every number of a config, at its bounds and beyond: it works, or one sentence names the option."""

import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lit_isdpo import cli
from lit_isdpo.cli import main
from lit_isdpo.cli.options import _numbers, check
from lit_isdpo.commands.label import PreferenceLabels
from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.objective import losses, weights
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.training.checkpoints import BestCheckpoint, LastCheckpoint
from lit_isdpo.training.evaluation import Evaluation
from lit_isdpo.training.models import PredictSampling
from lit_isdpo.training.optimizer_step import Schedule
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.probe import SamplingProbe
from lit_isdpo.types import InputError


def subclasses(module: Any, base: type) -> list[type]:
    found = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, base)]
    return [cls for cls in found if not inspect.isabstract(cls)]


LOSSES = subclasses(losses, losses.PreferenceLoss)
WEIGHTINGS = subclasses(weights, weights.PairWeighting)
SECTIONS: dict[str, type] = {
    "trainer": Trainer,
    "model": PreferenceModule,
    "model.policy": PolicyConfig,
    "model.schedule": Schedule,
    "model.sampling": PredictSampling,
    "data": PreferenceDataModule,
    "probe": SamplingProbe,
    "evaluation": Evaluation,
    "labels": PreferenceLabels,
    "checkpoint": BestCheckpoint,
    "last": LastCheckpoint,
}


def numbers_of(cls: type) -> dict[str, set[type]]:
    """The numeric arguments of a class, and of which types they may be."""
    hints = get_type_hints(cls.__init__)
    kinds = {name: {kind for kind in (int, float) if kind in (hint, *get_args(hint))} for name, hint in hints.items()}
    if cls is PreferenceDataModule:
        kinds = {**numbers_of(PreferenceDataModule.__bases__[0]), **kinds}
    return {name: kind for name, kind in kinds.items() if kind}


OPTIONS = {f"{section}.{name}": kind for section, cls in SECTIONS.items() for name, kind in numbers_of(cls).items()}
OPTIONS |= {f"model.optimizer.{name}": {float} for name in ("lr", "eps", "weight_decay")}
METHODS = {
    f"{part} {cls.__name__} {name}": [f"--model.{part}={cls.__name__}", f"--model.{part}.{name}="]
    for part, found in (("loss", LOSSES), ("weighting", WEIGHTINGS))
    for cls in found
    for name in numbers_of(cls)
}
SPAWN = ("trainer.devices", "trainer.num_nodes", "data.num_workers", "data.num_proc")  # many of them are processes
LONG = ("max_steps", "max_epochs", "min_steps", "min_epochs")  # many of them are asked for


def test_the_options_are_found() -> None:
    assert len(OPTIONS) > 50
    assert {"trainer.max_steps", "data.batch_size", "data.val_size", "probe.seed", "model.ess_window"} <= set(OPTIONS)
    assert len(METHODS) > 15
    assert "loss ChiPOLoss reward_bound" in METHODS


CONSTRUCTED = [*LOSSES, *WEIGHTINGS, Schedule, PredictSampling, PreferenceDataModule, SamplingProbe, Evaluation]
CONSTRUCTED += [PreferenceLabels, LastCheckpoint, PolicyConfig]
REQUIRED = {"logratio": "sum"}


@pytest.mark.parametrize("cls", CONSTRUCTED, ids=lambda cls: cls.__name__)
def test_a_class_takes_a_number_or_names_it(cls: type) -> None:
    parameters = inspect.signature(cls).parameters
    needed = {name: value for name, value in REQUIRED.items() if name in parameters}
    for name, kinds in numbers_of(cls).items():
        values = [0, -1, 2**31, -(2**63)] if int in kinds else []
        values += [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e39, 1e308, 5e-324] if float in kinds else []
        for value in values:
            message = refusal(cls, needed | {name: value})
            assert message or not math.isnan(value), f"{name} may be NaN"
            assert name in message or "labels" in message or not message


def refusal(cls: type, arguments: dict[str, Any]) -> str:
    """What a class has against its arguments; empty where it takes them."""
    try:
        cls(**arguments)
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def parsed(tiny: list[str]) -> Namespace:
    """The config of a fit, before it is checked."""
    kept: list[Namespace] = []

    class ParsedError(Exception):
        pass

    def keep(verb: str, config: Namespace) -> None:
        kept.append(config)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "check", keep)
        with pytest.raises(ParsedError):
            main(["fit", *tiny, "--trainer.max_steps=1"])
    return kept[0]


@pytest.mark.parametrize("value", [math.nan, 2**63, -(2**63), 1e39, -1e308], ids=str)
def test_no_option_takes_a_number_that_nothing_can_hold(parsed: Namespace, value: float) -> None:
    check("fit", parsed)
    names = [name for name, _ in _numbers(parsed, "")]
    assert len(names) > 40
    for name in names:
        config = parsed.clone()
        key = re.sub(r"^(model|data)\.", r"\1.init_args.", name)
        key = re.sub(r"\.(loss|weighting|optimizer)\.", r".\1.init_args.", key)
        config[key] = value
        with pytest.raises(InputError, match=f"^{re.escape(name)} is "):
            check("fit", config)


def refused(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a fit is refused; nothing else may be there."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments, f"--trainer.default_root_dir={root}"])
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert end.value.code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.max_steps=-2", "max_steps"),
        ("--trainer.gradient_clip_val=-1", r"trainer\.gradient_clip_val is -1"),
        ("--trainer.gradient_clip_val=.nan", r"trainer\.gradient_clip_val is nan"),
        ("--trainer.val_check_interval=0", r"trainer\.val_check_interval is 0"),
        ("--trainer.val_check_interval=1.5", "val_check_interval"),
        ("--trainer.limit_train_batches=-1", "limit_train_batches"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
        ("--trainer.check_val_every_n_epoch=0", r"trainer\.check_val_every_n_epoch is 0; it must be above 0"),
        ("--trainer.devices=0", "devices"),
        ("--trainer.devices=-5", "devices"),
        ("--trainer.log_every_n_steps=0", r"trainer\.log_every_n_steps is 0"),
        ("--trainer.max_time=soon", "Timer"),
        ("--model.optimizer.lr=-1", r"model\.optimizer: Invalid learning rate"),
        ("--model.optimizer.eps=.inf", r"model\.optimizer\.eps must be finite"),
        ("--model.optimizer.betas=[0.9, 1]", r"model\.optimizer: Invalid beta"),
        ("--model.optimizer.betas=[0.9]", r"betas"),
        ("--model.loss.beta=null", r"loss\.beta: null is not a number"),
        ("--data.batch_size=''", "batch_size"),
        ("--data.batch_size=null", r"data\.batch_size is null"),
        ("--data.max_dropped_fraction=null", r"data\.max_dropped_fraction is null"),
        ("--model.ess_window=null", r"model\.ess_window is null"),
        ("--trainer.devices=9223372036854775808", r"trainer\.devices is 9223372036854775808"),
        ("--trainer.devices=3", "data.batch_size is 8, which 3 ranks do not divide"),
        ("--trainer.max_steps=0", r"trainer\.max_steps is 0: nothing would be trained"),
        ("--trainer.limit_train_batches=0", r"trainer\.limit_train_batches is 0: nothing would be trained"),
    ],
    ids=lambda value: value.removeprefix("--") if value.startswith("--") else "",
)
def test_numbers_are_refused_before_anything_is_written(
    argument: str, message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = [] if "max_steps" in argument else ["--trainer.max_steps=1"]
    assert re.search(message, refused([*tiny, *limit, argument], tmp_path / "runs", capsys))
    assert not (tmp_path / "runs").exists()


def test_weights_that_left_the_finite_numbers(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finite gradient need not leave finite weights; sampling meets them first."""
    decay = ["--model.optimizer.weight_decay=9e18", "--model.decay_norms_and_biases=true"]  # norms would undo the rest
    arguments = [*tiny, "--trainer.max_steps=1", *decay]
    assert "its weights have diverged" in refused(arguments, tmp_path / "runs", capsys)


def test_an_interval_of_validation_beyond_the_epoch(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning finds out when it has counted the batches, and says so by a ValueError."""
    arguments = [*tiny, "--trainer.max_steps=1", "--trainer.val_check_interval=5"]
    assert "`val_check_interval` (5) must be less than" in refused(arguments, tmp_path / "runs", capsys)


VALUES = ["0", "-1", "-0.0", "1", "3", "1.5", "9223372036854775808", "1e308", "1e-320", "1e30"]
VALUES += [".nan", ".inf", "-.inf", "''", "null", "a", "[1]", "true"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a strange number may well be warned of
@settings(
    max_examples=max(30, settings.default.max_examples // 10),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a case is as small as it gets
)
@given(option=st.sampled_from(sorted(OPTIONS) + sorted(METHODS)), value=st.sampled_from(VALUES))
def test_any_number_works_or_gets_a_sentence(
    option: str,
    value: str,
    tiny: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if option in SPAWN and value in ("3", "1e30"):
        return
    if option.rpartition(".")[2] in LONG and value == "1e30":
        return
    root = tmp_path_factory.mktemp("any")
    *others, last = METHODS.get(option, [f"--{option}="])
    needed = ["--model.loss.logratio=sum"] if "IPOLoss" in option else []
    limit = [] if option in ("trainer.max_steps", "trainer.max_epochs") else ["--trainer.max_steps=1"]
    arguments = ["fit", *tiny, "--trainer.max_epochs=1", "--probe.num_prompts=2", *limit]
    capsys.readouterr()
    status = 0
    try:
        main([*arguments, f"--trainer.default_root_dir={root}", *others, *needed, last + value])
    except SystemExit as end:
        status = int(end.code or 0)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status in (0, 2)
    assert len(errors) == (status == 2)
    for checkpoint in root.rglob("last.ckpt"):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())
