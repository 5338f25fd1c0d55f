"""Files that are there whole or not at all, and tables that are what was written or count as none."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import getpid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = b"lit_isdpo:schema"  # of a table's metadata: pages have checksums, the names and types of columns have not


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses in here (a full disk, a folder that is read only) is said of ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name first, so that nobody ever sees half of it; makes its folder.

    Args:
        path: of the file.
        write: writes it where it is told.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{getpid()}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # it may be what fills the disk
            raise


def write_text(path: Path, text: str) -> None:
    """Likewise, of a text.

    Raises:
        OSError: as ``write_whole``.
    """
    write_whole(path, lambda file: file.write_text(text))


def write_table(path: Path, table: pa.Table) -> None:
    """Likewise, of a table, as Parquet with checksums.

    Raises:
        OSError: as ``write_whole``.
    """
    marked = table.replace_schema_metadata({SCHEMA: _about(table)})
    write_whole(path, lambda file: pq.write_table(marked, file, write_page_checksum=True))


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The table, or some of its columns; ``None`` where it is missing, torn, or not what was written."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        is_whole = (table.schema.metadata or {}).get(SCHEMA, _about(table)) == _about(table)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # a flipped bit is met by whatever parses it
        return None
    if not is_whole:
        return None
    if columns is None:
        return table
    return table.select(list(columns)) if set(columns) <= set(table.column_names) else None


def _about(table: pa.Table) -> bytes:
    return " ".join(f"{field.name}:{field.type.id}" for field in table.schema).encode()
