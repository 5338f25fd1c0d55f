"""Label statistics of a few pairs, counted by hand."""

from lit_isdpo.commands.inspect import LabelProfile, num_shared_prompts, profile_labels


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
    assert profile_labels(train, [data.tokenizer.eos_token_id]) == LabelProfile(
        chosen_longer=2,
        rejected_longer=2,
        mean_difference=(2 - 2 + 0 - 11 + 2) / 5,
        chosen_cut=0,
        rejected_cut=1,
        num_prompts=3,
        most_pairs=3,
        both_ways=2,  # "abc" and "d" after "p"
        contradicted=2,
    )
    assert num_shared_prompts(val, train) == 2
    assert num_shared_prompts(train, val) == 2
    assert {name: count.tolist() for name, count in val.num_tokens().items()} == {
        "prompt": [2, 2],
        "chosen": [2, 4],
        "rejected": [13, 2],
    }
    assert val.lengths().tolist() == [17, 8]
