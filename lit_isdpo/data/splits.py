"""The rows to train, validate and test on, and the source of each of them.

A split is read from the sources that were named for it, else from the training sources if they have one of that name.
Without either, validation rows are held out of the training rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor

from lit_isdpo.data.examples import read_prompt
from lit_isdpo.data.outcomes import Reason, SourceCounts, Split, check_dropped, count_notes, words_of
from lit_isdpo.data.raw_rows import RawRows
from lit_isdpo.data.sampling import permutation
from lit_isdpo.data.sources import DataSource, OpenSource, open_source
from lit_isdpo.data.tokenized_rows import Rows, RowType, TokenizedSource
from lit_isdpo.names import named_path
from lit_isdpo.types import InputError, ProbePrompt, Prompt

Duplicates = Literal["keep", "drop"]
_PUBLIC_NAMES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}


class Splits:
    """The rows of each split, read when it is first asked for.

    Args:
        sources: those that were named for each split.
        row_type: whether rows are pairs or demonstrations.
        val_size: how much is held out if there are no validation rows, as in :func:`hold_out`.
        max_dropped_fraction: of a source's rows; where more must be left out, nothing is read. ``None``: read all the
            same, be there no row left.
        duplicates: keep or drop a row with the same tokens as an earlier one of its split.
        read: tokenizes a split of a source; its arguments are the source, its own name of the split, and what messages
            call it.

    Attributes:
        rows: of the splits that were loaded.
        counts: the outcome of reading each source.
    """

    def __init__(
        self,
        sources: Mapping[Split, list[DataSource]],
        row_type: RowType,
        *,
        val_size: int | float,
        max_dropped_fraction: float | None,
        duplicates: Duplicates,
        read: Callable[[OpenSource, str, str], TokenizedSource],
    ) -> None:
        if not (val_size >= 1 if isinstance(val_size, int) else 0 < val_size < 1):
            raise InputError(f"data.val_size is {val_size}; it must be a fraction between 0 and 1 or a number of rows")
        if not 0 <= (max_dropped_fraction or 0) <= 1:
            raise InputError(f"data.max_dropped_fraction is {max_dropped_fraction}; it must lie between 0 and 1")
        if any(source.weight != 1 for source in [*sources["val"], *sources["test"]]):
            raise InputError("data.val, data.test: weights are for data.train; every other row is read once")
        self.sources, self.row_type, self.val_size = sources, row_type, val_size
        self.rows: dict[Split, Rows] = {}
        self.counts: dict[Split, list[SourceCounts]] = {}
        self.max_dropped_fraction, self.duplicates = max_dropped_fraction, duplicates
        self._read = read
        self._raw: dict[Split, list[RawRows]] = {}
        self._opened: dict[Split, list[OpenSource]] = {}
        self._ends: dict[Split, list[int]] = {}  # of each source's lines in the table
        self._repeated: dict[Split, Tensor] = {}  # row ids

    def parts(self, split: Split) -> list[tuple[OpenSource, str]]:
        """The sources of a split, and each one's own name of it; none if there is nothing to read."""

        def opened(part: Split) -> list[OpenSource]:
            if part not in self._opened:
                self._opened[part] = [open_source(source, f"data.{part}") for source in self.sources[part]]
            return self._opened[part]

        default = _PUBLIC_NAMES[split]
        if self.sources[split]:
            return [(source, source.choose(default)) for source in opened(split)]
        # A mixture may name one folder twice: no row is evaluated twice, and none that is trained on.
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
        names, sources = [], []
        for source, name in parts:
            names.append(source.source.path + (f" [{name}]" if len(source.splits) > 1 else ""))
            sources.append(self._read(source, name, f"data.{split}: {names[-1]}"))
        tables = [source.table for source in sources]
        table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
        ends = list(accumulate((len(part) for part in tables), initial=0))
        kept = [source.kept() for source in sources]
        rows = Rows(table, torch.cat([part + end for part, end in zip(kept, ends, strict=False)]), self.row_type)
        repeated = rows.repeated()
        counts = [
            self._count(name, source, lines, part)
            for name, source, lines, part in zip(
                names, sources, kept, repeated.split([len(lines) for lines in kept]), strict=True
            )
        ]
        if self.max_dropped_fraction is not None:
            for part in counts:
                check_dropped(part, split, self.max_dropped_fraction)
        self._raw[split], self._ends[split] = [source.rows for source in sources], ends[1:]
        self._repeated[split] = rows.positions[repeated]
        self.counts[split] = counts
        self.rows[split] = Rows(table, rows.positions[~repeated], self.row_type) if self.duplicates == "drop" else rows

    def _count(self, name: str, source: TokenizedSource, kept: Tensor, repeated: Tensor) -> SourceCounts:
        """Counts the rows of a source; some of its ``(N,)`` kept lines repeat others."""
        notes = source.dropped()
        dropped = count_notes(notes)
        example = next((note for note in notes if words_of(note) == next(iter(dropped))), "").partition("\n")[2]
        kept = kept[~repeated] if self.duplicates == "drop" else kept
        changed = count_notes(source.changes(kept))
        if number := int(repeated.sum()):
            (dropped if self.duplicates == "drop" else changed)[Reason.DUPLICATE.value] = number
        return SourceCounts(name, source.format, len(source.rows), len(kept), 0, dropped, changed, example)

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
            SourceCounts("held out of data.train", counts[0].format, sum(held_out), sum(held_out), 0, {}, {})
        ]

    def noted(self, split: Split) -> Iterator[dict[str, Any]]:
        """The rows of a split that are left out, were changed or repeat another, with the reasons.

        Of rows that were held out, those of the training rows are given.
        """
        read_as = self._read_as(split)
        table, repeated = self.rows[split].table, set(self._repeated[read_as].tolist())
        columns = [table.data.column(name).to_pylist() for name in ("row", "dropped", "changes")]
        for line, (row, dropped, changes) in enumerate(zip(*columns, strict=True)):
            notes = [dropped] if dropped else [*changes, *([Reason.DUPLICATE.value] if line in repeated else [])]
            because = [": ".join(note.split("\n")) for note in notes]
            if because:
                source, _, raw = self._find(split, line)
                yield {
                    "split": read_as,
                    "source": source.source,
                    "row": row,
                    "left_out": bool(dropped) or (line in repeated and self.duplicates == "drop"),
                    "because": because,
                    "content": raw[row],
                }

    def row_name(self, split: Split, row_id: int) -> str:
        """A row in words, for messages: ``row 17 of pairs.jsonl``, counted from 0 as it was read."""
        source, row, _ = self._find(split, row_id)
        return f"row {row} of {source.source}"

    def prompt(self, split: Split, row_id: int) -> Prompt:
        """A row's prompt as its source has it: before any chat template, and whole if its tokens were cut."""
        source, row, raw = self._find(split, row_id)
        return read_prompt(raw[row], source.format, self.row_type.kind)

    def prompts(self, split: Split, num: int, decode: Callable[[list[int]], Any]) -> list[ProbePrompt]:
        """The first ``num`` different prompts of a split; fewer where there are not so many."""
        rows = self.rows[split]
        first = {key: index for index, key in reversed(list(enumerate(rows.prompt_keys().tolist())))}
        return [
            ProbePrompt(item[0], str(decode(item[0])), str(decode(item[1])), row_id, self.prompt(split, row_id))
            for row_id, item in rows.__getitems__(sorted(first.values())[:num])
        ]

    def first_rows(self, split: Split) -> list[int]:
        """The id of the first row of each source that the split has rows of."""
        ends, positions = self._ends[self._read_as(split)], self.rows[split].positions.tolist()
        return sorted({bisect_right(ends, row_id): row_id for row_id in reversed(positions)}.values())

    def _read_as(self, split: Split) -> Split:
        """The split that its rows were read with, which is that of training if they were held out."""
        return split if split in self._raw else "train"

    def _find(self, split: Split, row_id: int) -> tuple[SourceCounts, int, RawRows]:
        """The source of a row, the row's place in it, and the source's rows."""
        read_as = self._read_as(split)
        number = bisect_right(self._ends[read_as], row_id)
        return self.counts[read_as][number], self.rows[split].table[row_id]["row"], self._raw[read_as][number]

    def folders(self, split: Split) -> list[Path]:
        """The local folders and files that a split is read from; a hub data set has none."""
        folders = []
        for source, name in self.parts(split) or self.parts("train"):
            path = Path(named_path(source.source.path, "pairs")).expanduser()
            local = source.source.rows is None and path.exists()
            found = [path] if local else [file.parent for file in source.files.get(name, [])]
            folders += [folder for folder in dict.fromkeys(found) if folder not in folders]
        return folders

    def check_behavior_logps(self, split: Split) -> None:
        """Checks that every pair of a split has behavior log-probs.

        Raises:
            InputError: says how many have none, and names the first.
        """
        rows = self.rows[split]
        missing = rows.positions[rows.numbers("chosen_behavior_logps").isnan()]
        if len(missing):
            raise InputError(
                f"data.{split}: model.mu is 'data', but {len(missing)} pairs have no behavior log-probs, the first of "
                f"them {self.row_name(split, int(missing[0]))}."
            )


