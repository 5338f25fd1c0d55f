"""The trainer, with the verbs that Lightning's has not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.commands.inspect import inspect_data
from lit_isdpo.commands.plan import make_plan, print_plan
from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.outcomes import Split
from lit_isdpo.training.checkpoints import WholeStepTrainer
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.run_folder import claimed, run_dir
from lit_isdpo.types import InputError, check_least


class IsdpoTrainer(WholeStepTrainer):
    """Lightning's trainer; each method more is a verb of the command line that shares ``fit``'s config."""

    _run_folder: str | None = None

    @property
    def default_root_dir(self) -> str:
        """In :meth:`own_folder`, on rank 0, the run's folder; otherwise the root of all runs."""
        return self._run_folder or super().default_root_dir

    @property
    def log_dir(self) -> str:
        """The run's folder, whatever the loggers. Every rank must ask for it."""
        return str(run_dir(self))

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """Gives the run a folder that no other run writes to. Rank 0 makes it; ``run_dir`` tells the other ranks."""
        if not self.is_global_zero:
            yield
            return
        numbered = TensorBoardLogger(self.default_root_dir, name="")  # the run's loggers may have no folder
        with claimed([*self.loggers, numbered]) as (*loggers, folder):
            self.loggers, self._run_folder = loggers, folder.log_dir
            yield

    def precompute(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Computes the reference's log-probs of all rows once, for later runs with model.reference.cache.

        Args:
            model: names the reference and its numerics.
            datamodule: the rows: training, validation and, where there are any, test.

        Raises:
            InputError: there is no reference.
        """
        if not isinstance(model, PreferenceModule) or model.comparison.config is None:
            raise InputError("precompute: there is no reference that scores pairs in training: nothing to compute.")
        model.comparison.config = config = replace(model.comparison.config, cache=True)
        model.comparison.caches_test_rows = True
        # A fit of no steps: whatever launches ranks and sets up devices for a fit does it here.
        self.loggers = []
        untyped: Any = self
        untyped.callbacks = []
        self.fit_loop.epoch_loop.max_steps = 0
        self.fit(model, datamodule=datamodule)
        rank_zero_info(f"The reference's log-probs are in {config.folder(self.default_root_dir)}")

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        split: Split = "train",
        num_pairs: int = 3,
        rows: list[int] | None = None,
        listing: str | None = None,
    ) -> None:
        """Shows the data as a fit will see it: counts, lengths, what the labels prefer, and pairs token by token.

        Args:
            model: whose tokenizer is used; no weights are loaded.
            datamodule: the rows.
            split: train, val or test: whose rows are shown.
            num_pairs: how many are shown token by token.
            rows: which are shown instead, by their number in the data as messages tell it.
            listing: file to write, as JSON lines, with the rows that are left out, were changed or repeat another.

        Raises:
            InputError: whatever is wrong with the data, but not that much of it must be left out.
        """
        assert isinstance(model, LanguageModule)
        assert isinstance(datamodule, TextDataModule)
        inspect_data(model, datamodule, self, split=split, num_pairs=num_pairs, rows=rows, listing=listing)

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        devices: int = 1,
        lengths: Literal["data", "limits"] = "data",
    ) -> None:
        """Prints what a fit will need: memory of a rank at its peak and FLOPs of a step. No weights are loaded.

        Args:
            model: what is trained.
            datamodule: the batches.
            devices: ranks of data parallelism; they need not be there.
            lengths: ``data`` plans for the longest training rows; ``limits`` reads no data, and plans for prompts of
                data.max_prompt_length tokens with responses up to data.max_length.

        Raises:
            InputError: whatever is wrong with the model or the data.
        """
        assert isinstance(model, LanguageModule)
        assert isinstance(datamodule, TextDataModule)
        check_least("devices", devices, 1)
        plan = make_plan(model, datamodule, self, devices=devices, lengths=lengths)
        print_plan(plan, model, devices=devices, lengths=lengths)
