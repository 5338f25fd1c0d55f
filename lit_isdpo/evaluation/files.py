"""Files that are there whole or not at all, and tables that are what was written or count as none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from os import getpid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DIGEST = b"lit_isdpo:digest"  # of a table's metadata


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
    """Likewise, of a table, as Parquet, with a digest of its values: Parquet's own checksums leave headers out.

    Raises:
        OSError: as ``write_whole``.
    """
    marked = table.replace_schema_metadata({DIGEST: _digest(table)})
    write_whole(path, lambda file: pq.write_table(marked, file))


def read_table(path: Path) -> pa.Table | None:
    """The table; ``None`` where it is missing, torn, or not what was written."""
    try:
        table = pq.read_table(path)
        is_whole = (table.schema.metadata or {}).get(DIGEST) == _digest(table)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # a flipped bit is met by whatever parses it
        return None
    return table if is_whole else None


def _digest(table: pa.Table) -> bytes:
    return blake2b(repr(table.to_pydict()).encode(), digest_size=16).hexdigest().encode()
