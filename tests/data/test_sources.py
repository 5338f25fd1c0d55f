import bz2
import gzip
import logging
import lzma
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import jsonargparse
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from lit_isdpo.data import sources
from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.sources import DataSource, as_sources, open_source
from lit_isdpo.types import InputError

ROWS = [{"prompt": str(i), "chosen": "None", "rejected": "5"} for i in range(4)]
REAL = Path(__file__).parents[3] / "shared" / "data"


def opened(path, **options):
    return open_source(DataSource(str(path), **options), "data.train")


def read(path, **options):
    """Column by column."""
    source = opened(path, **options)
    rows = list(source.read(source.choose("train")))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "[a] b*.jsonl"])
def test_formats_give_the_same_rows(tmp_path, write_rows, name):
    table, file = datasets.Dataset.from_list(ROWS), tmp_path / name
    if name.endswith(".jsonl"):
        write_rows(file, ROWS)
    elif name == "a.json":
        file.write_text(repr(ROWS).replace("'", '"').replace("}, {", "},\n {"))
    elif name == "a.parquet":
        table.to_parquet(file)
    else:
        table.to_csv(file, index=False, sep="\t" if name.endswith(".tsv") else ",")
    assert read(file) == table[:]


@pytest.mark.parametrize(("first", "prompts"), [(2, ["0", "1"]), (9, ["0", "1", "2", "3"])])
def test_the_first_rows_alone(tmp_path, write_rows, first, prompts):
    assert read(write_rows(tmp_path / "pairs.jsonl", ROWS), first=first)["prompt"] == prompts


def test_a_file_is_not_read_beyond_the_first_rows(tmp_path, write_rows):
    file = Path(write_rows(tmp_path / "pairs.jsonl", ROWS))
    file.write_text(file.read_text() + "{\n")
    assert read(file, first=4)["prompt"] == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match="line 5 is not JSON"):
        read(file, first=5)


def test_arrow_folders_are_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")["prompt"] == ["0", "1", "2", "3"]
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: {"chosen": "other"}).filter(lambda row: row["prompt"] == "0")  # leave files in the folder
    assert len([*(tmp_path / "saved").glob("*.arrow")]) > 1
    assert read(tmp_path / "saved")["chosen"] == ["None"] * 4


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_text_is_read(tmp_path, write_rows, suffix, compress):
    plain = Path(write_rows(tmp_path / "plain", ROWS)).read_bytes()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(plain))
    assert read(tmp_path / f"a.jsonl{suffix}")["prompt"] == ["0", "1", "2", "3"]


def test_every_cell_of_a_csv_file_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen_behavior_logps\n1,NA,,-1.5\n2,3,nan,\n")
    assert read(tmp_path / "a.csv") == {
        "prompt": ["1", "2"],
        "chosen": ["NA", "3"],
        "rejected": ["", "nan"],
        "chosen_behavior_logps": ["-1.5", ""],
    }


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "val", "test", "more"], {"train": ["more", "train"], "validation": ["val"], "test": ["test"]}),
        (["pairs.train", "pairs.test"], {"train": ["pairs.train"], "test": ["pairs.test"]}),
        (["v1.0-train", "v1.0-dev"], {"train": ["v1.0-train"], "validation": ["v1.0-dev"]}),
        (["train", "holdout"], {"train": ["train"], "validation": ["holdout"]}),
        (["pairs", "my-eval", "test"], {"train": ["pairs"], "validation": ["my-eval"], "test": ["test"]}),
        (["x", "train_sft", "train_prefs"], {"train_sft": 1, "train_prefs": 1, "other files": ["x"]}),
        (["my-train_0", "my-train_1", "dev"], {"train": ["my-train_0", "my-train_1"], "validation": ["dev"]}),
        (["train-00000-of-00002", "train-00001-of-00002"], {"train": ["train-00000-of-00002", "train-00001-of-00002"]}),
        (["train_sft", "train_prefs", "valid"], {"train_sft": 1, "train_prefs": 1, "validation": ["valid"]}),
        (["train/0", "test/0", ".hidden/train"], {"train": ["0"], "test": ["0"]}),
        (["a", "b"], {"train": ["a", "b"]}),
    ],
)
def test_files_of_a_folder_or_a_glob_are_splits_by_name(tmp_path, write_rows, names, splits):
    for name in names:
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    for path in (tmp_path, tmp_path / "**" / "*.jsonl"):
        files = {split: [file.stem for file in files] for split, files in opened(path).files.items()}
        assert files == {split: [split] if stems == 1 else stems for split, stems in splits.items()}


