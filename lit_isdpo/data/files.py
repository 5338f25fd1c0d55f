"""Local files as tables: which reader a name asks for, what is checked before it reads, what is said of a failure."""

import glob
import importlib.util
import math
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from lit_isdpo.data.formats import BEHAVIOR_COLUMNS
from lit_isdpo.data.intact import TEXT_COLUMNS, check_csv, check_json
from lit_isdpo.types import InputError


def _cell(text: str) -> float:
    """The number in a cell, NaN where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _csv(numbers: Collection[str] = ()) -> dict[str, Any]:
    """Options of the CSV reader, as a CSV column has no type of its own.

    Text is read as it stands, or a response "None" would be a missing one, and numbers cell by cell, or one bad cell
    would make text of the column.
    """
    return {
        "converters": dict.fromkeys(TEXT_COLUMNS, str) | dict.fromkeys(numbers, _cell),
        "keep_default_na": False,
        "na_values": {column: [""] for column in BEHAVIOR_COLUMNS},
    }


READERS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix -> the reader of `datasets` and its options
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # of text; Parquet and Arrow compress by themselves


def reader_of(file: Path, option: str) -> tuple[str, dict[str, Any]]:
    """The reader of ``datasets`` for a file, and its options.

    Raises:
        InputError: no reader knows the suffix, or a package that it needs is not there.
    """
    suffix, compression = suffixes(file)
    if suffix not in READERS or (compression and suffix in (".parquet", ".arrow")):
        raise InputError(
            f"{option}: {str(file)!r} has an unknown suffix; known: {', '.join(READERS)}, text also with "
            f"{', '.join(_COMPRESSED)}"
        )
    if compression == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise InputError(f"{option}: {str(file)!r} needs `pip install zstandard` to be read")
    return READERS[suffix]


def read_files(files: list[Path], option: str, numbers: Collection[str] = ()) -> Any:
    """One table of all rows of some files.

    Args:
        files: of one format.
        option: for messages.
        numbers: columns that a user names as numbers.

    Raises:
        InputError: a file cannot be read, or they do not go together.
    """
    readers = {suffixes(file)[0]: reader_of(file, option) for file in files}
    if len({reader for reader, _ in readers.values()}) > 1:
        raise InputError(f"{option}: {str(files[0].parent)!r} mixes files of several formats: {', '.join(readers)}")
    reader, options = readers[suffixes(files[0])[0]]
    if reader == "csv":
        options = _csv(numbers) | options
    try:
        files = [file for file in files if file.stat().st_size]
        return _load(files, reader, options) if files else []
    except Exception as error:  # the readers raise whatever their libraries do
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            return []
        reason = ""
        if len(files) > 1:  # one is at fault, or they do not go together
            reason = _difference(files, [read_files([file], option, numbers) for file in files])
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = reason or next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        which = _printable(files[0]) if len(files) == 1 else f"{_printable(files[0])} to {files[-1].name!r} together"
        raise InputError(f"{option}: cannot read {which} as {reader}: {reason}") from error


def _load(files: list[Path], reader: str, options: dict[str, Any]) -> Any:
    """Reads files with `datasets`, or finds them read by an earlier run."""
    states = [_state(file) for file in files]
    with quiet():
        builder = datasets.load_dataset_builder(
            reader,
            # `datasets` would take brackets in a file's name for a pattern.
            data_files={"rows": [glob.escape(str(file.absolute())) for file in files]},
            # Part of the cache's key, in which `datasets` has times alone: archives give every version the same one.
            description=f"{sum(size for _, size in states)} bytes",
            **options,
        )
        folder = Path(builder.cache_dir)
        if not folder.exists():
            for file in files:
                if reader == "json":
                    check_json(file)
                elif reader == "csv":
                    check_csv(file, options.get("sep", ","))
        builder.download_and_prepare()
        rows = builder.as_dataset(split="rows")
        for file, state in zip(files, states, strict=True):
            if _state(file) != state:
                shutil.rmtree(folder)
                raise ValueError(f"{file.name!r} was changed while it was read; begin again when it is complete")
        return rows


def _state(file: Path) -> tuple[int, int]:
    """When a file was last changed, in nanoseconds, and its size in bytes."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def _difference(files: list[Path], tables: list[Any]) -> str:
    """In which column files differ, in words; empty where they do not."""
    described = [(file, table.features) for file, table in zip(files, tables, strict=True) if len(table)]
    for file, features in described[1:]:
        first, expected = described[0]
        for column in [*expected, *features]:
            if column not in features or column not in expected:
                there, lacking = (first, file) if column in expected else (file, first)
                return f"{there.name!r} has a column {column!r}, which {lacking.name!r} lacks"
            if features[column] != expected[column]:
                return f"the column {column!r} is of another type in {file.name!r} than in {first.name!r}"
    return ""


def _printable(file: Path) -> str:
    """A path for messages, on one line whatever is in its name."""
    return str(file) if str(file).isprintable() else repr(str(file))


def suffixes(file: Path) -> tuple[str, str]:
    """The suffix of the format and that of the compression."""
    *_, last = ["", *(suffix.lower() for suffix in file.suffixes)]
    return (Path(file.stem).suffix.lower(), last) if last in _COMPRESSED else (last, "")


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
