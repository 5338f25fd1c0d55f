"""Label statistics of a few pairs, counted by hand."""

from lit_isdpo.commands.inspect import num_shared_prompts, profile_labels


def test_labels_are_profiled(make, tmp_path, write_rows):
    rows = [
        {"prompt": "p", "chosen": "abc", "rejected": "d"},  # chosen longer by 2
        {"prompt": "p", "chosen": "d", "rejected": "abc"},  # the opposite
        {"prompt": "p", "chosen": "d", "rejected": "e"},  # equally long
        {"prompt": "q", "chosen": "f", "rejected": "g" * 30},  # rejected longer, and cut to 13 tokens, chosen has 2
        {"prompt": "r", "chosen": "abc", "rejected": "d"},
    ]
    train = write_rows(tmp_path / "a.jsonl", rows)
    val = write_rows(tmp_path / "b.jsonl", rows[3:])
    data = make(train=train, val=val, batch_size=1, max_length=15, max_prompt_length=2)
    data.setup("fit")
    train, val = data.splits.rows["train"], data.splits.rows["val"]
    of_pairs, others = profile_labels(train, [data.tokenizer.eos_token_id])
    assert of_pairs == {
        "the chosen response is longer": 2,
        "the rejected response is longer": 2,
        "both are equally long": 1,
        "the chosen response was cut": 0,
        "the rejected response was cut": 1,
        "another pair says the opposite": 2,
    }
    assert others == {
        "different prompts": "3",
        "most pairs of one prompt": "3",
        "responses chosen here and rejected there": "2",  # "abc" and "d" after "p"
        "tokens, chosen minus rejected, mean": f"{(2 - 2 + 0 - 11 + 2) / 5:+.1f}",
    }
    assert num_shared_prompts(val, train) == 2
    assert num_shared_prompts(train, val) == 2
    assert {name: count.tolist() for name, count in val.num_tokens().items()} == {
        "prompt": [2, 2],
        "chosen": [2, 4],
        "rejected": [13, 2],
    }
    assert val.lengths().tolist() == [17, 8]
