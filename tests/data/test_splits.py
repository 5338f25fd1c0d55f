"""Which rows belong to which split, and what is said of those that belong to none."""

import pytest
import torch

from lit_isdpo.data import outcomes
from lit_isdpo.data.datamodule import SFTDataModule
from lit_isdpo.types import InputError
from tests.data.conftest import RANKED, pairs


def test_rows_are_held_out_where_no_validation_rows_are_named(make, folder):
    reports = []
    for stage in ("fit", "validate"):
        data = make(train=str(folder / "train.jsonl"), val_size=0.25)
        data.setup(stage)
        reports.append(data.splits.counts)
        train, val = (set(data.splits.rows[split].positions.tolist()) for split in ("train", "val"))
        assert not train & val
        assert train | val == set(range(22))
        assert len(val) == 6
    assert reports[0] == reports[1]
    assert reports[0]["train"][0][2:5] == (22, 16, 6)
    assert data.splits.folders("val") == [folder / "train.jsonl"]
    assert data.splits.row_name("val", 17) == f"row 17 of {folder / 'train.jsonl'}"


def test_a_prompt_is_never_on_both_sides(make, tmp_path, write_rows):
    rows = [{"prompt": f"{i % 4}", "chosen": f" {i}", "rejected": "?"} for i in range(20)]
    data = make(train=write_rows(tmp_path / "a.jsonl", rows), val_size=1)
    data.setup("fit")
    assert len(data.splits.rows["val"]) == 5
    assert len({position % 4 for position in data.splits.rows["val"].positions.tolist()}) == 1
    for row in rows:
        row["prompt"] = "same"
    with pytest.raises(InputError, match="have 1 different prompt"):
        make(train=write_rows(tmp_path / "b.jsonl", rows)).setup("fit")


def test_a_test_split_is_that_of_train_or_named(make, folder):
    with pytest.raises(InputError, match=r"data\.test: no test rows are named"):
        make(train=str(folder / "train.jsonl")).setup("test")
    data = make(train=str(folder / "train.jsonl"), test=str(folder / "val.jsonl"))
    data.setup("test")
    assert len(data.splits.rows["test"]) == 5
    data = make(train={"path": str(folder), "split": "test"})
    with pytest.raises(InputError, match=r"data\.test: no test rows are named"):
        data.setup("test")


def test_a_mixture_counts_by_source(make, tmp_path, folder, write_rows, capsys, monkeypatch):
    monkeypatch.setattr(outcomes, "_LOG_WIDTH", 300)
    bad = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "", "rejected": "b"}]
    sources = [
        str(folder / "train.jsonl"),
        {"path": write_rows(tmp_path / "b.jsonl", pairs(6, 300) + bad), "weight": 2},
    ]
    data = make(train=sources, val=str(folder))
    data.setup("fit")
    second = data.splits.counts["train"][1]
    assert second[2:] == (8, 6, 0, {"identical pair": 1, "empty response": 1}, {}, "")
    assert data.order.steps_per_epoch == (22 + 2 * 6) // 4
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "data pairs share",
        f"train: {folder / 'train.jsonl'} (strings), kept 22 100.0%",
        f"train: {tmp_path / 'b.jsonl'} (strings), kept 6 75.0%",
        "left out: identical pair 1 12.5%",
        "left out: empty response 1 12.5%",
        f"val: {folder} [validation] (strings), kept 5 100.0%",
    ]
    assert data.splits.rows["train"].positions.tolist() == list(range(28))
    assert data.splits.row_name("train", 24) == f"row 2 of {tmp_path / 'b.jsonl'}"


def test_a_folder_that_a_mixture_names_twice_is_evaluated_once(make, folder):
    data = make(train=[str(folder), {"path": str(folder), "weight": 2}])
    data.setup("validate")
    assert len(data.splits.rows["val"]) == 5
    data = make(train=[str(folder), {"path": str(folder), "split": "val"}], val_size=6)
    data.setup("fit")
    assert data.splits.counts["val"][0].source == "held out of data.train"