def test_a_json_file_of_one_object_says_something_of_the_rows_beside_it(tmp_path, write_rows):
    for name, text in (("info.json", '{"a": [\n1]}'), ("card.json", '{"prompt": "p"}')):
        (tmp_path / name).write_text(text)
        assert opened(tmp_path).files["train"], "where there is nothing else, it is read"
    write_rows(tmp_path / "more.json", ROWS)
    assert opened(tmp_path).files == {"train": [tmp_path / "more.json"]}
    write_rows(tmp_path / "test.json", ROWS[:1])
    assert opened(tmp_path).files == {"train": [tmp_path / "more.json"], "test": [tmp_path / "test.json"]}


def test_splits_are_chosen_by_name_by_use_or_because_there_is_one(tmp_path, write_rows):
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    assert opened(tmp_path).choose("train") == "train"
    assert opened(tmp_path, split="dev").choose("train") == "validation"
    assert opened(tmp_path / "dev.jsonl").choose("train") == "validation"
    with pytest.raises(InputError, match=r"has no split 'test'; name one of: validation, train|train, validation"):
        opened(tmp_path).choose("test")
    with pytest.raises(InputError, match="has no split 'test_prefs'"):
        opened(tmp_path, split="test_prefs").choose("train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"a": 1}\n{"a": \n', r"cannot read .*bad\.jsonl as json: line 2 is not JSON: .* at char"),
        ("bad.json.gz", b"nonsense", r"cannot read .*bad\.json\.gz as json: Not a gzipped file"),
        ("bad.json", b"[1, 2", r"cannot read .*bad\.json as json"),
        ("bad.parquet", b"nonsense", r"cannot read .*bad\.parquet as parquet: Parquet magic bytes"),
        ("bad.jsonl.gz", b"nonsense", r"cannot read .*bad\.jsonl\.gz as json: Not a gzipped file"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            r"cannot read .*cut\.jsonl\.gz as json: Compressed file",
        ),
        ("a.jsonl", b"", "is an empty data set"),
        ("a.json", b"[]", "is an empty data set"),
        ("a.csv", b"prompt,chosen\n", "is an empty data set"),
        ("a.xlsx", b"x", r"a\.xlsx' has an unknown suffix; known: \.jsonl"),
        ("a.parquet.gz", b"x", "has an unknown suffix"),
    ],
)
def test_bad_files_end_in_one_sentence(tmp_path, monkeypatch, capfd, caplog, name, content, message):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"^data\.train: .*" + message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_the_bad_file_among_several_is_named(tmp_path, write_rows):
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*b\.jsonl as json"):
        read(tmp_path)
    write_rows(tmp_path / "b.jsonl", [{"other": 1}])
    (tmp_path / "a.jsonl").rename(tmp_path / "a.csv")
    with pytest.raises(InputError, match="mixes files of several formats"):
        read(tmp_path)


def test_what_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no data files .* in the folder 'empty'"):
        opened("empty")
    for path in ("x", "x/y.jsonl", "./x", "/x/y", "*.jsonl"):
        with pytest.raises(InputError) as error:
            opened(path)
        assert str(error.value) == f"data.train: no such file, folder, glob or hub data set: {path!r}"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError("Name or service not known"), "the hub cannot be asked"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "no such file, folder, glob or hub data set: 'x/y'"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch, failure, message):
    def dataset_info(*args, **kwargs):
        raise failure

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    with pytest.raises(InputError, match=message):
        opened("x/y")


def test_a_hub_data_set_is_loaded_by_revision_and_name(monkeypatch):
    def dataset_info(*args, **kwargs):
        raise OfflineModeIsEnabled

    def load_dataset(path, name, revision):
        assert (path, name, revision) == ("x/y", "n", "r")
        return {"train_prefs": datasets.Dataset.from_list(ROWS), "test_prefs": datasets.Dataset.from_list(ROWS)}

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"name": "n", "revision": "r"}
    assert read("x/y", split="train_prefs", **options)["prompt"] == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match="has no split 'train'; name one of: train_prefs, test_prefs"):
        read("x/y", **options)


