"""The rows of a source as they were given, before a format reads them.

Nothing guesses the type of a column. ``datasets`` would guess it for JSON and CSV files: a response that is a date
would become a time. Rows of these files, and rows in Python's memory, are kept as JSON, one row per line of a
memory-mapped file that the next start finds again. Parquet and Arrow files and tables of ``datasets`` state the types
of their columns.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa

from lit_isdpo.data.row_fields import Row
from lit_isdpo.types import InputError

_LINES_VERSION = 3  # part of the cache's key: raise it with every change to how rows become lines
_SCHEMA = pa.schema([("line", pa.large_binary())])
_LOOKED_AT = 1000  # a format is recognised by this many first rows
_ALL_OR_NONE = ("system", "tools")  # in data with such a column, every prompt is a conversation's


@dataclass
class RawRows:
    """N rows in their order.

    Args:
        table: a ``datasets.Dataset`` with typed columns, or with one column of JSON.
        fingerprint: differs from that of any other rows.
        columns: each column of the data, and the first row that has it.
        is_text: whether the table has one column of JSON.
        renamed: the user's name of a column -> its name in the data; ``None`` hides a column.
    """

    table: Any
    fingerprint: str
    columns: Mapping[str, int]
    is_text: bool
    renamed: Mapping[str, str | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        return self.parser()(self.table[index])

    def __iter__(self) -> Iterator[Row]:
        return map(self.parser(), self.table)

    def parser(self) -> Callable[[Mapping[str, Any]], Row]:
        """Makes a row of a line of the table; it can be sent to another process."""
        missing = tuple(name for name in _ALL_OR_NONE if self.has(name))
        return partial(_parse, is_text=self.is_text, renamed=self.renamed, missing=missing)

    def first(self, number: int) -> "RawRows":
        """The first rows; all of them if there are no more."""
        if number >= len(self):
            return self
        return replace(self, table=self.table.select(range(number)), fingerprint=f"{self.fingerprint} {number}")

    def start(self) -> Iterator[Row]:
        """The first rows; a format is recognised by them."""
        return itertools.islice(self, _LOOKED_AT)

    def column_names(self) -> list[str]:
        """The columns of the first rows, by the user's names."""
        return [name for name, row in _rename(self.columns, self.renamed).items() if row < _LOOKED_AT]

    def has(self, name: str) -> bool:
        """Whether any row has a column, by the user's name."""
        return name in _rename(self.columns, self.renamed)

    def check_renamed(self, name: str) -> None:
        """Checks that the columns that are renamed are there.

        Raises:
            InputError: one is not; ``name`` is the source, for the message.
        """
        there = replace(self, renamed={}).column_names()
        for wanted in self.renamed.values():
            if wanted is not None and wanted not in self.columns:
                raise InputError(f"{name}: data.columns: no column {wanted!r}; it has {', '.join(there) or '(none)'}")

    def needed(self, names: set[str]) -> Any:
        """The table without the columns that nobody reads: some public data sets hold their tokens, too."""
        if self.is_text:
            return self.table
        wanted = {self.renamed.get(name, name) for name in names}
        return self.table.select_columns([column for column in self.table.column_names if column in wanted])


def typed_rows(table: Any) -> RawRows:
    """The rows of a ``datasets.Dataset``, without pictures and sounds, which would be decoded and are no text."""
    media = [name for name, feature in table.features.items() if hasattr(feature, "decode")]
    table = table.remove_columns(media) if media else table
    return RawRows(table, table._fingerprint, dict.fromkeys(table.column_names, 0), is_text=False)


def rows_in_memory(rows: Any, option: str) -> RawRows:
    """Rows in Python's memory: a ``datasets.Dataset``, a ``DataFrame``, or mappings.

    Raises:
        InputError: a row is no mapping, or refers to itself; ``option`` is for the message.
    """
    if isinstance(rows, datasets.Dataset):
        if rows.format["type"] == "custom":
            raise InputError(
                f"{option}: the rows in memory have a transform; apply it with `map`, which keeps its result"
            )
        return typed_rows(rows.with_format(None))
    if isinstance(rows, pd.DataFrame):
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")  # NaN is a missing value
    lines = []
    for place, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"it is a {type(row).__name__} and no mapping")
            lines.append(_as_json(dict(row)))
        except (TypeError, ValueError) as error:
            raise InputError(f"{option}: row {place} in memory cannot be read: {error}") from error
    return write_rows(map(json.loads, lines), hashlib.blake2b(b"\n".join(lines), digest_size=16).hexdigest())


def write_rows(rows: Iterable[Mapping[str, Any]], key: object) -> RawRows:
    """Rows as JSON in a memory-mapped file of the cache, which is written only if no earlier run has done so.

    Args:
        rows: one after another; they are not all in memory at once.
        key: differs from that of any other rows.
    """
    fingerprint = hashlib.blake2b(json.dumps([_LINES_VERSION, key]).encode(), digest_size=16).hexdigest()
    file = cache_file(f"lines-{fingerprint}")
    note = file.with_suffix(".json")
    if not file.exists():
        columns: dict[str, int] = {}
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".lines-") as temporary:
            written = Path(temporary) / file.name
            with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
                numbered = enumerate(rows)
                while portion := list(itertools.islice(numbered, 1000)):
                    for number, row in portion:
                        for name in row:
                            columns.setdefault(name, number)
                    lines = pa.array([_as_json(row) for _, row in portion], pa.large_binary())
                    writer.write_batch(pa.record_batch([lines], schema=_SCHEMA))
            written.with_suffix(".json").write_text(json.dumps(columns))
            written.with_suffix(".json").replace(note)
            written.replace(file)  # last, so that nobody finds half of it
    return RawRows(datasets.Dataset.from_file(str(file)), fingerprint, json.loads(note.read_text()), is_text=True)


def cache_file(name: str) -> Path:
    """A file of ours in the cache of ``datasets``."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lit_isdpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def _as_json(row: Mapping[str, Any]) -> bytes:
    """A row as JSON, which may hold half a surrogate pair."""
    return json.dumps(row, default=_plain, ensure_ascii=False).encode(errors="surrogatepass")


def _plain(value: Any) -> Any:
    """NumPy's values in plain types. Any other value that JSON cannot write becomes an object, which is no text."""
    return value.tolist() if hasattr(value, "tolist") else {"type": type(value).__name__, "value": str(value)}


def _parse(
    values: Mapping[str, Any], *, is_text: bool, renamed: Mapping[str, str | None], missing: tuple[str, ...]
) -> Row:
    row = json.loads(values["line"]) if is_text else {name: _without_nulls(value) for name, value in values.items()}
    return dict.fromkeys(missing) | _rename(row, renamed)


def _rename(row: Mapping[str, Any], renamed: Mapping[str, str | None]) -> dict[str, Any]:
    if not renamed:
        return dict(row)
    moved = {name: row[column] for name, column in renamed.items() if column is not None and column in row}
    gone = {*renamed, *renamed.values()}
    return {name: value for name, value in row.items() if name not in gone} | moved


def _without_nulls(value: Any) -> Any:
    """A typed table gives every object the keys of all others, with ``None`` as their value."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