def test_no_usable_row_is_an_error_with_the_reasons(make, tmp_path, write_rows):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3 + [{"prompt": "a", "chosen": None, "rejected": "b"}]
    with pytest.raises(
        InputError, match=r"a\.jsonl: none of the 4 rows can be used: 3 x identical pair, 1 x malformed"
    ):
        make(train=write_rows(tmp_path / "a.jsonl", rows)).setup("fit")


def test_a_row_of_several_responses_becomes_several_pairs(make, tmp_path, folder, write_rows, capsys, monkeypatch):
    monkeypatch.setattr(outcomes, "_LOG_WIDTH", 300)
    file = write_rows(tmp_path / "ranked.jsonl", RANKED)
    data = make(train=[str(folder / "val.jsonl"), file], val=file, pairing="all", format="auto")
    with pytest.raises(
        InputError, match=r"val\.jsonl: data\.pairing is 'all', but a row of format 'strings' is one pair"
    ):
        data.setup("fit")
    others = [write_rows(tmp_path / name, RANKED) for name in ("b.jsonl", "c.jsonl")]
    data = make(train=[file, *others], val=file, pairing="all", margin_column="scores", max_dropped_fraction=1)
    data.setup("fit")
    counts = data.splits.counts["train"][1]
    assert counts[2:4] == (4, 5)
    assert counts.dropped == {"empty response": 2, "no two responses with different scores": 1}
    assert counts.changed == {"duplicated row": 5}, "those of the file before"
    assert counts.lines == 8
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == [
        f"val: {file} (ranked) of 4 rows, kept 5 62.5%",
        "left out: empty response 2 25.0%",
        "left out: no two responses with different scores 1 12.5%",
    ]
    rows = data.splits.rows["train"]
    assert [data.splits.row_name("train", row_id).split()[1] for row_id in range(16)] == list("0001222300012223")
    assert [data.splits.row_name("train", row_id) for row_id in (7, 8, 15, 16)] == [
        f"row 3 of {file}",
        f"row 0 of {others[0]}",
        f"row 3 of {others[0]}",
        f"row 0 of {others[1]}",
    ]
    assert rows.positions.tolist()[:10] == [0, 1, 2, 5, 7, 8, 9, 10, 13, 15]
    _, pair = rows[3]
    assert [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in pair[:3]] == ["c", "1", "3"]
    assert pair.margin == 2.0


def test_pairs_of_one_prompt_are_held_out_together(make, tmp_path, write_rows):
    data = make(
        train=write_rows(tmp_path / "a.jsonl", RANKED), pairing="all", val_size=1, batch_size=1, max_dropped_fraction=1
    )
    data.setup("fit")
    names = [
        {data.splits.row_name(split, i) for i in data.splits.rows[split].positions.tolist()}
        for split in ("train", "val")
    ]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 3


def test_folders(make, folder):
    data = make(test=str(folder / "t*.jsonl"))
    assert data.splits.folders("train") == data.splits.folders("val") == [folder]
    assert data.splits.folders("test") == [folder]


