"""Reads files of rows: JSON and CSV, which may be compressed, and with ``datasets`` Parquet and Arrow."""

import bz2
import csv
import errno
import glob
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import datasets

from lit_isdpo.data.raw_rows import RawRows, typed_rows, write_rows
from lit_isdpo.data.row_fields import kind_of
from lit_isdpo.types import InputError, first_line

Reader = Literal["json", "csv", "parquet", "arrow"]
READERS: dict[str, Reader] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_OPENERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {  # suffix -> the first bytes, and the function to open it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
    ".zst": (
        b"\x28\xb5\x2f\xfd",
        lambda file: io.BufferedReader(importlib.import_module("zstandard").open(file, "rb")),
    ),
}
_BLANKS = b" \t\r\n\xef\xbb\xbf"  # and the mark that some editors put at the beginning of a file
_JSON = json.JSONDecoder(strict=False)


def suffixes(file: Path) -> tuple[str, str]:
    """The suffix of the format and that of the compression."""
    *_, last = ["", *(suffix.lower() for suffix in file.suffixes)]
    return (Path(file.stem).suffix.lower(), last) if last in _OPENERS else (last, "")


def reader_of(file: Path, option: str) -> Reader:
    """The reader for a file.

    Raises:
        InputError: no reader knows the suffix, or a package that it needs is not installed.
    """
    suffix, compression = suffixes(file)
    if suffix not in READERS or (compression and suffix in (".parquet", ".arrow")):
        raise InputError(
            f"{option}: {str(file)!r} has an unknown suffix; known: {', '.join(READERS)}, text also with "
            f"{', '.join(_OPENERS)}"
        )
    if compression == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise InputError(f"{option}: {str(file)!r} needs `pip install zstandard` to be read")
    return READERS[suffix]