@pytest.mark.parametrize(
    ("name", "options", "is_text"),
    [
        ("train-00000.jsonl", {"field": None}, True),
        ("train.csv", {"sep": ",", "delimiter": None, "column_names": None}, True),
        ("train.csv", {"sep": ";"}, False),
        ("train.json", {"field": "rows"}, False),
        ("train.parquet", {}, False),
    ],
)
def test_text_files_of_the_hub_are_read_as_local_ones_are(tmp_path, write_rows, monkeypatch, name, options, is_text):
    rows = [{"prompt": "p", "chosen": "2024-01-10", "rejected": "null"}] * 2
    if name.endswith("csv"):
        datasets.Dataset.from_list(rows).to_csv(tmp_path / name, index=False)
    else:
        write_rows(tmp_path / name, rows)
    asked = []

    def load_dataset_builder(path, name_, revision):
        asked.append((path, name_, revision))
        data_files = {datasets.Split.TRAIN: [f"hf://datasets/x/y@abc/data/{name}"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=data_files, **options))

    def hf_hub_download(repo_id, filename, repo_type, revision):
        assert (repo_id, filename, repo_type, revision) == ("x/y", f"data/{name}", "dataset", "abc")
        return str(tmp_path / name)

    def load_dataset(path, name, revision):
        return {"train": datasets.Dataset.from_list(ROWS)}

    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hf_hub_download", hf_hub_download)
    for is_offline in (False, True):
        if is_offline:
            monkeypatch.setattr(HfApi, "dataset_info", Mock(side_effect=OfflineModeIsEnabled))
        found = read("x/y", name="n", revision="r")
        assert found["chosen"] == (["2024-01-10"] * 2 if is_text else ["None"] * 4)
        assert found["rejected"][0] == ("null" if is_text else "5")
    assert asked == [("x/y", "n", "r")], "without the hub nobody asks it"


def test_hub_options_of_a_local_path_are_refused(tmp_path, write_rows):
    with pytest.raises(InputError, match="name and revision are for hub data sets"):
        opened(write_rows(tmp_path / "a.jsonl", ROWS), revision="main")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"path": "a", "weight": 0}, "the weight of 'a' is 0; it must be above 0"),
        ({"path": "a", "weight": float("nan")}, "must be above 0"),
        ({"path": "a", "first": 0}, "first is 0 for 'a'; it must be at least 1 row"),
        ({"file": "a"}, "is neither a path nor {path, split, weight}"),
        ([], "an empty list"),
        ("", "an empty path"),
    ],
)
def test_impossible_sources_are_refused(value, message):
    with pytest.raises(InputError, match=message):
        as_sources(value, "data.train")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.train", "a.jsonl"], [DataSource("a.jsonl")]),
        (["--data.train", "[a.jsonl, b.jsonl]"], [DataSource("a.jsonl"), DataSource("b.jsonl")]),
        (["--data.train", "{path: a, split: dev}"], [DataSource("a", split="dev")]),
        (["--data.train", "[{path: a, weight: 2}, b]"], [DataSource("a", weight=2.0), DataSource("b")]),
        (["--config", "c.yaml"], [DataSource("a", weight=0.5, revision="r"), DataSource("b")]),
    ],
)
def test_sources_are_written_on_the_command_line(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("data:\n  init_args:\n    train:\n    - {path: a, weight: 0.5, revision: r}\n    - b\n")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(TextDataModule, "data")
    parser.set_defaults({"data": {"class_path": "lit_isdpo.data.datamodule.PreferenceDataModule"}})
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert data.sources["train"] == expected


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
@pytest.mark.parametrize(("name", "num_rows"), [("alpaca_pref", 400), ("hh_harmless", 300)])
def test_real_folders_have_their_splits(name, num_rows):
    source = opened(REAL / name)
    assert sorted(source.splits) == ["test", "train"]
    assert len(source.read("test")) == num_rows