def test_a_prompt_is_read_again_as_its_source_has_it(make, tmp_path, folder, write_rows):
    """Whole where its tokens were cut, messages as messages, from every source of a mixture and of rows held out."""
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * 40, "chosen": "b", "rejected": "c"}] * 2)
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    chats = write_rows(
        tmp_path / "chats.jsonl",
        [{"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "5"}]}],
    )
    sources = [write_rows(tmp_path / "ranked.jsonl", RANKED), long, chats, str(folder / "train.jsonl")]
    data = make(train=sources, val_size=4, max_length=60, max_prompt_length=30, pairing="best_worst")
    data.setup("fit")
    found = {prompt.text: prompt.source for split in ("train", "val") for prompt in data.prompts(split, 99)}
    assert found["a" * 29] == "a" * 40
    assert found["\n\nHuman: 2 + 2?\n\nAssistant:"] == turns[:1]
    assert all(found[name] == name for name in ("a", "d", "000", "021"))
    assert len(found) == 3 + 1 + 1 + 22
    firsts = [data.splits.prompt("train", row_id) for row_id in data.splits.first_rows("train")]
    assert [type(prompt) for prompt in firsts] == [str, str, list, str], "one a source"
    demonstrations = make(SFTDataModule, val=chats)
    demonstrations.setup("validate")
    assert demonstrations.prompts("val", 1)[0].source == turns[:1]


REPEATED = [*pairs(6), *pairs(2), {"prompt": "999", "chosen": " 9", "rejected": " 9"}]


@pytest.mark.parametrize(("duplicates", "kept", "num_dropped"), [("keep", 8, 1), ("drop", 6, 3)])
def test_repeated_rows_are_counted_and_dropped_where_that_is_wanted(
    make, tmp_path, write_rows, duplicates, kept, num_dropped
):
    file = write_rows(tmp_path / "a.jsonl", REPEATED)
    data = make(train=file, val_size=1, batch_size=1, duplicates=duplicates, max_dropped_fraction=0.5)
    data.setup("fit")
    (counts,) = data.splits.counts["train"]
    assert (counts.kept + counts.held_out, counts.num_dropped, counts.lines) == (kept, num_dropped, 9)
    assert (counts.dropped if duplicates == "drop" else counts.changed)["duplicated row"] == 2
    ids = torch.cat([data.splits.rows[split].positions for split in ("train", "val")])
    assert sorted(ids.tolist()) == list(range(kept))
    noted = list(data.splits.noted("train"))
    assert [(row["row"], row["because"], row["left_out"]) for row in noted] == [
        (6, ["duplicated row"], duplicates == "drop"),
        (7, ["duplicated row"], duplicates == "drop"),
        (8, ["identical pair"], True),
    ]
    assert noted[0]["content"] == REPEATED[6]
    assert noted[0]["source"] == file


def test_more_left_out_than_is_allowed_stops(make, tmp_path, write_rows):
    file = write_rows(tmp_path / "a.jsonl", REPEATED)
    allowed = {"train": file, "val_size": 1, "batch_size": 1, "max_dropped_fraction": 1 / 9}
    make(**allowed).setup("fit")
    with pytest.raises(
        InputError,
        match=r"a\.jsonl: 1 of 9 rows must be left out \(1 x identical pair\), more than data\.max_dropped_fraction "
        r"allows, which is 0\.11; .*inspect --listing",
    ):
        make(**allowed | {"max_dropped_fraction": 0.11}).setup("fit")
    for options, message in (
        ({"max_dropped_fraction": 1.5}, "must lie between 0 and 1"),
        ({"max_dropped_fraction": float("nan")}, "must lie between 0 and 1"),
        ({"duplicates": "both"}, "known: keep, drop"),
    ):
        with pytest.raises(InputError, match=message):
            make(**options)


def test_every_line_has_one_fate_and_the_metrics_say_it(make, tmp_path, write_rows):
    rows = [
        *pairs(20),
        {"prompt": "p" * 40, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a" * 60, "rejected": "b"},
        {"prompt": "p", "chosen": "a<eos>b", "rejected": "b"},
        {"prompt": "p", "chosen": "a" * 60 + "b", "rejected": "a" * 60 + "c"},
        {"prompt": "p", "chosen": None, "rejected": "c"},
    ]
    data = make(train=write_rows(tmp_path / "a.jsonl", rows), val_size=2, max_length=60, max_prompt_length=30)
    data.setup("fit")
    (counts,) = data.splits.counts["train"]
    assert counts.dropped == {"identical after truncation": 1, "malformed row: chosen is missing": 1}
    assert counts.changed == {"prompt cut": 1, "response cut": 1, "terminator inside a response": 1}
    assert counts.kept + counts.held_out + counts.num_dropped == counts.lines == counts.read == 25
    values = outcomes.metrics(data.splits.counts)
    assert values["data/train/read"] == 25
    assert values["data/train/kept"] + values["data/train/held_out"] == 23
    assert values["data/train/dropped_fraction"] == 2 / 25
    assert values["data/train/dropped/identical_after_truncation"] == 1
    assert values["data/train/dropped/malformed_row"] == 1
    assert values["data/train/changed/terminator_inside_a_response"] == 1
    assert values["data/val/kept"] == values["data/train/held_out"]