def hold_out(prompt_keys: Tensor, size: int | float) -> Tensor:
    """Chooses rows to validate on. Rows with the same prompt stay together: a prompt that was trained on tells little.

    The choice depends on the data alone, not on a seed: a later ``validate`` must never see rows that were trained on.

    Args:
        prompt_keys: ``(N,)`` int64, one a row.
        size: fraction of the rows, or (``int``) number of rows; whole prompts are taken until it is reached.

    Returns:
        ``(N,)`` bool, true for the rows that are held out.

    Raises:
        InputError: nothing is left to train on.

    >>> hold_out(torch.tensor([7, 7, 8, 9]), 1).sum() in (1, 2)
    True
    """
    prompts, prompt_of_row, num_rows = prompt_keys.unique(return_inverse=True, return_counts=True)
    order = permutation(len(prompts), "held out")
    wanted = size if isinstance(size, int) else max(1, round(size * len(prompt_keys)))
    num_prompts = int((num_rows[order].cumsum(0) < wanted).sum()) + 1
    if num_prompts >= len(prompts):
        raise InputError(
            f"data.val_size: no rows are left to train on when {size} of the {len(prompt_keys)} rows, which have "
            f"{len(prompts)} different prompt(s), are held out; name validation rows with data.val"
        )
    return torch.isin(prompt_of_row, order[:num_prompts])
