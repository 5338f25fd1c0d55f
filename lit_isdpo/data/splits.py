"""Which rows are trained on, validated on and tested on, and where each of them came from.

A split is read where it was named, else where the training sources have one of that name; validation rows that are in
neither are held out of the training rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch

from lit_isdpo.data.formats import read_prompt
from lit_isdpo.data.rows import Rows, RowType, TokenizedSource, hold_out
from lit_isdpo.data.sources import DataSource, OpenSource, open_source
from lit_isdpo.data.tokenization import Prompt
from lit_isdpo.types import InputError

Split = Literal["train", "val", "test"]
_PUBLIC_NAMES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}


class SourceCounts(NamedTuple):
    """What became of the rows of one source.

    ``kept``, ``held_out`` and those ``dropped``, by reason, add up to ``lines``: the rows that were read, but where a
    row holds several responses, the pairs that were made of them.
    """

    source: str
    format: str
    read: int
    kept: int
    held_out: int
    dropped: dict[str, int]

    @property
    def lines(self) -> int:
        """Lines of the table."""
        return self.kept + self.held_out + sum(self.dropped.values())


class Splits:
    """The rows of each split, read when it is first asked for.

    Args:
        sources: what was named for each split.
        row_type: whether rows are pairs or demonstrations.
        val_size: how much is held out where there are no validation rows, as in :func:`~lit_isdpo.data.rows.hold_out`.
        read: tokenizes a split of a source; its arguments are the source, its own name of the split, and what messages
            call it.

    Attributes:
        rows: of the splits that were loaded.
        counts: what became of the rows of each source, likewise.
    """

    def __init__(
        self,
        sources: Mapping[Split, list[DataSource]],
        row_type: RowType,
        *,
        val_size: int | float,
        read: Callable[[OpenSource, str, str], TokenizedSource],
    ) -> None:
        self.sources, self.row_type, self.val_size = sources, row_type, val_size
        self.rows: dict[Split, Rows] = {}
        self.counts: dict[Split, list[SourceCounts]] = {}
        self._read = read
        self._raw: dict[Split, list[Any]] = {}
        self._opened: dict[Split, list[OpenSource]] = {}

    def parts(self, split: Split) -> list[tuple[OpenSource, str]]:
        """The sources of a split, and what each of them calls it; none where there is nothing to read."""

        def opened(part: Split) -> list[OpenSource]:
            if part not in self._opened:
                self._opened[part] = [open_source(source, f"data.{part}") for source in self.sources[part]]
            return self._opened[part]

        default = _PUBLIC_NAMES[split]
        if self.sources[split]:
            return [(source, source.choose(default)) for source in opened(split)]
        # A mixture may name one folder twice: nothing is evaluated twice, nor on what is trained on.
        taken = {(source.identity, source.choose("train")) for source in opened("train")}
        parts = []
        for source in opened("train"):
            name = source.find(default)
            if name is not None and (source.identity, name) not in taken:
                taken.add((source.identity, name))
                parts.append((source, name))
        return parts

    def load(self, split: Split) -> None:
        """Reads a split, or holds the validation rows out of the training rows.

        Raises:
            InputError: there are no such rows, or something is wrong with them.
        """
        parts = self.parts(split)
        if not parts and not self.sources["train"]:
            raise InputError(
                f"data.{split}: name your {_PUBLIC_NAMES[split]} rows: a file, a folder, a glob or a hub id"
            )
        if not parts and split == "test":
            raise InputError("data.test: no test rows are named, and data.train has no test split")
        if not parts:  # and split == "val"
            self._hold_out()
            return
        tables, positions, counts, offset = [], [], [], 0
        self._raw[split] = []
        for source, name in parts:
            path = source.source.path + (f" [{name}]" if len(source.splits) > 1 else "")
            tokenized = self._read(source, name, f"data.{split}: {path}")
            tables.append(tokenized.table)
            positions.append(tokenized.kept + offset)
            kept, read = len(tokenized.kept), len(tokenized.rows)
            counts.append(SourceCounts(path, tokenized.format, read, kept, 0, tokenized.dropped))
            self._raw[split].append(tokenized.rows)
            offset += len(tokenized.table)
        table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
        self.rows[split] = Rows(table, torch.cat(positions), self.row_type)
        self.counts[split] = counts

    def _hold_out(self) -> None:
        """Moves a part of the training rows to the validation rows."""
        if "train" not in self.rows:
            self.load("train")
        rows, counts = self.rows["train"], self.counts["train"]
        mask = hold_out(rows.prompt_keys(), self.val_size)
        held_out = [int(part.sum()) for part in mask.split([source.kept for source in counts])]
        self.rows["train"] = Rows(rows.table, rows.positions[~mask], self.row_type)
        self.rows["val"] = Rows(rows.table, rows.positions[mask], self.row_type)
        self.counts["train"] = [
            source._replace(kept=source.kept - number, held_out=number)
            for source, number in zip(counts, held_out, strict=True)
        ]
        self.counts["val"] = [
            SourceCounts("held out of data.train", counts[0].format, sum(held_out), sum(held_out), 0, {})
        ]

    def report(self, split: Split) -> list[str]:
        """A line for each source of a split: what was read, kept and left out, and why."""
        lines = []
        for source in self.counts[split]:
            left_out = source.dropped | ({"held out": source.held_out} if source.held_out else {})
            why = "".join(f", {number:,} {reason}" for reason, number in left_out.items())
            pairs = " pairs" if source.lines != source.read else ""
            lines.append(f"data.{split}: {source.source}: {source.read:,} rows read, {source.kept:,}{pairs} kept{why}")
        return lines

    def row_name(self, split: Split, row_id: int) -> str:
        """A row in words, for messages: ``row 17 of pairs.jsonl``, counted from 0 as it was read."""
        source, row, _ = self._find(split, row_id)
        return f"row {row} of {source.source}"

    def prompt(self, split: Split, row_id: int) -> Prompt:
        """A row's prompt as its source has it: before any chat template, and whole where its tokens were cut."""
        source, row, raw = self._find(split, row_id)
        return read_prompt(raw[row], source.format, self.row_type.kind)

    def first_rows(self, split: Split) -> list[int]:
        """The id of the first row of each source that the split has rows of."""
        ends = list(accumulate(source.lines for source in self.counts[self._read_as(split)]))
        positions = self.rows[split].positions.tolist()
        firsts = {bisect_right(ends, row_id): row_id for row_id in reversed(positions)}
        return sorted(firsts.values())

    def _read_as(self, split: Split) -> Split:
        """The split that its rows were read with, which is that of training where they were held out."""
        return split if split in self._raw else "train"

    def _find(self, split: Split, row_id: int) -> tuple[SourceCounts, int, Any]:
        """The source of a row, the row's place in it, and the source's rows."""
        read_as = self._read_as(split)
        ends = list(accumulate(source.lines for source in self.counts[read_as]))
        number = bisect_right(ends, row_id)
        return self.counts[read_as][number], self.rows[split].table[row_id]["row"], self._raw[read_as][number]

    def folders(self, split: Split) -> list[Path]:
        """The local folders and files that a split is read from; a hub data set has none."""
        folders = []
        for source, name in self.parts(split) or self.parts("train"):
            path = Path(source.source.path).expanduser()
            found = [path] if path.exists() else [file.parent for file in source.files.get(name, [])]
            folders += [folder for folder in dict.fromkeys(found) if folder not in folders]
        return folders

    def check_behavior_logps(self, split: Split) -> None:
        """Checks that every pair of a split has behavior log-probs.

        Raises:
            InputError: says how many have none, and names the first.
        """
        missing = self.rows[split].without_behavior_logps()
        if len(missing):
            raise InputError(
                f"data.{split}: model.mu is 'data', but {len(missing)} pairs have no behavior log-probs, the first of "
                f"them {self.row_name(split, int(missing[0]))}."
            )
