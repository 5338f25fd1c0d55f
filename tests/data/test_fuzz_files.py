"""Any file: its rows, or one sentence that names it; and once it is mended, its rows."""

import bz2
import gc
import gzip
import json
import lzma
import os
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_isdpo.data import file_readers
from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.types import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i} caf\u00e9", "rejected": "5", "weight": i / 2} for i in range(6)]
LINES = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
GOOD = "".join(LINES).encode()
HEADER = b"prompt,chosen,rejected\n"
MESSAGE = '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n'


def rows_of(tokenizer_path: str, path: Path | str) -> dict[str, Any] | str:
    """What is read, or the sentence; anything else that is raised fails the test."""
    options = {"val_size": 1, "batch_size": 1, "max_dropped_fraction": 1.0}
    module = PreferenceDataModule(train=str(path), tokenizer=tokenizer_path, **options)
    sentence = ""
    try:
        module.setup("fit")
    except InputError as error:
        sentence = str(error)
    if " as csv: " in sentence:
        gc.collect()  # now: pandas leaves a file that it refuses open, and another test would be blamed for it
    if sentence:
        assert "\n" not in sentence
        assert sentence.startswith("data.")
        return sentence
    rows = list(module.splits._raw["train"][0])
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def as_table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def write_arrow(path: Path, new: Any = pa.ipc.new_stream) -> None:
    with pa.OSFile(str(path), "wb") as file, new(file, as_table().schema) as writer:
        writer.write_table(as_table())


