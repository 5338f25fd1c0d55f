"""What a run leaves behind, and what it says when it ends."""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard.summary import hparams

from lit_isdpo.data import outcomes
from lit_isdpo.evaluation.store import write_text
from lit_isdpo.policy.loading import read_config, switch_length, unpin_rope
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.models import Prediction
from lit_isdpo.training.probe import SamplingProbe
from lit_isdpo.training.reading import find_data
from lit_isdpo.training.run_folder import copy_code, run_dir

ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("reward accuracy", "rewards/accuracies", "{:.3f}"),
    ("reward margin", "rewards/margins", "{:.4f}"),
    ("weight, mean", "weights/mean", "{:.3f}"),
    ("weight, largest", "weights/max", "{:.3f}"),
    ("weights, ESS / pairs", "weights/ess", "{:.3f}"),
    ("weights, clipped", "weights/clip_fraction", "{:.3f}"),
    ("KL(policy, reference), nats", "kl/rao_blackwell", "{:.2f}"),
    ("reward that is trained on", "reward", "{:.3f}"),
    ("gold reward", "gold_reward", "{:.3f}"),
    ("win rate against reference", "win_rate", "{:.3f}"),
    ("response length, tokens", "response_length", "{:.1f}"),
    ("exact KL, nats", "exact/kl", "{:.3f}"),
    ("exact gold reward", "exact/gold_reward", "{:.3f}"),
    ("exact mass on the data's support", "exact/support_mass", "{:.3f}"),
)
"""Label, log key and format of the table's rows; a key that a run does not log has no row."""
BEHIND_BAR = {
    "loss": "train/loss",
    "accuracy": "train/rewards/accuracies",
    "weight": "train/weights/mean",
    "reward": "train/reward/mean",
    "kl": "train/kl/k1",
}
"""Name behind the progress bar, and log key; a key that a run does not log is not there."""
SECONDS_BETWEEN_VALUES = 0.5
SHOWN = ("beta", "epsilon")  # beside method, learning rate and seed
WRITTEN = ("row_id", "prompt", "response", "finished")  # of a prediction, whose first fields they are


class RunReport(Callback):
    """Validates before the first step, keeps what belongs to the run in its folder, and prints a table at the end.

    The run's folder gets ``model/``: the policy's configuration and tokenizer, so that a checkpoint can be exported
    without the model that the run began with; an adapter's configuration too, though that one needs the model.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self._entered = False
        self._started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder and, in a fresh fit, measures where it starts."""
        assert isinstance(pl_module, LanguageModule)
        self._started = monotonic()
        folder = run_dir(trainer)
        if trainer.is_global_zero:
            write_model_folder(pl_module, folder / "model")
        if (data := find_data(trainer)) is not None:
            for logger in trainer.loggers:
                logger.log_metrics(outcomes.metrics(data.splits.counts), step=trainer.global_step)
        if trainer.global_step == 0 and trainer.enable_validation:
            trainer.validating = True  # as Lightning does between two batches
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
            self.before = _numbers(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters a fit into the table of runs as soon as its metrics have names."""
        assert isinstance(pl_module, LanguageModule)
        if trainer.state.fn == TrainerFn.FITTING and not self._entered:
            self._entered = True
            _log_hyperparameters(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The values before training, for the table of a resumed run."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.before = state_dict["before"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints what was measured and, after a fit, what it has changed, when the progress bar is done."""
        if stage not in ("fit", "validate"):
            return
        folder, console = run_dir(trainer), Console()
        if not trainer.is_global_zero:
            return
        if stage == "validate":
            if after := _numbers(trainer):
                console.print(_table("Validation", {"": after}))
        elif self._started is None:
            rank_zero_info(
                f"Nothing was left to train: the checkpoint is at optimizer step {trainer.global_step:,}, where "
                "trainer.max_epochs or trainer.max_steps ends the fit; raise it to go on."
            )
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            columns = {"before": self.before, "after": _numbers(trainer)}
            console.print(_table("Validation, before and after training", columns))
            for panel in _samples(trainer):
                console.print(panel)
            steps, time = trainer.global_step, timedelta(seconds=round(monotonic() - self._started))
            told = f"Trained for {steps} optimizer steps in {time}. Everything is in {folder}"
            console.print(told, soft_wrap=True)
            console.print(f"Compare runs: tensorboard --logdir {folder.parent}", soft_wrap=True)


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict`` samples to ``predictions.jsonl`` in the run's folder, one file a rank above one rank."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[list[Prediction]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes all predictions of this rank."""
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = run_dir(trainer) / f"predictions{rank}.jsonl"
        rows = [dict(zip(WRITTEN, prediction, strict=False)) for batch in predictions for prediction in batch]
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        rank_zero_info(f"Wrote {len(rows)} responses to {file}")


class ProgressBar(RichProgressBar):
    """Lightning's bar, with values of the last optimizer step.

    Values that are logged with ``prog_bar=True`` are read on the host after every micro-batch, bar or no bar, and the
    host waits for a GPU each time. Here they are read twice per second.

    Args:
        refresh_rate: in micro-batches; 0 shows no bar.
        leave: whether the bar of an epoch stays when the next one begins.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._shown: dict[str, int | str | float | dict[str, float]] = {}
        self._read_at = -math.inf

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        if monotonic() - self._read_at > SECONDS_BETWEEN_VALUES:
            self._shown = super().get_metrics(trainer, pl_module)
            self._shown.pop("v_num", None)  # the folder tells it
            known = trainer.callback_metrics
            self._shown |= {name: known[key].item() for name, key in BEHIND_BAR.items() if key in known}
            if self._shown:  # until the first step there are none
                self._read_at = monotonic()
        return self._shown

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the epoch's last values behind the bar."""
        self._read_at = -math.inf
        super().on_train_epoch_end(trainer, pl_module)


def write_model_folder(module: LanguageModule, folder: Path) -> None:
    """Saves everything of a Hugging Face folder but the weights, the model's own code too where it may run."""
    model = module.network.model
    config = deepcopy(model.config)
    if switch_length(config) is not None:
        unpin_rope(config, read_config(module.source, option="model.policy.path"))
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:  # a reward model has none
        model.generation_config.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)
    if module.source.trust_remote_code:
        copy_code(module.source, folder)
    if module.network.adapter is not None:
        module.network.adapter.config.save_pretrained(str(folder))


