"""A NaN in a loss or a gradient: nothing of it reaches the weights, and the fit stops or skips as it was told."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.ranks import DDP, run_on_ranks
from tests.runs import newest_run, read_metrics
from tests.training.test_resume import assert_same_end, assert_same_log, checkpoint, fit

NUM_STEPS = 10  # of 4 to an epoch, of two micro-batches each


class Poison(Callback):
    """Makes NaN of the loss of one row, or of the gradient, at some optimizer steps, on the last rank alone."""

    def __init__(self, what: str, steps: list[int]) -> None:
        self.what = what
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.what == "loss" and trainer.global_step in self.steps and trainer.is_last_rank:
            if hasattr(batch, "pair_weights"):
                batch.pair_weights[1] = torch.nan
            else:  # a demonstration has no weight
                module.policy.model.get_input_embeddings().weight.data[0, 0] = torch.inf

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        if self.what == "gradient" and trainer.global_step in self.steps:
            next(module.parameters()).grad[0, 0] = torch.inf


Trainer.is_last_rank = property(lambda self: self.global_rank == self.world_size - 1)  # type: ignore[attr-defined]


def poison(what: str, *steps: int) -> list[str]:
    return [
        "--trainer.callbacks+=tests.training.test_nonfinite.Poison",
        f"--trainer.callbacks.what={what}",
        f"--trainer.callbacks.steps={list(steps)}",
    ]


SKIP = "--model.nonfinite.action=skip"


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    return [
        *tiny,
        "--probe.num_prompts=0",
        "--data.micro_batch_size=4",
        "--model.schedule.warmup_steps=5",
        f"--trainer.max_steps={NUM_STEPS}",
    ]


@pytest.fixture(scope="module")
def straight(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("straight"), options)


@pytest.mark.parametrize(
    ("what", "step"),
    [
        ("loss", 6),
        pytest.param("loss", 4, marks=pytest.mark.slow),  # the first of an epoch
        pytest.param("gradient", 5, marks=pytest.mark.slow),
    ],
)
def test_a_fit_stops_before_the_step_and_goes_on_from_there(
    what: str, step: int, straight: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, [*options, *poison(what, step)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"error: The {what} is NaN or infinite at optimizer step {step}" in said
    assert said.count("row ") == (2 if what == "loss" else 8)  # one of each micro-batch, or all
    assert "--model.nonfinite.action skip" in said
    stopped = newest_run(tmp_path)
    assert checkpoint(stopped)["global_step"] == step
    resumed = fit(tmp_path, [*options, f"--ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"])
    assert_same_end(straight, resumed)
    assert_same_log(straight, resumed, since=step)


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_skipped_step_leaves_everything_as_it_was(
    what: str, straight: Path, options: list[str], tmp_path: Path
) -> None:
    run = fit(tmp_path, [*options, SKIP, *poison(what, 9)])
    before = fit(tmp_path / "before", [*options, "--trainer.max_steps=9"])
    ours, expected = checkpoint(run), checkpoint(before)
    assert ours["global_step"] == 10
    for key in ("state_dict", "optimizer_states"):
        learned = ours[key] if key == "state_dict" else ours[key][0]["state"]
        same = expected[key] if key == "state_dict" else expected[key][0]["state"]
        torch.testing.assert_close(learned, same, atol=0, rtol=0)
    torch.testing.assert_close(ours["recent_log_weights"], expected["recent_log_weights"], atol=0, rtol=0)
    logged = read_metrics(run)
    assert logged["train/skipped_steps"] == {step: float(step == 9) for step in range(10)}
    assert not math.isfinite(logged["train/grad_norm"].pop(9))
    losses, unbroken = logged["train/loss"], read_metrics(straight)["train/loss"]
    assert math.isnan(losses.pop(9)) if what == "loss" else losses.pop(9) == unbroken[9]
    del unbroken[9]
    assert losses == unbroken


@pytest.mark.slow
def test_resume_is_bit_for_bit_across_skipped_steps(options: list[str], tmp_path: Path) -> None:
    options = [*options, SKIP, *poison("loss", 2, 3, 7)]
    unbroken = fit(tmp_path / "unbroken", options)
    stopped = fit(tmp_path, [*options, "--trainer.max_steps=4"])
    resumed = fit(tmp_path, [*options, f"--ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"])
    assert_same_end(unbroken, resumed)
    a, b = read_metrics(unbroken), read_metrics(resumed)
    for key in (key for key in a if key.startswith("train/")):
        assert str({step: value for step, value in a[key].items() if step >= 4}) == str(b[key]), key  # NaN is not NaN
    assert read_metrics(resumed)["train/skipped_steps"][9] == 3


def test_nothing_but_skipped_steps_is_no_training(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, [*options, SKIP, "--model.nonfinite.max_in_a_row=2", *poison("loss", 1, 3, 4, 6, 7, 8)])
    said = capsys.readouterr().err
    assert "optimizer step 8 for row" in said
    assert "after 2 skipped steps in a row, which is model.nonfinite.max_in_a_row" in said
    saved = checkpoint(newest_run(tmp_path))
    assert (saved["global_step"], saved["skipped_steps"]) == (8, {"num_skipped": 5, "in_a_row": 2})


@pytest.mark.slow
@pytest.mark.parametrize("module", ["RewardModule", "SFTModule"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_every_module_has_the_choice(
    module: str, what: str, model_dir: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data=SFTDataModule"] if module == "SFTModule" else []
    options = [f"--model={module}", *data, *tiny, "--probe.num_prompts=0"]
    options += ["--trainer.max_steps=2", *poison(what, 1)]
    with pytest.raises(SystemExit):
        fit(tmp_path, options)
    assert f"The {what} is NaN or infinite at optimizer step 1" in capsys.readouterr().err
    assert checkpoint(newest_run(tmp_path))["global_step"] == 1
    if what == "gradient" or module == "RewardModule":
        run = fit(tmp_path, [*options, SKIP])
        assert read_metrics(run)["train/skipped_steps"] == {0: 0, 1: 1}
        assert all(value.isfinite().all() for value in checkpoint(run)["state_dict"].values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_skip_together(strategy: str, options: list[str], tmp_path: Path) -> None:
    """The NaN is on the second rank alone."""
    options = [*options, *DDP[:1], f"--trainer.strategy={strategy}", f"--trainer.default_root_dir={tmp_path}"]
    printed = run_on_ranks([["fit", *options, SKIP, *poison("loss", 3)]])
    assert "The loss is NaN or infinite at optimizer step 3 for row " in printed
    logged = read_metrics(newest_run(tmp_path))
    assert logged["train/skipped_steps"][9] == 1
    assert [step for step, loss in logged["train/loss"].items() if math.isnan(loss)] == [3]