def contents(folder: Path) -> dict[str, bytes]:
    """A good file of every kind."""
    table = datasets.Dataset(as_table())
    table.to_csv(folder / "a.csv", index=False)
    table.to_csv(folder / "a.tsv", index=False, sep="\t")
    table.to_parquet(folder / "a.parquet")
    write_arrow(folder / "a.arrow")
    write_arrow(folder / "b.arrow", pa.ipc.new_file)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"a.jsonl": GOOD, "a.ndjson": GOOD, "a.json": json.dumps(ROWS).encode()}
    packed = {".gz": lambda text: gzip.compress(text, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress}
    return files | {f"a.jsonl{suffix}": pack(GOOD) for suffix, pack in packed.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    datasets.disable_progress_bars()
    return contents(tmp_path_factory.mktemp("good"))


CASES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", LINES[0].encode() + b'{"prompt": \n' + LINES[1].encode(), "line 2 is not JSON"),
    ("a.jsonl", b"null\n" + GOOD, "line 1 is null and no object"),  # ends the process in pyarrow
    ("a.json", b"null", "line 1 is null and no object"),
    ("a.json", json.dumps([*ROWS, None]).encode(), "item 6 is null and no object"),
    ("a.jsonl", b"\xef\xbb\xbf\n \n" + LINES[0].encode() + b"\xef\xbb\xbf\n1\n", "line 5 is a number"),
    ("a.jsonl", b"1\n2\n", "line 1 is a number and no object"),
    ("a.jsonl", b"[1]\n[2]\n", "the file is not JSON"),
    ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1 is not "),
    ("a.jsonl", GOOD.decode().encode("latin-1"), "line 1 is not UTF-8"),
    ("a.jsonl", GOOD + b"\x00\x00\n", "line 7 is not JSON"),
    ("a.jsonl", b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n', "surrogate"),
    ("a.jsonl", b'{"x": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", "line 1 is nested too deeply"),
    ("a.jsonl", b"\n\n \n", "is an empty data set"),
    ("a.json", json.dumps({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}).encode(), "the format of its columns"),
    ("a.jsonl.gz", GOOD, "Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-99], "Compressed file ended"),
    ("a.jsonl.bz2", bz2.compress(GOOD * 99)[:-99], "Compressed file ended"),
    ("a.jsonl.xz", lzma.compress(GOOD * 99)[:-99], "Compressed file ended"),
    ("a.csv", b"prompt,chosen,rejected,chosen\n1,2,3,4\n", "two columns are called 'chosen'"),
    ("a.csv", HEADER + b"1,2,3,4\n5,6,7,8\n", "line 2 has 4 cells, and the header has 3"),  # else 1 and 5 are an index
    ("a.csv", HEADER + b"1,2,3\n1,2,3,4\n", "line 3 has 4 cells, and the header has 3"),
    ("a.csv", HEADER + b'1,"2,3\n', "line 2 is not CSV: unexpected end of data"),
    ("a.csv", HEADER + "1,caf\u00e9,3\n".encode("latin-1"), "line 2 is not UTF-8"),
    ("a.csv", b"\n\n", "it has no line with the names of its columns"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), CASES, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(CASES)]
)
def test_a_broken_file_is_named_in_a_sentence(
    tokenizer_path: str, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    found = rows_of(tokenizer_path, tmp_path / name)
    assert message in found
    assert name in found


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD, 6),
        ("a.jsonl", LINES[0].encode() + b"\n\n" + LINES[1].encode(), 2),
        ("a.jsonl", json.dumps(ROWS).encode(), 6),
        ("a.jsonl", gzip.compress(GOOD), 6),
        ("a.jsonl", GOOD.replace(b"{", b'{"id": 1, '), 6),
        ("a.csv", b"\xef\xbb\xbf" + HEADER + b"1,2,3\n4,5,6\n", 2),
        ("[a]{b}*?.jsonl", GOOD, 6),
        ("\u05d0\u0301\U0001f600 x.jsonl", GOOD, 6),
        ("a\nb.jsonl", GOOD, 6),
    ],
    ids=[
        "BOM",
        "blank lines",
        "a list",
        "gzip inside",
        "ids twice",
        "CSV BOM",
        "brackets",
        "unicode",
        "newline",
    ],
)
def test_what_is_odd_but_clear_is_read(
    tokenizer_path: str, tmp_path: Path, name: str, content: bytes, prompts: int
) -> None:
    (tmp_path / name).write_bytes(content)
    found = rows_of(tokenizer_path, tmp_path / name)
    assert isinstance(found, dict)
    assert len(found["prompt"]) == prompts


def test_text_that_is_json_stays_text(tokenizer_path: str, tmp_path: Path) -> None:
    """`datasets` would take the marks off, were the column of another type in another row."""
    said = ['"To be."', "null", "0", "[1]", '{"a": 1}']
    rows = [
        {"prompt": f"p{i}", "chosen": text, "rejected": "r", "other": [{}, "x"][i % 2]} for i, text in enumerate(said)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rows_of(tokenizer_path, tmp_path / "a.jsonl")
    assert isinstance(found, dict)
    assert found["chosen"] == said


def test_a_csv_cell_keeps_its_nul_and_a_short_row_is_dropped(tokenizer_path: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(HEADER + b"1,a\x00b,3\n4,5\n7,8,9\n")
    found = rows_of(tokenizer_path, tmp_path / "a.csv")
    assert isinstance(found, dict)
    assert (found["chosen"], found["rejected"]) == (["a\x00b", "5", "8"], ["3", None, "9"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("null\n", "train-1.jsonl as json: line 1 is null"),
        ("[1\n", "train-1.jsonl as json: the file is not JSON"),
        ('{"prompt": "caf\udce9"}\n', "train-1.jsonl as json: line 1 is not UTF-8"),
    ],
    ids=["no object", "no list", "no UTF-8"],
)
def test_the_broken_file_is_named(tokenizer_path: str, tmp_path: Path, other: str, message: str) -> None:
    for number, text in enumerate((LINES[0].replace(', "weight": 0.0', ""), other)):
        (tmp_path / f"train-{number}.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert message in rows_of(tokenizer_path, tmp_path)


@pytest.mark.parametrize("pattern", ["", "*.jsonl"], ids=["folder", "glob"])
def test_missing_shards_are_named(tokenizer_path: str, tmp_path: Path, pattern: str) -> None:
    (tmp_path / "train-00001-of-00003.jsonl").write_bytes(GOOD)
    found = rows_of(tokenizer_path, tmp_path / pattern)
    assert "lacks train-00000-of-00003.jsonl, train-00002-of-00003.jsonl; to read a part" in found
    assert isinstance(rows_of(tokenizer_path, tmp_path / "train-00001-of-00003.jsonl"), dict), "a file alone was meant"


def test_what_is_no_file(tokenizer_path: str, tmp_path: Path) -> None:
    for name in ("links", "pipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "val.jsonl").write_bytes(GOOD)
    (tmp_path / "links" / "train.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipes" / "train.jsonl")
    (tmp_path / "x.jsonl").mkdir()
    for path in (tmp_path / "links", tmp_path / "pipes"):
        assert "train.jsonl' is no file that can be read, or a link to none" in rows_of(tokenizer_path, path)
        assert "no such file" in rows_of(tokenizer_path, path / "train.jsonl")
    assert "no data files" in rows_of(tokenizer_path, tmp_path / "x.jsonl")
    for path in (tmp_path / ("a" * 5000 + ".jsonl"), "~nobody-of-this-name/a.jsonl"):
        assert "cannot be looked up" in rows_of(tokenizer_path, path)


def test_a_loop_of_links_gives_each_file_once(tokenizer_path: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "**" / "*.jsonl"):
        assert len(rows_of(tokenizer_path, path)["prompt"]) == 6


def test_a_mended_file_is_read_anew_even_if_its_time_stays(tokenizer_path: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for text, expected in ((GOOD[:-9], "line 6 is not JSON"), (GOOD, 6), (GOOD + LINES[0].encode(), 7)):
        file.write_bytes(text)
        os.utime(file, (1, 1))  # as archives do that are built to be the same
        found = rows_of(tokenizer_path, file)
        assert expected in found if isinstance(expected, str) else len(found["prompt"]) == expected


def test_a_file_that_changes_while_it_is_read(tokenizer_path: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD)
    os.utime(file, (1, 1))
    rows_of_text = file_readers.rows_of_text

    def append(path: Path, reader: file_readers.Reader) -> Any:
        yield from rows_of_text(path, reader)
        with path.open("ab") as content:
            content.write(LINES[0].encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_readers, "rows_of_text", append)
        assert "'a.jsonl' was changed while it was read" in rows_of(tokenizer_path, file)
    file.write_bytes(GOOD)
    os.utime(file, (1, 1))
    assert len(rows_of(tokenizer_path, file)["prompt"]) == 6, "what was read half is not kept"


def damaged(content: bytes, rng: Random) -> bytes:
    """The content after up to three accidents: flipped bits, zeros, bytes that are lost or added, an early end."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) or 1)
        match rng.choice(["flip", "zero", "lose", "add", "cut"]):
            case "flip" if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case "zero":
                changed[at : at + 8] = bytes(len(changed[at : at + 8]))
            case "lose":
                del changed[at : at + rng.randint(1, 20)]
            case "add":
                changed[at:at] = rng.choice(
                    [b"\x00", b"\xff", b"null\n", b"\n", b"{", b"]", b'"', b",", rng.randbytes(5)]
                )
            case "cut":
                del changed[at:]
    return bytes(changed)


@settings(suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 2**32), kind=st.integers(0, 10))
def test_damaged_bytes_give_rows_or_a_sentence(
    tokenizer_path: str, good: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, number: int, kind: int
) -> None:
    name = sorted(good)[kind]
    file = tmp_path_factory.mktemp("damaged") / name
    file.write_bytes(damaged(good[name], Random(number)))
    found = rows_of(tokenizer_path, file)
    assert isinstance(found, dict) or str(file) in found or "data.val_size" in found
    file.write_bytes(good[name])
    mended = rows_of(tokenizer_path, file)
    assert isinstance(mended, dict), mended
    assert mended["prompt"] == [row["prompt"] for row in ROWS]
