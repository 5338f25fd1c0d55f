"""The reference's log-probs of rows, computed once and kept in files that later runs go on with.

    FOLDER/KEY/
        reference.json      what KEY is a hash of: weights, architecture and numerics
        0-00003.parquet     key, chosen_logps, rejected_logps, chosen_tokens, rejected_tokens: a line a row

A row is known by the hash of its token ids, so that it is found in any data set and in any order. A file is written
whole under another name first: what was interrupted goes on with the rows that are in no file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import torch
import transformers
from rich.progress import Progress
from torch import Tensor

from lit_isdpo.data.collation import Layout
from lit_isdpo.data.tokenized_rows import Rows
from lit_isdpo.evaluation.store import digest, read_table, weights_fingerprint, write_table, write_text
from lit_isdpo.policy.attention import kernel_of
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import InputError, PreferenceBatch, Ranks

if TYPE_CHECKING:
    from lit_isdpo.data.datamodule import TextDataModule

COLUMNS = ("key", "chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens")
ROWS_PER_FILE = 1024  # what an interruption may lose
SECONDS_OF_DELAY = 120  # until what another rank wrote counts as not there
CHECKED_ROWS = 8  # of each split, whenever they are read
Collate = Callable[[list[tuple[int, Any]]], PreferenceBatch]


def cached_logps(
    data: "TextDataModule",
    reference: Reference,
    root: Path,
    *,
    device: torch.device,
    ranks: Ranks,
    layout: Layout,
    with_test: bool,
) -> dict[str, Tensor]:
    """The log-probs of the rows of every split, before a trainer reads one; missing ones are computed and kept.

    Args:
        data: has the rows.
        reference: the model itself; it is moved to the device.
        root: folder of all references.
        device: of this rank.
        ranks: among which the work is shared.
        layout: of the rows in a forward.
        with_test: whether test rows are among them.

    Returns:
        ``(lines of its table, 2)`` for each split.

    Raises:
        InputError: as ``ReferenceLogps``.
    """
    if with_test and data.splits.parts("test"):
        if ranks.rank == 0:  # the others then find the tokens
            data.setup("test")
        ranks.gather(None)
        data.setup("test")
    batch_size = data.eval_batch_size or data.rows_per_forward
    files = ReferenceLogps(root, reference.to(device), data.collate(layout), batch_size, device, ranks)
    return {split: files.of_rows(rows, split) for split, rows in data.splits.rows.items()}


class ReferenceLogps:
    """The files of one reference.

    Args:
        root: folder of all references.
        reference: the model, on the device.
        collate: makes a batch of rows.
        batch_size: rows of a forward.
        device: that it computes on.
        ranks: who shares the work.
    """

    def __init__(
        self, root: Path, reference: Reference, collate: Collate, batch_size: int, device: torch.device, ranks: Ranks
    ) -> None:
        with reference.scoring() as model:
            self.in_fp32 = model.compute_dtype == model.model.dtype == torch.float32
            about = {
                "weights": weights_fingerprint(model, with_adapter=False),
                "compute_dtype": str(model.compute_dtype),
                "attention": kernel_of(model.model.config),
                "device": device.type,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        self.folder = root / digest(about)
        self.reference = reference
        self.collate = collate
        self.batch_size = batch_size
        self.device = device
        self.ranks = ranks
        if ranks.rank == 0:
            write_text(self.folder / "reference.json", json.dumps(about, indent=2) + "\n")
        ranks.gather(None)

    def of_rows(self, rows: Rows, label: str) -> Tensor:
        """Log-probs of a split's rows, ``(lines of its table, 2)`` float32, NaN where a line is no row of it.

        Those that are in no file are computed, and some of those that are there are computed again.

        Args:
            rows: the split.
            label: of the progress bar.

        Raises:
            InputError: what a file says is not what the reference says.
        """
        keys, lengths = rows.keys(), rows.lengths()
        known = self._read()
        missing = self.ranks.gather(torch.tensor([key not in known for key in keys.tolist()]))[0]
        order = lengths.argsort(descending=True, stable=True)
        todo = order[missing[order]].tolist()
        if todo:
            self._compute(rows, keys, todo, label)
        self.ranks.gather(None)  # all files are there
        self.ranks.on_all(lambda: self._wait_for(keys, known))
        values = torch.tensor([known[key] for key in keys.tolist()], dtype=torch.float32)
        self.ranks.on_all(lambda: self._check(rows, values))
        table = torch.full((len(rows.table), 2), torch.nan)
        table[rows.positions] = values
        return table

    def _wait_for(self, keys: Tensor, known: dict[int, tuple[float, float]]) -> None:
        """Adds to ``known`` what was written, other nodes' files too, which shared folders show with delay."""
        for second in range(SECONDS_OF_DELAY):
            if all(key in known for key in keys.tolist()):
                return
            sleep(min(1, second))
            known.update(self._read())
        raise InputError(
            f"model.reference.cache_dir: what other ranks wrote to {str(self.folder)!r} is not seen here; name a "
            "folder that all nodes share."
        )

    def _compute(self, rows: Rows, keys: Tensor, todo: list[int], label: str) -> None:
        own = todo[self.ranks.rank :: self.ranks.size]
        waiting: list[tuple[Any, ...]] = []
        with Progress(transient=True, disable=self.ranks.rank != 0) as progress:
            bar = progress.add_task(f"Reference log-probs, {label}", total=len(own))
            try:
                # Every rank makes as many forwards as rank 0, whose share is the largest: a sharded model needs them
                # all. One whose rows are used up computes one again.
                for start in range(0, -(-len(todo) // self.ranks.size), self.batch_size):
                    some = own[start : start + self.batch_size] or todo[:1]
                    batch = self._batch(rows, some)
                    logps, counts = self.reference.logps(batch, label), batch.tokens.completion_mask.sum(dim=1)
                    columns = [keys[some], *logps.cpu().chunk(2), *counts.cpu().chunk(2)]
                    waiting += zip(*(column.tolist() for column in columns), strict=True)
                    progress.advance(bar, len(some))
                    if len(waiting) >= ROWS_PER_FILE:
                        self._write(waiting)
                        waiting = []
            finally:  # a Ctrl-C keeps what there is
                if waiting:
                    self._write(waiting)

    def _check(self, rows: Rows, values: Tensor) -> None:
        """Computes a few rows anew, of all lengths."""
        by_length = rows.lengths().argsort(stable=True)
        some = by_length[torch.linspace(0, len(by_length) - 1, min(CHECKED_ROWS, len(by_length))).long()].tolist()
        batch = self._batch(rows, some)
        now = torch.stack(self.reference.logps(batch, "").cpu().chunk(2), dim=1)
        counts = torch.stack(batch.tokens.completion_mask.sum(dim=1).cpu().chunk(2), dim=1)
        # Rows of another batch are summed in another order: a rounding a token.
        tolerance = (1e-3 if self.in_fp32 else 0.05) * counts.sqrt()
        bad = ((now - values[some]).abs() > tolerance).any(dim=1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise InputError(
                f"model.reference.cache: {self.folder} has {values[some][first].tolist()} for a row whose log-probs "
                f"are {now[first].tolist()} under the reference; delete that folder, and it is computed anew."
            )

    def _batch(self, rows: Rows, some: list[int]) -> PreferenceBatch:
        batch = self.collate(rows.__getitems__(some))
        return batch._replace(tokens=batch.tokens.to(self.device), row_ids=batch.row_ids.to(self.device))

    def _read(self) -> dict[int, tuple[float, float]]:
        """Everything that the folder holds, by key; a file that is not as it was written counts as none."""
        known: dict[int, tuple[float, float]] = {}
        for file in sorted(self.folder.glob("*.parquet")):
            table = read_table(file)
            if table is None:
                continue
            keys, *sides = (table.column(name).to_pylist() for name in COLUMNS[:3])
            known.update(zip(keys, zip(*sides, strict=True), strict=True))
        return known

    def _write(self, lines: list[tuple[Any, ...]]) -> None:
        columns = dict(zip(COLUMNS, zip(*lines, strict=True), strict=True))
        types = (pa.int64(), pa.float32(), pa.float32(), pa.int32(), pa.int32())
        table = pa.table({name: pa.array(columns[name], type=kind) for name, kind in zip(COLUMNS, types, strict=True)})
        write_table(self.folder / f"{self.ranks.rank}-{uuid4().hex[:12]}.parquet", table)
