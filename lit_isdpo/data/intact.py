"""What must be asked of a file before `datasets` reads it, because it would crash or change text without a word.

A JSON `null` where an object belongs ends the process in pyarrow (26.0). In a JSON column whose rows differ in type,
`datasets` reads a text that happens to be JSON as what it says: the response "null" is then none, and one in quotation
marks loses them. A CSV row that is longer than its header makes pandas take the first column for an index.
"""

import bz2
import gzip
import importlib
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pandas as pd

# Read as text by the formats, at the top of a row or in its lists of objects.
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "query", "reference_response", "question", "instruction")
_TEXT_FIELDS = ("content", "text", "answer", "response")
_LISTS = ("prompt", "chosen", "rejected", "completion", "messages", "summaries", "responses", "answers", "completions")
_OPENERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {  # suffix -> the first bytes, and what opens it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", lambda file: importlib.import_module("zstandard").open(file, "rb")),
}


def check_json(file: Path) -> None:
    """Reads all of a JSON file: a list of objects, one object, or an object a line.

    Raises:
        ValueError: says what is wrong in which line (from 1) or item (from 0).
        OSError, EOFError, lzma.LZMAError: it is not what its suffix says.
    """
    with _opened(file) as lines:
        first = next((line for line in lines if line.strip(b" \t\r\n\xef\xbb\xbf")), b"")
    if first.lstrip(b" \t\xef\xbb\xbf").startswith(b"["):
        rows = _parsed(_whole(file), "the file")
        _check_rows((f"item {number}", row) for number, row in enumerate(rows))
        return
    if first and not _is_complete(first):  # an object over many lines, perhaps
        whole = _whole(file)
        if _is_complete(whole):
            _check_rows([("the file", _parsed(whole, "the file"))])
            return
    with _opened(file) as lines:
        numbered = ((f"line {number}", line) for number, line in enumerate(lines, 1))
        _check_rows((where, _parsed(line, where)) for where, line in numbered if line.strip())


def check_csv(file: Path, separator: str) -> None:
    """Reads the beginning of a CSV file.

    Raises:
        ValueError: two columns have one name, or the first row has more cells than there are columns.
        OSError, EOFError, lzma.LZMAError: it is not what its suffix says.
    """
    with _opened(file) as content:
        head = pd.read_csv(content, sep=separator, header=None, nrows=2, dtype=str, keep_default_na=False)
    names = head.iloc[0].tolist()
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")


def missing_shards(names: Sequence[str]) -> list[str]:
    """The files that are not there of sets such as ``train-00000-of-00003.parquet``.

    >>> missing_shards(["train-00001-of-00003.jsonl", "test.jsonl"])
    ['train-00000-of-00003.jsonl', 'train-00002-of-00003.jsonl']
    """
    sets: dict[tuple[str, str, str], dict[int, int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d+)-of-(\d+)(.*)", name, re.DOTALL):
            before, number, total, after = match.groups()
            sets.setdefault((before, total, after), {})[int(number)] = len(number)
    missing = []
    for (before, total, after), widths in sets.items():
        first = int(int(total) in widths and 0 not in widths)  # some count from 1
        width = max(widths.values())
        expected = range(first, min(int(total), 100_000) + first)
        missing += [f"{before}{number:0{width}}-of-{total}{after}" for number in expected if number not in widths]
    return missing


def _opened(file: Path) -> IO[bytes]:
    """Opens a file as `datasets` would, by its suffix or its first bytes."""
    with file.open("rb") as content:
        head = content.read(6)
    for suffix, (magic, opener) in _OPENERS.items():
        if file.suffix.lower() == suffix or head.startswith(magic):
            opened: IO[bytes] = opener(file)
            return opened
    return file.open("rb")


def _whole(file: Path) -> bytes:
    with _opened(file) as content:
        return content.read()


def _is_complete(text: bytes) -> bool:
    try:
        _parsed(text, "")
    except ValueError:
        return False
    return True


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), strict=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


def _check_rows(rows: Iterator[tuple[str, Any]] | Sequence[tuple[str, Any]]) -> None:
    """Raises for a row that is no object, and for text that is something else in another row."""
    seen: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{where} is {_kind(row)} and no object, such as {{"prompt": ...}}')
        for name, value in _texts(row):
            if value is None:
                continue
            kind, elsewhere = seen.setdefault(name, (_kind(value), where))
            if kind != _kind(value) and "a text" in (kind, _kind(value)):
                raise ValueError(f"{name!r} is {kind} in {elsewhere} and {_kind(value)} in {where}")


def _texts(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the formats read as text, by the names of its columns."""
    for name in TEXT_COLUMNS:
        yield name, row.get(name)
    for name in _LISTS:
        items = row.get(name)
        for item in items if isinstance(items, list) else []:
            if not isinstance(item, dict):
                yield f"{name}[]", item
                continue
            for field in _TEXT_FIELDS:
                yield f"{name}[].{field}", item.get(field)


def _kind(value: object) -> str:
    kinds = {str: "a text", list: "a list", dict: "an object", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