def missing_shards(files: Sequence[Path]) -> list[Path]:
    """The files that are missing in sets such as ``train-00000-of-00003.parquet``.

    >>> [file.name for file in missing_shards([Path("train-00001-of-00003.jsonl"), Path("test.jsonl")])]
    ['train-00000-of-00003.jsonl', 'train-00002-of-00003.jsonl']
    """
    sets: dict[tuple[Path, str, str, str], dict[int, int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?)(\d+)-of-(\d+)(.*)", file.name, re.DOTALL):
            before, number, total, after = match.groups()
            sets.setdefault((file.parent, before, total, after), {})[int(number)] = len(number)
    missing = []
    for (parent, before, total, after), widths in sets.items():
        first = int(int(total) in widths and 0 not in widths)  # some count from 1
        width = max(widths.values())
        expected = range(first, min(int(total), 100_000) + first)
        missing += [
            parent / f"{before}{number:0{width}}-of-{total}{after}" for number in expected if number not in widths
        ]
    return missing


def read_files(files: list[Path], option: str, first: int | None = None) -> RawRows:
    """The rows of some files of one format.

    Args:
        files: one after another.
        option: for messages.
        first: a text file is not read beyond so many rows.

    Raises:
        InputError: a file cannot be read, or there are several formats.
    """
    readers = {suffixes(file)[0]: reader_of(file, option) for file in files}
    if len(set(readers.values())) > 1:
        raise InputError(f"{option}: {str(files[0].parent)!r} mixes files of several formats: {', '.join(readers)}")
    reader = next(iter(readers.values()))
    files = [file for file in files if file.stat().st_size]
    if reader in ("parquet", "arrow"):
        return _read_tables(files, reader, option)
    states = [_state(file) for file in files]

    def rows() -> Iterator[dict[str, Any]]:
        for file, state in zip(files, states, strict=True):
            with _naming(file, reader, option):
                yield from rows_of_text(file, reader)
                _check_unchanged(file, state)

    key = [first, *((str(file.absolute()), *state) for file, state in zip(files, states, strict=True))]
    return write_rows(islice(rows(), first), key)


@contextmanager
def _naming(file: Path, reader: Reader, option: str) -> Iterator[None]:
    """Turns any error of a file's reader into a sentence that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the cache cannot be written
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        name = str(file) if str(file).isprintable() else repr(str(file))
        raise InputError(f"{option}: cannot read {name} as {reader}: {first_line(first)}") from error


def _state(file: Path) -> tuple[int, int]:
    """When a file was last changed, in nanoseconds, and its size in bytes."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def _check_unchanged(file: Path, state: tuple[int, int]) -> None:
    if _state(file) != state:
        raise ValueError(f"{file.name!r} was changed while it was read; begin again when it is complete")


def rows_of_text(file: Path, reader: Reader) -> Iterator[dict[str, Any]]:
    """The rows of a JSON or CSV file, one by one.

    Raises:
        ValueError: names the fault and its line (from 1) or item (from 0).
        OSError, EOFError, lzma.LZMAError: the file does not match its suffix.
    """
    return _csv_rows(file) if reader == "csv" else _json_rows(file)


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with an object per line, a list of objects, or one object over many lines."""
    first = _first_line_of(file)
    if first.startswith(b"[") or (first and not _is_complete(first) and _is_complete(_whole(file))):
        content = _parsed(_whole(file), "the file")
        for number, item in enumerate(content if isinstance(content, list) else [content]):
            yield _checked(item, f"item {number}")
        return
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip(_BLANKS):
                yield _checked(_parsed(line, f"line {number}"), f"line {number}")


def _checked(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    kind = "is null" if row is None else kind_of(row)
    raise ValueError(f'{place} {kind} and no object, such as {{"prompt": ...}}')


def _parsed(text: bytes, place: str) -> Any:
    try:
        return _JSON.decode(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{place} cannot be read: {error}") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None


def _is_complete(text: bytes) -> bool:
    try:
        _parsed(text, "")
    except ValueError:
        return False
    return True


def _csv_rows(file: Path) -> Iterator[dict[str, str]]:
    """Every cell is text, as a CSV column has no type; a cell that is not there is missing."""
    separator = "\t" if suffixes(file)[0] == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    with _opened(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=separator, strict=True)
        try:
            names = next((row for row in rows if row), [])
            if not names:
                raise ValueError("it has no line with the names of its columns")
            if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
                raise ValueError(f"two columns are called {twice[0]!r}")
            for row in rows:
                if len(row) > len(names):
                    raise ValueError(f"line {rows.line_num} has {len(row)} cells, and the header has {len(names)}")
                if row:
                    yield dict(zip(names, row, strict=False))
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num} is not CSV: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(_not_utf8(file)) from None


def _not_utf8(file: Path) -> str:
    """Says which line of a text file is not UTF-8; the reader of CSV decodes many lines at once."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8: {error.reason}"
    raise AssertionError("all lines are UTF-8")


def is_one_object(file: Path) -> bool:
    """Whether a JSON file is one object: it describes the rows beside it, and holds no rows."""
    if suffixes(file)[0] != ".json":
        return False
    try:
        return _first_line_of(file).startswith(b"{") and _is_complete(_whole(file))
    except (OSError, EOFError, lzma.LZMAError):
        return False  # it is damaged, which its reader says


def _first_line_of(file: Path) -> bytes:
    with _opened(file) as lines:
        return next((line for line in lines if line.strip(_BLANKS)), b"").lstrip(_BLANKS)


def _opened(file: Path) -> IO[bytes]:
    """Opens a file, compressed or not, by its suffix or its first bytes."""
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


def _read_tables(files: list[Path], reader: Reader, option: str) -> RawRows:
    """The rows of files with typed columns; if the files differ in these, the rows become JSON."""
    try:
        return typed_rows(_load(files, reader) if files else datasets.Dataset.from_dict({}))
    except Exception:
        parts = []
        for file in files:  # one is at fault, or they do not go together
            with _naming(file, reader, option):
                parts.append(typed_rows(_load([file], reader)))
    return write_rows((row for part in parts for row in part), [part.fingerprint for part in parts])


def _load(files: list[Path], reader: Reader) -> Any:
    """Reads files with `datasets`, or finds them read by an earlier run."""
    states = [_state(file) for file in files]
    with quiet():
        builder = datasets.load_dataset_builder(
            reader,
            # `datasets` would take brackets in a file's name for a pattern.
            data_files={"rows": [glob.escape(str(file.absolute())) for file in files]},
            # Part of the cache's key, in which `datasets` has only times: archives give every version the same one.
            description=f"{sum(size for _, size in states)} bytes",
        )
        folder = Path(builder.cache_dir)
        builder.download_and_prepare()
        rows = builder.as_dataset(split="rows")
        for file, state in zip(files, states, strict=True):
            if _state(file) != state:
                shutil.rmtree(folder)
            _check_unchanged(file, state)
        return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the bars and the log lines of ``datasets`` off the terminal."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
