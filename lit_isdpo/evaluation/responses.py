"""Responses and what was measured on them, in files that a later evaluation goes on with.

    FOLDER/KEY/
        about.json                  what KEY is a hash of: weights, prompts, sampling
        shards/COLUMNS/00003.parquet    "responses", or one score of them ("kl", "reward-1a2b..."), shard by shard
        responses.parquet           everything side by side, to be read by others

A shard is a batch of responses. It is sampled, or scored, by one rank and written whole under another name first: what
was interrupted goes on at the shard that is missing or cannot be read, on any number of ranks. A new reward is a new
folder of columns beside the others.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lit_isdpo.evaluation.files import read_table, write_table, write_text
from lit_isdpo.evaluation.fingerprints import digest
from lit_isdpo.types import Ranks, Response

Columns = dict[str, list[Any]]
RESPONSES = "responses"


class ResponseSet:
    """n responses to each of P prompts, all of one origin, with columns of values.

    Args:
        root: the folder of all sets.
        about: what the responses are a function of; its hash is the set's name.
        prompts: token ids of P prompts. They are sharded by length, so that little of a batch is padding.
        num_responses: n.
        shard_size: responses of a shard, rounded down to whole prompts.
        ranks: who shares the work.
        show: wraps the shards that are about to be computed, with a word for what is done, to show progress.
    """

    def __init__(
        self,
        root: Path,
        about: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        *,
        num_responses: int,
        shard_size: int,
        ranks: Ranks = Ranks(),  # noqa: B008 - immutable
        show: Callable[[Iterable[int], str], Iterable[int]] = lambda shards, _: shards,
    ) -> None:
        self.key = digest(about)
        self.folder = root / self.key
        self.num_responses = num_responses
        self._ranks = ranks
        self._show = show
        self._order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        per_shard = max(1, shard_size // num_responses)
        self.shards = [self._order[start : start + per_shard] for start in range(0, len(prompts), per_shard)]
        self._parts: dict[str, list[pa.Table]] = {}
        if ranks.rank == 0:
            write_text(self.folder / "about.json", json.dumps(about, indent=2) + "\n")

    @property
    def file(self) -> Path:
        """Where :meth:`save` writes everything side by side."""
        return self.folder / "responses.parquet"

    def fill(self, name: str, compute: Callable[[int], Columns], doing: str) -> None:
        """Reads columns from their files, or computes and writes them: each rank its own shards.

        Args:
            name: of the folder of the columns.
            compute: columns of the shard of that number, a row for each of its responses.
            doing: a word for it, in the progress.

        Raises:
            InputError: whatever ``compute`` raises, on all ranks alike.
        """

        def own_shards() -> dict[int, pa.Table]:
            own = range(self._ranks.rank, len(self.shards), self._ranks.size)
            tables = {shard: self._read(name, shard) for shard in own}
            missing = [shard for shard, table in tables.items() if table is None]
            for shard in self._show(missing, doing) if missing else ():
                tables[shard] = self._write_shard(name, shard, pa.table(compute(shard)))
            return tables

        tables: dict[int, pa.Table] = {}
        for part in self._ranks.agree(own_shards):
            tables |= part
        self._parts[name] = [tables[shard] for shard in range(len(self.shards))]

    def fill_at_once(
        self, name: str, compute: Callable[[], Columns], settled: Callable[[pa.Table], bool] = lambda _: True
    ) -> None:
        """Like :meth:`fill`, by rank 0 alone and for all shards in their order, where the work cannot be divided.

        Args:
            name: of the folder of the columns.
            compute: columns of all responses.
            settled: whether a shard that was read need not be computed again.
        """

        def first_rank() -> list[pa.Table] | None:
            if self._ranks.rank:
                return None
            tables = [self._read(name, shard) for shard in range(len(self.shards))]
            if all(table is not None and settled(table) for table in tables):
                return tables
            table, start = pa.table(compute()), 0
            for shard, prompts in enumerate(self.shards):
                size = len(prompts) * self.num_responses
                tables[shard] = self._write_shard(name, shard, table.slice(start, size))
                start += size
            return tables

        self._parts[name] = self._ranks.agree(first_rank)[0]

    def fill_responses(
        self, draw: Callable[[list[int], int], list[list[Response]]], decode: Callable[[list[int]], str], doing: str
    ) -> None:
        """Samples what is not there yet.

        Args:
            draw: n responses to each of the prompts with these numbers, which are the shard of that number.
            decode: token ids to text, special tokens left out.
            doing: a word for it, in the progress.
        """

        def columns(shard: int) -> Columns:
            responses = [response for drawn in draw(self.shards[shard], shard) for response in drawn]
            return {
                "token_ids": [response.token_ids for response in responses],
                "finished": [response.finished for response in responses],
                "response": [decode(response.token_ids) for response in responses],
            }

        self.fill(RESPONSES, columns, doing)

    def of_shard(self, shard: int) -> tuple[list[int], list[Response], list[str]]:
        """Prompt number, response and text of each row of a shard."""
        table = self._parts[RESPONSES][shard]
        ids, finished, texts = (table.column(name).to_pylist() for name in ("token_ids", "finished", "response"))
        rows = [row for row in self.shards[shard] for _ in range(self.num_responses)]
        return rows, [Response(*pair) for pair in zip(ids, finished, strict=True)], texts

    def rows(self) -> list[int]:
        """The prompt number of every response, in the order of the shards."""
        return [row for row in self._order for _ in range(self.num_responses)]

    def values(self, name: str, column: str) -> list[Any]:
        """A column as it is stored, in the order of the shards."""
        return [value for table in self._parts[name] for value in table.column(column).to_pylist()]

    def by_number(self, values: Sequence[Any]) -> list[list[Any]]:
        """The n values of each prompt, in the caller's order, from values in the order of the shards."""
        found: list[list[Any]] = [[] for _ in self._order]
        for row, value in zip(self.rows(), values, strict=True):
            found[row].append(value)
        return found

    def by_prompt(self, values: Sequence[Any]) -> Tensor:
        """``(P, n)`` float64 from values in the order of the shards; the prompts are in the caller's order."""
        back = torch.tensor(self._order).argsort()
        shaped: Tensor = torch.tensor(values, dtype=torch.float64).unflatten(0, (-1, self.num_responses))[back]
        return shaped

    def tensor(self, name: str, column: str) -> Tensor:
        """A column of numbers, ``(P, n)`` float64."""
        return self.by_prompt(self.values(name, column))

    def save(self, prompts: Sequence[str], row_ids: Sequence[int]) -> None:
        """Writes all columns that there are, of earlier evaluations too, into one file, prompts in the given order.

        Args:
            prompts: P texts.
            row_ids: P rows of the data.
        """
        if self._ranks.rank:
            return
        rows = self.rows()
        table = pa.table(
            {
                "row_id": [row_ids[row] for row in rows],
                "number": [number for _ in self._order for number in range(self.num_responses)],
                "prompt": [prompts[row] for row in rows],
            }
        )
        names = sorted(folder.name for folder in (self.folder / "shards").iterdir())
        for name in sorted(names, key=lambda name: name != RESPONSES):
            parts = self._parts.get(name) or [self._read(name, shard) for shard in range(len(self.shards))]
            if any(part is None for part in parts):
                continue  # another evaluation of it was interrupted
            part = pa.concat_tables(parts)
            for column in part.column_names:
                table = table.append_column(column, part.column(column))
        back = pa.array(sorted(range(len(rows)), key=rows.__getitem__))
        write_table(self.file, table.take(back))

    def _read(self, name: str, shard: int) -> pa.Table | None:
        """A shard's columns; ``None`` where they are not there, or are not what was written."""
        table = read_table(self._path(name, shard))
        return table if table is not None and len(table) == len(self.shards[shard]) * self.num_responses else None

    def _write_shard(self, name: str, shard: int, table: pa.Table) -> pa.Table:
        write_table(self._path(name, shard), table)
        return table

    def _path(self, name: str, shard: int) -> Path:
        return self.folder / "shards" / name / f"{shard:05}.parquet"
