"""What `inspect` shows of the data, and that what it calls masked and trained on is what the loss sees."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lit_isdpo.cli import main
from lit_isdpo.commands.inspect import bars, show_row
from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule


@pytest.fixture
def dirty(tmp_path, pairs_file):
    """The forty good pairs and four that are not."""
    bad = [
        {"prompt": "POST: color bad TL;DR:", "chosen": " same", "rejected": " same"},
        {"prompt": "POST: color bad TL;DR:", "chosen": "", "rejected": " color bad"},
        {"prompt": "POST: color bad TL;DR:", "chosen": " color" * 70, "rejected": " color bad"},
    ]
    good = Path(pairs_file).read_text().splitlines(keepends=True)
    file = tmp_path / "dirty.jsonl"
    file.write_text("".join([*good, *(json.dumps(row) + "\n" for row in bad), good[0]]))
    return str(file)


def inspect(tiny, *options):
    drop = ("--data.batch_size", "--data.train")
    main(["inspect", *(option for option in tiny if not option.startswith(drop)), *options])


def test_counts_lengths_labels_and_pairs(tiny, dirty, tmp_path, capsys):
    listing = tmp_path / "rows.jsonl"
    root = tmp_path / "runs"
    inspect(
        tiny, f"--data.train={dirty}", f"--listing={listing}", "--num_pairs=2", f"--trainer.default_root_dir={root}"
    )
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "left out: identical pair 1 2.3%",
        "left out: empty response 1 2.3%",
        "kept, but response cut 1 2.3%",
        "kept, but duplicated row 1 2.3%",
        "Tokens of train",
        "Labels of train",
    ):
        assert line in lines
    assert sum("tokens, masked" in line for line in lines) == 2
    assert sum("trained on, ends" in line for line in lines) == 4
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [(row["row"], row["because"], row["left_out"]) for row in rows] == [
        (40, ["identical pair"], True),
        (41, ["empty response"], True),
        (42, ["response cut"], False),
        (43, ["duplicated row"], False),
    ]
    assert rows[1]["content"]["rejected"] == " color bad"
    assert not root.exists(), "nothing is trained, nothing is left"


def test_a_row_is_shown_by_its_number(tiny, dirty, pairs_file, capsys):
    sources = (f"--data.train={dirty}", f"--data.val={pairs_file}")
    inspect(tiny, *sources, "--rows=[42]")
    out = capsys.readouterr().out
    assert f"row 42 of {dirty}" in out
    assert "tokens, trained on, cut, so that nothing ends it" in out
    with pytest.raises(SystemExit):
        inspect(tiny, *sources, "--rows=[41, 0]")
    assert capsys.readouterr().err == (
        "error: rows: [41] are no train rows: held out (--split val) or left out (--listing FILE says why).\n"
    )


def test_data_of_which_nothing_can_be_used_is_listed_too(tiny, tmp_path, capsys):
    file, listing = tmp_path / "bad.jsonl", tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    inspect(tiny, f"--data.train={file}", f"--listing={listing}")
    assert "No row of train can be used." in capsys.readouterr().out
    assert len(listing.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_pairs=-1", "num_pairs must be at least 0, not -1."),
        ("--split=test", "split: there are no test rows in data; there are: train, val."),
        ("--listing=/nowhere/rows.jsonl", "listing: cannot write '/nowhere/rows.jsonl': No such file or directory."),
    ],
)
def test_bad_options_get_one_sentence(option, message, tiny, pairs_file, capsys):
    with pytest.raises(SystemExit) as stop:
        inspect(tiny, f"--data.train={pairs_file}", option)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("cls", [PreferenceDataModule, SFTDataModule])
def test_what_is_shown_as_trained_on_is_what_the_batch_masks(cls, pairs_file, model_dir):
    data = cls(train=pairs_file, val_size=8, tokenizer=model_dir, batch_size=8)
    data.setup("fit")
    row_id, item = data.splits.rows["train"][3]
    text = "\n".join(line.plain for line in show_row(data, "train", row_id, separator="|"))
    parts = {"prompt": item.prompt_ids, "chosen": item[1]} if cls is PreferenceDataModule else {"completion": item[1]}
    for name, ids in parts.items():
        tokens = [data.tokenizer.decode([token]) for token in ids]
        assert f"  {name}, {len(ids)} tokens, " in text
        assert "|".join(token.strip() for token in tokens) in text.replace("| ", "|").replace("\n ", "\n")
    assert text.count("masked") == 1


def test_roles_have_colors(pairs_file, model_dir):
    data = PreferenceDataModule(train=pairs_file, val_size=8, tokenizer=model_dir, batch_size=8)
    data.setup("fit")
    row_id, _ = data.splits.rows["train"][0]
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        for line in show_row(data, "train", row_id):
            console.print(line)
    shown = capture.get()
    assert "\x1b[1;35m</s>\x1b[0m" in shown, "a special token"
    assert "\x1b[32m" in shown, "the chosen response"
    assert "\x1b[31m" in shown, "the rejected response"


def test_bars():
    assert bars(torch.tensor([1, 1, 1, 1, 9]), 10, num_bins=5) == "█   ▂"
    assert bars(torch.tensor([5]), 5, num_bins=3) == "  █"


def test_control_characters_are_written_out(write_pair, model_dir):
    data = PreferenceDataModule(train=write_pair("a\x1b[2J\tb"), val=write_pair("c"), tokenizer=model_dir, batch_size=1)
    data.setup("fit")
    text = "\n".join(line.plain for line in show_row(data, "train", 0))
    assert "a\\x1b[2J\\tb" in text
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}


@pytest.fixture
def write_pair(tmp_path):
    def write(response):
        file = tmp_path / f"{len(response)}.jsonl"
        file.write_text(json.dumps({"prompt": "POST:", "chosen": response, "rejected": "d"}) + "\n")
        return str(file)

    return write
