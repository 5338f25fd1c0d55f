"""Files that are whole or not there, and tables that are what was written or count as none."""

import errno
from pathlib import Path

import pyarrow as pa
import pytest

from lit_isdpo.evaluation.store import read_table, write_table, write_text, write_whole

TABLE = pa.table({"key": [2**40 + n for n in range(20)], "logps": [-n / 7 for n in range(20)], "ids": [[1, 2]] * 20})


def test_a_flipped_bit_anywhere_is_no_other_table(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    write_table(file, TABLE)
    assert read_table(file).equals(TABLE)
    written = file.read_bytes()
    survived = 0
    for place in range(0, len(written), 5):
        damaged = bytearray(written)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        table = read_table(file)
        assert table is None or table.to_pydict() == TABLE.to_pydict(), place
        survived += table is not None
    assert 0 < survived < len(written) / 10, "of statistics and names of the writer"
    file.write_bytes(written[:-9])
    assert read_table(file) is None


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    def full(file: Path) -> None:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "folder" / "file.json"
    write_text(file, "old")
    with pytest.raises(OSError, match=r"No space left on device: '.*folder/file.json'"):
        write_whole(file, full)
    assert [path.name for path in file.parent.iterdir()] == ["file.json"]
    assert file.read_text() == "old"