def _numbers(trainer: Trainer) -> dict[str, float]:
    """What the last validation logged, without the stage prefix."""
    metrics = trainer.callback_metrics
    return {key.removeprefix("val/"): float(value) for key, value in metrics.items() if key.startswith("val/")}


def _table(title: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """What validations measured, a column each; rows are those of the last."""
    *_, last = columns.values()
    table = Table(title=title)
    if any(key.endswith("_stderr") for key in last):
        table.caption = "±: one standard error over the prompts"
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, key, style in ROWS:
        if key in last:
            cells = []
            for values in columns.values():
                error = values.get(f"{key}_stderr")
                cells.append(
                    ("-" if key not in values else style.format(values[key]))
                    + ("" if error is None else f" ±{style.format(error)}")
                )
            table.add_row(label, *cells)
    return table


def _log_hyperparameters(trainer: Trainer, module: LanguageModule) -> None:
    """Fills the table of runs: what distinguishes them, against what the last validation of each measured."""
    optimizer, adapter = trainer.optimizers[0], module.network.adapter
    data = find_data(trainer)
    method, numbers = module.method
    values = {
        "method": method,
        "lr": optimizer.defaults["lr"],
        "seed": None if data is None else data.seed,
        # The tab shows the first five by name: what matters less stands behind.
        **{key if key in SHOWN else f"setup.{key}": number for key, number in numbers.items()},
        "setup.batch_size": None if data is None else data.batch_size,
        "setup.optimizer": type(optimizer).__name__,
        "setup.policy": module.source.path,
        "setup.peft": None if adapter is None else getattr(adapter.config.peft_type, "value", None),
    }
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
    metrics = [key for key in trainer.callback_metrics if key.startswith("val/")]
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            # Lightning would log the metrics as scalars once more; their values are those of the tags, at every time.
            for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
                logger.experiment.file_writer.add_summary(summary)


def _samples(trainer: Trainer) -> list[Panel]:
    """Two prompts with the reference's response and the policy's."""
    probe = next((callback for callback in trainer.callbacks if isinstance(callback, SamplingProbe)), None)  # type: ignore[attr-defined]
    panels = []
    for number, sample in enumerate(probe.samples[:2] if probe else []):
        text = Text(sample.prompt[-600:].strip() + "\n")
        drawn = [("policy", sample)]
        if probe and number < len(probe.ref_samples):
            drawn.insert(0, ("reference", probe.ref_samples[number]))
        for name, response in drawn:
            gold = "" if response.reward is None else f"  (gold reward {response.reward:.1f})"
            text.append(f"\n{name}: ", style="bold")
            text.append(response.response[:600].strip() + gold)
        panels.append(Panel(text, title=f"sample {number + 1}", title_align="left"))
    return panels
