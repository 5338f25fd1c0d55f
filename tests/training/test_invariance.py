"""The global batch is what the config says, however it is cut: 8 x 1 is 1 x 8, and two ranks are one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_isdpo.cli import main
from tests.ranks import DDP, run_on_ranks
from tests.runs import read_metrics

STEPS = ["--trainer.max_steps=5", "--trainer.gradient_clip_val=1.0"]


def end_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_alike(run: Path, other: Path, *, tolerance: float) -> None:
    """Weights and every logged value but the rates are equal up to rounding."""
    a, b = end_of(run)["state_dict"], end_of(other)["state_dict"]
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    logged, other_logged = read_metrics(run), read_metrics(other)
    for key, values in logged.items():
        if key.startswith(("train/", "val/")) and not key.startswith(("val/kl", "val/response", "val/finished")):
            assert values.keys() == other_logged[key].keys(), key
            assert list(values.values()) == pytest.approx(list(other_logged[key].values()), abs=1e-4, rel=1e-4), key


@pytest.mark.parametrize("module", ["preference", "sft"])
def test_micro_batches(module: str, tiny: list[str], tmp_path: Path) -> None:
    options = [*tiny, *STEPS]
    if module == "sft":
        options = ["--model=SFTModule", "--data=SFTDataModule", *options]
    runs = []
    for size in (8, 4, 1):
        root = tmp_path / str(size)
        main(["fit", *options, f"--data.micro_batch_size={size}", f"--trainer.default_root_dir={root}"])
        runs.append(root / "version_0")
    for run in runs[1:]:
        assert_alike(runs[0], run, tolerance=1e-5)


def test_evaluation_batches_of_any_size_log_the_same(tiny: list[str], tmp_path: Path) -> None:
    """8 validation pairs in batches of 3: the last one is short."""
    for size in (8, 3):
        main(
            ["validate", *tiny, f"--data.eval_batch_size={size}", f"--trainer.default_root_dir={tmp_path / str(size)}"]
        )
    one, other = (read_metrics(tmp_path / str(size) / "version_0") for size in (8, 3))
    for key, values in one.items():
        assert list(values.values()) == pytest.approx(list(other[key].values()), abs=1e-5), key


def one_rank_is_two(options: list[str], folder: Path) -> None:
    """A fit in this process, and the same over gloo with two, in ``one`` and ``two`` of the folder."""
    main(["fit", *options, f"--trainer.default_root_dir={folder / 'one'}"])
    run_on_ranks([["fit", *options, f"--trainer.default_root_dir={folder / 'two'}", *DDP]])
    assert_alike(folder / "one" / "version_0", folder / "two" / "version_0", tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["preference", "sft"])
def test_two_ranks_are_one(module: str, tiny: list[str], tmp_path: Path) -> None:
    """DDP over gloo, with accumulation, on 7 validation pairs, so that one rank's last batch is filled up."""
    options = [*tiny, *STEPS, "--data.val_size=7", "--data.micro_batch_size=2"]
    if module == "sft":
        options = ["--model=SFTModule", "--data=SFTDataModule", *options]
    one_rank_is_two(options, tmp_path)
    if module == "preference":
        window = end_of(tmp_path / "two" / "version_0")["recent_log_weights"]
        assert len(window) == len(end_of(tmp_path / "one" / "version_0")["recent_log_weights"])
