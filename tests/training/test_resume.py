"""Stop and go on: N steps are k steps, a checkpoint and N - k steps, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_isdpo.cli import main
from lit_isdpo.training.checkpoints import _put_in_place
from tests.runs import newest_run, read_metrics

NUM_STEPS = 10  # of 4 to an epoch


class StopAt(Callback):
    """Ends a fit at an optimizer step without changing its ``max_steps``, which a schedule looks at."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def fit(root: Path, arguments: list[str]) -> Path:
    """Runs a fit and returns its newest run's folder."""
    main(["fit", *arguments, f"--trainer.default_root_dir={root}"])
    return newest_run(root)


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, optimizer, schedule and window of the metrics are equal to the bit."""
    a, b = checkpoint(run), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "recent_log_weights"):
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)


def assert_same_log(straight: Path, resumed: Path, since: int) -> None:
    """From step ``since`` on, every training value of the resumed run is the unbroken run's."""
    a, b = read_metrics(straight), read_metrics(resumed)
    for key, values in a.items():
        if key.startswith("train/"):
            assert {s: v for s, v in values.items() if s >= since} == b[key], key


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    return [*tiny, "--model.schedule.warmup_steps=5", "--probe.num_prompts=0", "--data.micro_batch_size=4"]


@pytest.fixture(scope="module")
def straight(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("straight"), [*options, f"--trainer.max_steps={NUM_STEPS}"])


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])  # first step, mid-epoch, epoch's end, mid-epoch 1, its end
def test_resume_is_bit_for_bit(stop: int, straight: Path, options: list[str], tmp_path: Path) -> None:
    stopped = fit(tmp_path, [*options, f"--trainer.max_steps={stop}"])
    last = stopped / "checkpoints" / "last.ckpt"
    assert checkpoint(stopped)["global_step"] == stop
    resumed = fit(tmp_path, [*options, f"--trainer.max_steps={NUM_STEPS}", f"--ckpt_path={last}"])
    assert_same_end(straight, resumed)
    assert_same_log(straight, resumed, since=stop)


@pytest.mark.parametrize("stop", [3, 4])  # mid-epoch, its end
def test_other_micro_batches_make_whole_steps(stop: int, straight: Path, options: list[str], tmp_path: Path) -> None:
    """Two to a step before, four after: the same steps, to rounding."""
    stopped = fit(tmp_path, [*options, f"--trainer.max_steps={stop}"])
    last = stopped / "checkpoints" / "last.ckpt"
    smaller = ["--data.micro_batch_size=2", f"--trainer.max_steps={NUM_STEPS}", f"--ckpt_path={last}"]
    resumed = fit(tmp_path, [*options, *smaller])
    losses, expected = (read_metrics(run)["train/loss"] for run in (resumed, straight))
    assert losses == pytest.approx({step: loss for step, loss in expected.items() if step >= stop}, abs=1e-5)
    for name, value in checkpoint(straight)["state_dict"].items():
        torch.testing.assert_close(checkpoint(resumed)["state_dict"][name], value, atol=1e-5, rtol=0, msg=name)


def test_more_epochs(options: list[str], tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight", [*options, "--trainer.max_epochs=3"])
    one = fit(tmp_path / "parts", [*options, "--trainer.max_epochs=1"])
    resumed = fit(
        tmp_path / "parts", [*options, "--trainer.max_epochs=3", f"--ckpt_path={one / 'checkpoints' / 'last.ckpt'}"]
    )
    assert checkpoint(resumed)["global_step"] == 12
    assert_same_end(straight, resumed)
    assert_same_log(straight, resumed, since=4)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_best_checkpoint_resumes_too(workers: int, options: list[str], tmp_path: Path) -> None:
    """It is saved inside a validation, here in the middle of an epoch (after 2 of 4 steps, in micro-batches: 4)."""
    options = [*options, "--trainer.max_epochs=2", "--trainer.val_check_interval=4", f"--data.num_workers={workers}"]
    best = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=min", "--checkpoint.save_top_k=-1"]
    straight = fit(tmp_path / "straight", [*options, *best])
    saved = sorted((straight / "checkpoints").glob("best-*.ckpt"))
    assert [path.name for path in saved] == ["best-2.ckpt", "best-4.ckpt", "best-6.ckpt", "best-8.ckpt"]
    for path in saved[:3]:
        resumed = fit(tmp_path / "parts", [*options, *best, f"--ckpt_path={path}"])
        assert_same_end(straight, resumed)


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="ctrl-c"),
        pytest.param(signal.SIGTERM, 75, id="pre-emption", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_fit_goes_on(signum: int, status: int, options: list[str], tmp_path: Path) -> None:
    """A real process, a real signal, at a moment of its own choosing, under a schedule that decays."""
    options = [*options, "--trainer.max_epochs=100", "--model.schedule.decay=cosine"]
    command = [sys.executable, "-m", "lit_isdpo", "fit", *options, f"--trainer.default_root_dir={tmp_path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: another order of sums is another rounding
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "version_0" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    assert f"Continue with --ckpt_path {last}" in output
    stop = checkpoint(tmp_path / "version_0")["global_step"]
    ahead = stop + 7
    resumed = fit(
        tmp_path,
        [
            *options,
            f"--ckpt_path={last}",
            "--trainer.callbacks+=tests.training.test_resume.StopAt",
            f"--trainer.callbacks.step={ahead}",
        ],
    )
    straight = fit(
        tmp_path / "straight",
        [*options, "--trainer.callbacks+=tests.training.test_resume.StopAt", f"--trainer.callbacks.step={ahead}"],
    )
    assert_same_end(straight, resumed)
    assert_same_log(straight, resumed, since=stop)


def test_a_fit_that_fails_gives_ctrl_c_back(tiny: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    fails = ["--data.packing_length=64", "--model.policy.attn_implementation=flex_attention"]
    with pytest.raises(SystemExit):  # found out when the loader is made, within the fit
        main(["fit", *tiny, *fails, "--model.prefix_sharing=false", f"--trainer.default_root_dir={tmp_path}"])
    assert signal.getsignal(signal.SIGINT) == before


def test_a_folder_takes_the_place_of_another_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(text: str, name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(text)
        return tmp_path / name

    path = tmp_path / "last.ckpt"
    _put_in_place(written("first", "last-1-a"), path)
    _put_in_place(written("second", "last-1-b"), path)  # the same step, once more
    assert (path / "content").read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 2, "the link and its folder"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):  # just before the new one counts
        _put_in_place(written("third", "last-2"), path)
    assert (path / "content").read_text() == "second"
    monkeypatch.undo()
    _put_in_place(written("fourth", "last-3"), path)
    assert (path / "content").read_text() == "fourth"
    assert len(list(tmp_path.iterdir())) == 2, "nothing is left of the third"


def test_files_of_the_user_beside_the_last_checkpoint_stay(tmp_path: Path) -> None:
    own = ["last-keep.ckpt", "last-v1.ckpt", "last-5.ckpt"]
    for name in [*own, "last-4-00c0ffee", "last-6-0123abcd"]:
        (tmp_path / name).write_text(name)
    _put_in_place(tmp_path / "last-6-0123abcd", tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*own, "last.ckpt"])
