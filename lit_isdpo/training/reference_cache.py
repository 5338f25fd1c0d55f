"""The reference's log-probs of every row that a trainer will read, before it reads one."""

from pathlib import Path
from typing import Any

from lightning import pytorch as pl
from torch import Tensor

from lit_isdpo.data.collation import Layout
from lit_isdpo.evaluation.reference_logps import ReferenceLogps
from lit_isdpo.policy.reference import Reference, ReferenceConfig
from lit_isdpo.types import Ranks


def cached_logps(
    trainer: pl.Trainer,
    config: ReferenceConfig,
    reference: Reference,
    ranks: Ranks,
    layout: Layout,
    with_test: bool,
) -> dict[str, Tensor]:
    """The log-probs by split, from files as far as these have them; the rest is computed and kept.

    Args:
        trainer: has the rows, and says where files lie by default.
        config: where they lie instead.
        reference: the model itself; it is moved to the rank's device.
        ranks: among which the work is shared.
        layout: of the rows in a forward.
        with_test: whether test rows are among them.

    Returns:
        Of each split, ``(lines of its table, 2)``.

    Raises:
        InputError: as ``ReferenceLogps``.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    device = trainer.strategy.root_device
    reference.to(device)
    with reference.scoring() as model:
        files = ReferenceLogps(cache_folder(trainer, config), model, device, ranks)
    if with_test and datamodule.splits.parts("test"):
        if ranks.rank == 0:  # the others then find the tokens
            datamodule.setup("test")
        ranks.gather(None)
        datamodule.setup("test")
    return {
        split: files.of_rows(
            rows,
            reference,
            datamodule.collate(layout),
            batch_size=datamodule.eval_batch_size or datamodule.rows_per_forward,
            label=split,
        )
        for split, rows in datamodule.splits.rows.items()
    }


def cache_folder(trainer: pl.Trainer, config: ReferenceConfig) -> Path:
    """Where the files lie."""
    return Path(config.cache_dir or Path(trainer.default_root_dir) / "reference_logps")
