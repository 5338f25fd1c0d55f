"""The callbacks that come with a module: one trainer may fit several modules, and one module may fail and go on."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reference import CachedReference
from lit_isdpo.training.comparison import Comparison
from lit_isdpo.training.optimizer_step import NonFinite, NonFiniteError, StepGuard
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.reading import WholeSteps
from lit_isdpo.training.run_report import RunReport
from lit_isdpo.training.sft import SFTModule
from lit_isdpo.types import TokenizedPair

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
KINDS = (WholeSteps, StepGuard, Comparison)
WORDS = ["good", "bad", "fine", "poor", "awful", "great", "fair", "superb"]
ROWS = [{"prompt": f"say {word}", "chosen": f"{word} it is", "rejected": "no"} for word in WORDS]


def pairs() -> PreferenceDataModule:
    return PreferenceDataModule(train=ROWS, val=ROWS[:2], batch_size=2, max_length=64)


class Fault(Callback):
    """Raises once, or makes one loss NaN, before the second optimizer step."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.is_over = False

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and not self.is_over:
            self.is_over = True
            if self.error is not None:
                raise self.error
            batch.pair_weights[0] = torch.nan


def test_a_trainer_has_the_callbacks_of_its_present_module(model_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(max_steps=1, **QUIET)
    for number, module in enumerate([PreferenceModule(PolicyConfig(path=model_dir)) for _ in range(2)], 1):
        trainer.fit_loop.epoch_loop.max_steps = number
        trainer.fit(module, pairs())
        trainer.validate(module, pairs(), verbose=False)
        whole_steps, *others = [each for each in trainer.callbacks if isinstance(each, KINDS)]
        assert isinstance(whole_steps, WholeSteps)
        assert others == [module.guard, module.comparison]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    data = SFTDataModule(train=demonstrations, val=demonstrations[:2], batch_size=2, max_length=64)
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(SFTModule(PolicyConfig(path=model_dir)), data)
    assert trainer.global_step == 3
    assert not any(isinstance(callback, Comparison) for callback in trainer.callbacks), "its reference is let go"
    assert "override" not in caplog.text


def test_a_fit_that_failed_gives_the_trainer_its_limits_back(model_dir: str) -> None:
    module = PreferenceModule(PolicyConfig(path=model_dir))
    trainer = Trainer(max_epochs=2, overfit_batches=1, callbacks=[Fault(RuntimeError("a fault"))], **QUIET)
    with pytest.raises(RuntimeError, match="a fault"):
        trainer.fit(module, pairs())
    assert (trainer.limit_train_batches, trainer.overfit_batches) == (1, 1)
    trainer.fit(module, data := pairs())
    assert data.order.num_repeated == 1
    assert (trainer.limit_train_batches, trainer.overfit_batches) == (1, 1)


def test_a_nan_of_a_fit_that_stopped_is_not_that_of_the_next(model_dir: str) -> None:
    module = PreferenceModule(PolicyConfig(path=model_dir))
    with pytest.raises(NonFiniteError, match="loss is NaN or infinite at optimizer step 1"):
        Trainer(max_steps=3, callbacks=[Fault()], **QUIET).fit(module, pairs())
    trainer = Trainer(max_steps=3, **QUIET)
    trainer.fit(module, pairs())
    assert trainer.global_step == 3


def test_one_skipped_step_skips_no_other_where_the_guard_is_no_callback(model_dir: str) -> None:
    """Tuners put callbacks of their own in the place of all others."""

    class Tuner(Fault):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            trainer.callbacks = [self]  # type: ignore[attr-defined]
            self.weights = [weight_of(module)]

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            self.weights.append(weight_of(module))

    def weight_of(module: LightningModule) -> float:
        return next(module.parameters()).detach().double().sum().item()

    module = PreferenceModule(PolicyConfig(path=model_dir), nonfinite=NonFinite(action="skip"))
    Trainer(max_steps=4, callbacks=[tuner := Tuner()], **QUIET).fit(module, pairs())
    made = [before != after for before, after in pairwise(tuner.weights)]
    assert made == [True, False, True, True]


def test_a_reference_that_a_test_loaded_is_released(model_dir: str) -> None:
    module = PreferenceModule(PolicyConfig(path=model_dir))
    reference = CachedReference({"test": torch.zeros(1, 2)}, lambda: pytest.fail("it is there"))
    module.comparison.reference, reference._loaded = reference, reference
    module.comparison.on_test_end(Trainer(**QUIET), module)
    assert reference._loaded is None


def test_the_run_report_needs_no_data_module(
    model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = TokenizedPair([1, 5], [6, 2], [7, 2])
    loader = DataLoader([collate_pairs([pair] * 2, [0, 1], pad_token_id=0)] * 2, batch_size=None)
    options = QUIET | {"logger": CSVLogger(tmp_path, name=""), "log_every_n_steps": 1}
    trainer = Trainer(max_steps=2, callbacks=[RunReport()], **options)
    trainer.fit(PreferenceModule(PolicyConfig(path=model_dir)), loader, loader)
    printed = capsys.readouterr().out
    assert "Trained for 2 optimizer steps" in printed
    assert "reward accuracy" in printed
    assert (tmp_path / "version_0" / "model" / "config.json").is_file()
