"""An optimizer step is made of all its micro-batches, whatever ends an epoch or a fit."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_isdpo.cli import main
from tests.ranks import DDP, run_on_ranks
from tests.runs import newest_run, read_metrics
from tests.training.test_resume import assert_same_end, assert_same_log, checkpoint, fit

MICRO_BATCHES = 4  # of a step; an epoch has 4 steps
SHORT = ["--model.schedule.decay=linear", "--trainer.max_epochs=2"]


class Counter(Callback):
    """Notes how many micro-batches each optimizer step had, and how many waited for theirs at each validation."""

    sizes: list[int]
    waiting: list[int]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        Counter.sizes, Counter.waiting, self.number = [], [], 0

    def on_validation_start(self, *_: Any) -> None:
        Counter.waiting.append(self.number)

    def on_train_batch_start(self, *_: Any) -> None:
        self.number += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        Counter.sizes.append(self.number)
        self.number = 0


class AsksInBetween(Counter):
    """Asks for the end of the fit in the middle of a step, as ``max_time`` does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or (trainer.global_step == 5 and self.number == 1)


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    return [*tiny, "--probe.num_prompts=0", "--data.micro_batch_size=2", *counted(Counter)]


def counted(callback: type[Callback]) -> list[str]:
    return [f"--trainer.callbacks={callback.__module__}.{callback.__name__}"]


@pytest.mark.parametrize(
    ("limit", "steps", "said"),
    [
        (["--trainer.limit_train_batches=3"], 1, "limited to 1 optimizer step(s) of 4 micro-batches, and not to 3"),
        (["--trainer.limit_train_batches=9"], 3, "and not to 9 micro-batches, which would cut the last step"),
        (["--trainer.limit_train_batches=0.3"], 1, None),  # 4 micro-batches
        (["--trainer.limit_train_batches=0.01"], 1, "and not to 0 micro-batches"),
        (["--trainer.limit_train_batches=99"], 4, None),
        (["--trainer.limit_train_batches=8"], 2, None),
        (["--trainer.overfit_batches=5"], 2, "and not to 5"),
    ],
)
def test_limits_are_whole_steps(
    limit: list[str], steps: int, said: str | None, options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fit(tmp_path, [*options, *SHORT, *limit])
    assert Counter.sizes == [MICRO_BATCHES] * 2 * steps
    assert checkpoint(run)["global_step"] == 2 * steps
    assert read_metrics(run)["train/lr"][2 * steps - 1] == pytest.approx(1e-4), "the end of the schedule"
    printed = [message for message in caplog.messages if message.startswith("An epoch is limited to")]
    assert len(printed) == (said is not None)
    assert all(str(said) in message for message in printed)


def test_a_fast_run_makes_whole_steps(options: list[str], tmp_path: Path) -> None:
    fast = ["--trainer.fast_dev_run=true", "--trainer.max_epochs=3"]
    main(["fit", *options, *fast, f"--trainer.default_root_dir={tmp_path}"])
    assert Counter.sizes == [MICRO_BATCHES]


def test_a_fit_that_is_asked_to_stop_ends_its_step(options: list[str], tmp_path: Path) -> None:
    options = [*options, "--trainer.max_epochs=2"]
    straight = fit(tmp_path / "straight", options)
    part = fit(tmp_path / "parts", [*options, *counted(AsksInBetween)])
    assert Counter.sizes == [MICRO_BATCHES] * 6
    assert checkpoint(part)["global_step"] == 6
    resumed = fit(tmp_path / "parts", [*options, f"--ckpt_path={part / 'checkpoints' / 'last.ckpt'}"])
    assert Counter.sizes == [MICRO_BATCHES] * 2
    assert_same_end(straight, resumed)
    assert_same_log(straight, resumed, since=6)


def test_validations_by_the_clock_come_between_steps(options: list[str], tmp_path: Path) -> None:
    """Due at every micro-batch; the checkpoints that they save go on bit for bit."""
    options = [*options, "--trainer.max_epochs=1"]
    best = ["--checkpoint.monitor=val/loss", "--checkpoint.save_top_k=-1", "--trainer.val_check_interval=00:00:00:00"]
    straight = fit(tmp_path / "straight", [*options, *best])
    assert Counter.waiting == [0] * 5, "before the first step, and after each of four"
    saved = sorted((straight / "checkpoints").glob("best-*.ckpt"))
    assert [path.name for path in saved] == [f"best-{step}.ckpt" for step in range(1, 5)]
    resumed = fit(tmp_path / "parts", [*options, *best, f"--ckpt_path={saved[1]}"])
    assert Counter.sizes == [MICRO_BATCHES] * 2
    assert_same_end(straight, resumed)


class SavesInBetween(Counter):
    """Saves in the middle of the first step and in the middle of the third."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in (0, 2) and self.number == 2:
            trainer.save_checkpoint(Path(trainer.log_dir) / f"{trainer.global_step}.ckpt")


def test_a_checkpoint_of_a_part_of_a_step_goes_on_at_its_beginning(options: list[str], tmp_path: Path) -> None:
    options = [*options, "--trainer.max_epochs=2"]
    straight = fit(tmp_path / "straight", [*options, *counted(SavesInBetween)])
    for step in (0, 2):
        resumed = fit(tmp_path / "parts", [*options, f"--ckpt_path={straight / f'{step}.ckpt'}"])
        assert Counter.sizes == [MICRO_BATCHES] * (8 - step)
        a, b = checkpoint(straight), checkpoint(resumed)
        assert a["global_step"] == b["global_step"] == 8
        assert all(value.equal(b["state_dict"][name]) for name, value in a["state_dict"].items()), step


def test_overfitting_reads_the_same_rows_again(options: list[str], tmp_path: Path) -> None:
    run = fit(
        tmp_path, [*options, "--trainer.overfit_batches=4", "--trainer.max_epochs=30", "--model.optimizer.lr=1e-2"]
    )
    losses = read_metrics(run)["train/loss"]
    assert losses[29] < 0.2 * losses[0], "8 rows are soon known by heart"


@pytest.mark.slow
def test_two_ranks_overfit_as_one(options: list[str], tmp_path: Path) -> None:
    options = [*options, "--trainer.overfit_batches=3", "--trainer.max_epochs=3"]
    fit(tmp_path / "one", [*options, "--data.micro_batch_size=4"])
    target = f"--trainer.default_root_dir={tmp_path / 'two'}"
    run_on_ranks([["fit", *options, *DDP, target]])
    one, two = (read_metrics(newest_run(tmp_path / name)) for name in ("one", "two"))
    assert len(one["train/loss"]) == 6
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
