"""The trainer, with the verbs that Lightning's has not."""

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.types import InputError


class IsdpoTrainer(Trainer):
    """Lightning's trainer; each method more is a verb of the command line that shares ``fit``'s config."""

    def precompute(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Computes the reference's log-probs of all rows once, for later runs with model.reference.cache.

        Args:
            model: names the reference and its numerics.
            datamodule: the rows: training, validation and, where there are any, test.

        Raises:
            InputError: there is no reference.
        """
        if not isinstance(model, PreferenceModule) or model.reference_config is None:
            raise InputError("precompute: there is no reference in model, so there is nothing to compute.")
        model.reference_config = replace(model.reference_config, cache=True)
        model.caches_test_rows = True
        # A fit of no steps: whatever launches ranks and sets up devices for a fit does it here.
        self.loggers = []
        untyped: Any = self
        untyped.callbacks = []
        self.fit_loop.epoch_loop.max_steps = 0
        self.fit(model, datamodule=datamodule)
