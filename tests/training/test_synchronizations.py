"""How often a step makes the host wait for its device: a GPU below a billion parameters waits for launches otherwise.

On a CPU nothing waits, but the operations that would are the same: reading a number, and picking elements by a mask.
"""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from lit_isdpo.cli import main
from lit_isdpo.training.run_report import ProgressBar
from tests.runs import newest_run, read_metrics

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount")
"""What reads values on the host: ``.item()``, ``bool()``, a boolean index, and results whose size depends on values."""
SEEN: dict[int, list[int]] = {}  # optimizer step -> reads of each of its micro-batches


class CountReads(Callback):
    """Counts ``READS`` of each micro-batch, the optimizer's step included."""

    def __init__(self) -> None:
        SEEN.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        self.profile = profile(acc_events=True, activities=[ProfilerActivity.CPU])
        self.profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.profile.stop()
        number = sum(event.name in READS for event in self.profile.events())
        SEEN.setdefault(self.step, []).append(number)


SFT = ["--model=SFTModule", "--data=SFTDataModule"]
KINDS: dict[str, tuple[list[str], int]] = {  # options, and reads of a micro-batch
    "is_dpo": (["--model=PreferenceModule"], 0),
    "wpo": (["--model=PreferenceModule", "--model.weighting=WPOWeighting"], 0),
    "cached": (["--model=PreferenceModule", "--model.reference.cache=true"], 0),
    # In rows of one sequence transformers itself looks once per forward whether several are packed in it.
    "plain rows": (["--model=PreferenceModule", "--model.prefix_sharing=false"], 2),
    "sft": (SFT, 1),
}
OF_GUARD = 2  # are the losses finite, and is the gradient?


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The number of training batches")  # steps that log read what they log
def test_a_step_waits_twice_for_its_guard_and_no_micro_batch_waits(kind: str, tiny: list[str], tmp_path: Path) -> None:
    method, in_forwards = KINDS[kind]
    options = [option for option in tiny if not option.startswith("--model.optimizer")]
    options += [
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=1e-3",
    ]  # AdamW counts on the host
    options += ["--data.micro_batch_size=2", "--trainer.log_every_n_steps=100", "--trainer.limit_val_batches=0"]
    options += ["--trainer.max_steps=3", "--trainer.gradient_clip_val=1", "--checkpoint.monitor=null"]
    options += [f"--trainer.callbacks={CountReads.__module__}.CountReads", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *method, *options])
    assert list(SEEN) == [0, 1, 2]
    for step in (1, 2):  # the first one is also compared with its reference
        assert SEEN[step] == [in_forwards, in_forwards, in_forwards, in_forwards + OF_GUARD]


class ReadBar(Callback):
    """Reads what stands behind the progress bar after each micro-batch."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = trainer.progress_bar_callback
        assert isinstance(bar, ProgressBar)
        self.seen.append(bar.get_metrics(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = trainer.progress_bar_callback
        assert isinstance(bar, ProgressBar)
        self.seen.append(bar.get_metrics(trainer, pl_module))


def test_what_stands_behind_the_bar_is_read_rarely_and_ends_with_the_last_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_isdpo.training.run_report.SECONDS_BETWEEN_VALUES", 1e6)
    options = [option for option in tiny if not option.startswith("--trainer.enable_progress_bar")]
    options += [f"--trainer.callbacks={ReadBar.__module__}.ReadBar", f"--trainer.default_root_dir={tmp_path}"]
    ReadBar.seen.clear()
    main(["fit", "--model=PreferenceModule", *options, "--trainer.max_epochs=1"])
    logged = read_metrics(newest_run(tmp_path))
    keys = {"loss": "train/loss", "accuracy": "train/rewards/accuracies", "weight": "train/weights/mean"}
    first, *others = ReadBar.seen
    assert first == pytest.approx({name: logged[key][0] for name, key in keys.items()}, rel=1e-5)
    assert others[:-1] == [first] * 3
    assert others[-1] == pytest.approx({name: logged[key][3] for name, key in keys.items()}, rel=1e-5)


@pytest.mark.parametrize("kind", ["is_dpo", "sft"])
def test_a_fit_can_be_asked_for_deterministic_kernels(kind: str, tiny: list[str], tmp_path: Path) -> None:
    """Every operation of a step has one."""
    options = [*KINDS[kind][0], *tiny, "--trainer.deterministic=true", "--trainer.max_steps=2"]
    try:
        main(["fit", *options, f"--trainer.default_root_dir={tmp_path}"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(read_metrics(newest_run(tmp_path))["train/loss"]) == 2
