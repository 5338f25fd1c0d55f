"""The rows of a source as they were given, one by one: what was written as text is parsed when its row is asked for.

Nothing guesses the type of a column. ``datasets`` would, of JSON and CSV files: a response that is a date would come
out as a time, and one in quotation marks without them, if another row's value were a number. Rows of these files are
kept as lines of JSON. Parquet and Arrow files and tables of ``datasets`` state the types of their columns.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import pyarrow.compute as pc

from lit_isdpo.data.readers import Row
from lit_isdpo.types import InputError

LINE = "line"  # the only column of a table of lines
_LOOKED_AT = 1000  # first rows that a format may be recognised by
_AT_ONCE = 50
ALL_OR_NONE = ("system", "tools")  # in data with such a column every prompt is a conversation's


class BrokenRowError(ValueError):
    """A row whose text is not JSON, or not that of an object.

    Args:
        index: the row.
        problem: what is wrong, as the end of a sentence about it.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem


class Records:
    """N rows in their order.

    Args:
        table: a ``datasets.Dataset`` with typed columns, or with the one column ``LINE``.
        fingerprint: tells the rows from any others.
        is_text: whether it has that one column.
        late: of some names in the data, whether any line has them.
        renamed: what the user calls a column -> its name in the data; ``None`` hides a column.
        where: says in which file and line a row stands, given the row and what is wrong with it.
    """

    def __init__(
        self,
        table: Any,
        fingerprint: str,
        *,
        is_text: bool = False,
        late: Mapping[str, bool] | None = None,
        renamed: Mapping[str, str | None] | None = None,
        where: Callable[[int, str], str] = lambda row, problem: f"row {row} {problem}",
    ) -> None:
        if not is_text:  # pictures and sounds, which would be decoded, are no text
            media = [name for name, feature in table.features.items() if hasattr(feature, "decode")]
            table = table.remove_columns(media) if media else table
        self.table, self.fingerprint, self.is_text, self.where = table, fingerprint, is_text, where
        self.renamed, self.late = dict(renamed or {}), dict(late or {})
        self._column_names: list[str] | None = None
        self._missing: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        """A row.

        Raises:
            InputError: its text is not that of an object.
        """
        try:
            return self.parser()(self.table[index], index)
        except BrokenRowError as error:
            self.refuse(error)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def refuse(self, error: BrokenRowError) -> NoReturn:
        """Raises an ``InputError`` that says where the row stands."""
        raise InputError(self.where(error.index, error.problem)) from error

    def parser(self) -> Callable[[Mapping[str, Any], int], Row]:
        """Makes a row of a line of the table and its index; another process can have it."""
        if self._missing is None:
            self._missing = tuple(name for name in ALL_OR_NONE if self.is_text and self.has(name))
        return partial(_parse, is_text=self.is_text, renamed=self.renamed, missing=self._missing)

    def first(self, number: int) -> "Records":
        """The first rows; all of them if there are no more."""
        if number >= len(self):
            return self
        table, fingerprint = self.table.select(range(number)), f"{self.fingerprint} {number}"
        return Records(table, fingerprint, is_text=self.is_text, late=self.late, renamed=self.renamed, where=self.where)

    def column_names(self) -> list[str]:
        """The columns, by the user's names; of rows of text those of the first ones, and what stands further down.

        Lines are searched for a name that is asked for only where no row at the beginning has it, see ``has``.
        """
        if self._column_names is None:
            names = _rename(dict.fromkeys(self.table.column_names), self.renamed)
            self._column_names = list({name: None for row in self.start() for name in row} if self.is_text else names)
        return self._column_names

    def has(self, name: str) -> bool:
        """Whether any row has a column, by the user's name."""
        column = self.renamed.get(name, name)
        if name in self.column_names() or not self.is_text or column is None:
            return name in self.column_names()
        return self.late[column] if column in self.late else any_line_with(self.table, column)

    def check_renamed(self, name: str) -> None:
        """Checks that the columns that are renamed are there.

        Raises:
            InputError: one is not; ``name`` is what the message calls the source.
        """
        if not self.renamed:
            return
        plain = Records(self.table, self.fingerprint, is_text=self.is_text, late=self.late, where=self.where)
        there = plain.column_names()
        for wanted in self.renamed.values():
            if wanted is not None and not plain.has(wanted):
                raise InputError(f"{name}: data.columns: no column {wanted!r}; it has {', '.join(there) or '(none)'}")

    def start(self) -> Iterator[Row]:
        """The first rows, as many as a format may be recognised by."""
        parse = partial(_parse, is_text=self.is_text, renamed=self.renamed)
        for begin in range(0, min(len(self), _LOOKED_AT), _AT_ONCE):
            columns = self.table[begin : begin + _AT_ONCE]
            for place, values in enumerate(zip(*columns.values(), strict=True), begin):
                try:
                    yield parse(dict(zip(columns, values, strict=True)), place)
                except BrokenRowError as error:
                    self.refuse(error)

    def needed(self, names: set[str]) -> Any:
        """The table, without columns that no row is asked for: some public data sets hold their tokens, too."""
        if self.is_text:
            return self.table
        wanted = {self.renamed.get(name, name) for name in names}
        return self.table.select_columns([column for column in self.table.column_names if column in wanted])


def any_line_with(table: Any, name: str) -> bool:
    """Whether a line has a key: those are parsed that hold its name in quotation marks."""
    quoted = json.dumps(name, ensure_ascii=False)
    lines = table.data.column(LINE)
    for line in lines.filter(pc.match_substring(lines, quoted)).to_pylist():
        with suppress(ValueError, RecursionError):  # a broken line is found where it is read
            row = json.loads(line, strict=False)
            if isinstance(row, dict) and name in row:
                return True
    return False


def _parse(
    values: Mapping[str, Any],
    index: int,
    *,
    is_text: bool,
    renamed: Mapping[str, str | None],
    missing: tuple[str, ...] = (),
) -> Row:
    if not is_text:
        row = {name: _without_nulls(value) for name, value in values.items()}
        return _rename(row, renamed)
    try:
        row = json.loads(values[LINE], strict=False)
    except json.JSONDecodeError as error:
        raise BrokenRowError(index, f"is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a number of thousands of digits
        raise BrokenRowError(index, f"cannot be read: {error}") from None
    except RecursionError:
        raise BrokenRowError(index, "is nested too deeply") from None
    if not isinstance(row, dict):
        kinds: dict[type, str] = {str: "a text", list: "a list", bool: "a truth value", type(None): "null"}
        kind = kinds.get(type(row), "a number")
        raise BrokenRowError(index, f'is {kind} and no object, such as {{"prompt": ...}}')
    return dict.fromkeys(missing) | _rename(row, renamed)


def _rename(row: dict[str, Any], renamed: Mapping[str, str | None]) -> dict[str, Any]:
    if not renamed:
        return row
    moved = {name: row[column] for name, column in renamed.items() if column is not None and column in row}
    gone = {*renamed, *renamed.values()}
    return {name: value for name, value in row.items() if name not in gone} | moved


def _without_nulls(value: Any) -> Any:
    """A typed table gives every object the keys of all others, with ``None`` where it has none itself."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
