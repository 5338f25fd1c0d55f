"""Local files and rows in memory as records.

JSON and CSV files become lines of JSON, one per row, in a memory-mapped file that the next start finds again. Their
rows are parsed later, where they are tokenized. ``datasets`` reads Parquet and Arrow files.

The module is long because it holds all shapes of files in one place: each has few lines, and they share how a file is
opened, how a failure is put in words and where lines are kept.
"""

import bz2
import csv
import errno
import glob
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import pandas as pd
import pyarrow as pa

from lit_isdpo.data.records import ALL_OR_NONE, LINE, Records, any_line_with
from lit_isdpo.types import InputError

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
_OPENERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {  # suffix -> the first bytes, and what opens it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", lambda file: importlib.import_module("zstandard").open(file, "rb")),
}
_LINES_VERSION = 2  # part of the cache's key: raise it with every change to how files become lines
_BLANKS = b" \t\r\n\xef\xbb\xbf"  # and the mark that some editors put at the beginning of a file
_BLANK_TEXT = _BLANKS.decode("utf-8")
_CHUNK = 2**24  # bytes that are read at once
_SCHEMA = pa.schema([(LINE, pa.large_string())])


def reader_of(file: Path, option: str) -> Reader:
    """What reads a file.

    Raises:
        InputError: no reader knows the suffix, or a package that it needs is not there.
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


def read_files(files: list[Path], option: str) -> Records:
    """All rows of some files.

    Args:
        files: of one format.
        option: for messages.

    Raises:
        InputError: a file cannot be read, or they do not go together.
    """
    readers = {suffixes(file)[0]: reader_of(file, option) for file in files}
    if len(set(readers.values())) > 1:
        raise InputError(f"{option}: {str(files[0].parent)!r} mixes files of several formats: {', '.join(readers)}")
    reader = next(iter(readers.values()))
    read = _read_lines if reader in ("json", "csv") else _read_table
    try:
        return read([file for file in files if file.stat().st_size], reader, option)
    except InputError:
        raise
    except Exception as error:  # the readers raise whatever their libraries do
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the cache is what cannot be written
        for file in files if len(files) > 1 else ():  # one is at fault, or they do not go together
            read_files([file], option)
        together = f" and {len(files) - 1} more files together" if len(files) > 1 else ""
        raise InputError(_cannot_read(files[0], reader, option, _reason(error), together)) from error


def rows_in_memory(rows: Any, option: str) -> Records:
    """Rows that Python holds: a ``datasets.Dataset``, a ``DataFrame``, or mappings.

    Args:
        rows: one after another.
        option: for messages.

    Raises:
        InputError: a row is no mapping, or refers to itself.
    """
    if isinstance(rows, datasets.Dataset):
        if rows.format["type"] == "custom":
            raise InputError(
                f"{option}: the rows in memory have a transform; apply it with `map`, which keeps its result"
            )
        return Records(rows.with_format(None), rows._fingerprint)
    if isinstance(rows, pd.DataFrame):
        rows = [{name: _cell(value) for name, value in row.items()} for row in rows.to_dict("records")]
    lines = []
    for place, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"it is a {type(row).__name__} and no mapping")
            lines.append(json.dumps(dict(row), default=_plain))
        except (TypeError, ValueError) as error:
            raise InputError(f"{option}: row {place} in memory cannot be read: {error}") from error
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    return write_lines([lines], digest)


def _cell(value: Any) -> Any:
    """What a cell of a ``DataFrame`` holds; its NaN is a missing value."""
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value) else value


def _plain(value: Any) -> Any:
    """NumPy's values in plain types. Any other value that JSON cannot write becomes an object, which is no text."""
    return value.tolist() if hasattr(value, "tolist") else {"type": type(value).__name__, "value": str(value)}


def write_lines(rows: Iterable[Iterable[str]], key: object) -> Records:
    """Lines in a memory-mapped file of the cache, which is written only if no earlier run has done so.

    Args:
        rows: lines in portions, each the JSON of an object.
        key: tells these lines from any others.
    """
    fingerprint = hashlib.blake2b(json.dumps([_LINES_VERSION, key]).encode(), digest_size=16).hexdigest()
    file = cache_file(f"lines-{fingerprint}")
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".lines-") as temporary:
            written = Path(temporary) / file.name
            with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
                for portion in rows:
                    writer.write_batch(pa.record_batch([pa.array(portion, pa.large_string())], schema=_SCHEMA))
            table = datasets.Dataset.from_file(str(written))
            note = {name: any_line_with(table, name) for name in ALL_OR_NONE}
            (Path(temporary) / "note").write_text(json.dumps(note))
            (Path(temporary) / "note").replace(file.with_suffix(".json"))
            written.replace(file)  # nobody finds half of it
    table = datasets.Dataset.from_file(str(file))
    return Records(table, fingerprint, is_text=True, late=json.loads(file.with_suffix(".json").read_text()))


def cache_file(name: str) -> Path:
    """A file of ours in the cache of ``datasets``."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lit_isdpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def _read_lines(files: list[Path], reader: Reader, option: str) -> Records:
    """The rows of text files; a row that is no object is found where it is asked for."""
    states = [_state(file) for file in files]
    lines = (portion for file in files for portion in _portions(file, reader))

    def checked() -> Iterator[list[str]]:
        yield from lines
        for file, state in zip(files, states, strict=True):
            if _state(file) != state:
                raise ValueError(f"{file.name!r} was changed while it was read; begin again when it is complete")

    key = [(str(file.absolute()), *state) for file, state in zip(files, states, strict=True)]
    records = write_lines(checked(), key)
    records.where = partial(_where, files, reader, option)
    return records


def _state(file: Path) -> tuple[int, int]:
    """When a file was last changed, in nanoseconds, and its size in bytes."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def _portions(file: Path, reader: Reader) -> Iterator[list[str]]:
    """The rows of a text file as lines of JSON.

    Raises:
        ValueError: says what is wrong, in which line (from 1).
        OSError, EOFError, lzma.LZMAError: it is not what its suffix says.
    """
    if reader == "csv":
        yield from _csv_portions(file)
        return
    shape = _json_shape(file)
    if shape == "lines":
        yield from _json_lines(file)
        return
    rows = _parsed(_whole(file))
    yield from _encoded(rows if shape == "list" else [rows])


def _encoded(rows: Iterable[Any]) -> Iterator[list[str]]:
    """Rows as lines of JSON, in portions."""
    lines = (json.dumps(row, default=_plain) for row in rows)
    while portion := list(itertools.islice(lines, 1000)):
        yield portion


def _json_shape(file: Path) -> Literal["lines", "list", "object"]:
    """Whether a JSON file has an object a line, or is a list of objects, or one object over many lines."""
    with _opened(file) as lines:
        first = next((line for line in lines if line.strip(_BLANKS)), b"")
    if first.lstrip(_BLANKS).startswith(b"["):
        return "list"
    if not first or _is_complete(first) or not _is_complete(_whole(file)):
        return "lines"
    return "object"


def _json_lines(file: Path) -> Iterator[list[str]]:
    with _opened(file) as content:
        encoding = "utf-8-sig"
        while chunk := content.read(_CHUNK):
            try:
                text = (chunk + content.readline()).decode(encoding)
            except UnicodeDecodeError:
                raise ValueError(_not_utf8(file)) from None
            yield [line for line in text.split("\n") if line.strip(_BLANK_TEXT)]
            encoding = "utf-8"


def _csv_portions(file: Path) -> Iterator[list[str]]:
    """The rows of a CSV file; every cell is text, as a CSV column has no type, and one that is not there is missing."""
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
            portion = []
            for row in rows:
                if len(row) > len(names):
                    raise ValueError(f"line {rows.line_num} has {len(row)} cells, and the header has {len(names)}")
                if row:
                    portion.append(json.dumps(dict(zip(names, row, strict=False)), ensure_ascii=False))
                if len(portion) == 10_000:
                    yield portion
                    portion = []
            yield portion
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num} is not CSV: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(_not_utf8(file)) from None


def _not_utf8(file: Path) -> str:
    """Which line of a text file is not UTF-8, in words."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8: {error.reason}"
    raise AssertionError("all lines are UTF-8")


def is_one_object(file: Path) -> bool:
    """Whether a JSON file is one object: what says something of the rows beside it, and no rows."""
    if suffixes(file)[0] != ".json":
        return False
    try:
        with _opened(file) as lines:
            first = next((line for line in lines if line.strip(_BLANKS)), b"")
        return first.lstrip(_BLANKS).startswith(b"{") and _is_complete(_whole(file))
    except (OSError, EOFError, lzma.LZMAError):
        return False  # it is damaged, which its reader says


def _where(files: list[Path], reader: Reader, option: str, index: int, problem: str) -> str:
    """A sentence about a row of text files: which file, which line of it (from 1) or item (from 0)."""
    for file in files:
        shape = _json_shape(file) if reader == "json" else "lines"
        if shape == "lines":
            with _opened(file) as lines:
                rows = (f"line {number}" for number, line in enumerate(lines, 1) if line.strip(_BLANKS))
                names = list(rows)
        else:
            names = [f"item {number}" for number in range(sum(map(len, _portions(file, reader))))]
        if index < len(names):
            return _cannot_read(file, reader, option, f"{names[index]} {problem}")
        index -= len(names)
    raise AssertionError("the row is in none of the files")


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


def _is_complete(text: bytes) -> bool:
    try:
        _parsed(text)
    except ValueError:
        return False
    return True


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), strict=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the file is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("the file is nested too deeply") from None


def _read_table(files: list[Path], reader: Reader, option: str) -> Records:
    """The rows of files with typed columns; where the files differ in these, the rows become lines."""
    if not files:
        return Records(datasets.Dataset.from_dict({}), "empty")
    try:
        table = _load(files, reader)
    except Exception:
        if len(files) == 1:
            raise
        parts = [Records(_load([file], reader), "") for file in files]  # or one of them cannot be read
        rows = (row for part in parts for row in part)
        return write_lines(_encoded(rows), [part.table._fingerprint for part in parts])
    return Records(table, table._fingerprint)


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
                raise ValueError(f"{file.name!r} was changed while it was read; begin again when it is complete")
        return rows


def _cannot_read(file: Path, reader: Reader, option: str, reason: str, more: str = "") -> str:
    return f"{option}: cannot read {_printable(file)}{more} as {reader}: {reason}"


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _printable(file: Path) -> str:
    """A path for messages, on one line whatever is in its name."""
    return str(file) if str(file).isprintable() else repr(str(file))


def suffixes(file: Path) -> tuple[str, str]:
    """The suffix of the format and that of the compression."""
    *_, last = ["", *(suffix.lower() for suffix in file.suffixes)]
    return (Path(file.stem).suffix.lower(), last) if last in _OPENERS else (last, "")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the bars and the log lines of ``datasets`` off the terminal: what went wrong is said once, by us."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
