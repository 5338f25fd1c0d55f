import pytest

from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_isdpo.data.examples import check_format, check_pairing, detect_format, to_examples, to_pairs
from lit_isdpo.data.formats import FORMATS, Format
from lit_isdpo.data.outcomes import Reason, RowError
from lit_isdpo.data.row_fields import text_in
from lit_isdpo.types import InputError, PreferenceExample, SFTExample

USER, FOUR, FIVE = (
    {"role": role, "content": content} for role, content in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5"))
)
STRINGS = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
MESSAGES = {"prompt": "2 + 2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}
TRANSCRIPTS = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}
DIALOGUE = {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"}
QUERY = {"query": "2 + 2 =", "chosen": " 4<|endoftext|>", "rejected": " 5<|endoftext|>"}
RANKED = {"prompt": "2 + 2 =", "responses": [" 5", " 4", " 3"], "scores": [7, 9, 5]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (STRINGS, "strings"),
        (MESSAGES, "messages"),
        (TRANSCRIPTS, "transcripts"),
        ({**STRINGS, "prompt": [USER]}, "strings"),
        (DIALOGUE, "dialogues"),
        (QUERY, "queries"),
        (RANKED, "ranked"),
    ],
)
def test_pair_formats_are_recognised(row, expected):
    blank = dict.fromkeys(row)
    assert detect_format(list(row), [blank, row]) == expected


@pytest.mark.parametrize(
    ("row", "expected", "example"),
    [
        ({"prompt": "a", "completion": "b"}, "strings", SFTExample("a", "b")),
        ({"messages": [USER, FOUR]}, "messages", SFTExample([USER], "4")),
        ({"prompt": [USER], "completion": [FOUR]}, "messages", SFTExample([USER], "4")),
        (STRINGS, "strings", SFTExample("2 + 2 =", " 4")),
        ({**MESSAGES, "messages": [USER, FOUR]}, "messages", SFTExample([USER], "4")),
        (TRANSCRIPTS, "transcripts", SFTExample([USER], "4")),
    ],
)
def test_demonstrations_are_recognised_and_read(row, expected, example):
    assert detect_format(list(row), [row], kind="demonstrations") == expected
    assert to_examples(row, expected) == [example]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "question, answer is not known, the nearest, 'ranked', lacks scores or ranks, r",
        ),
        ({"a": "b"}, "a is not known; known for pairs: transcripts .chosen, rejected.; dialogues"),
        ({"prompt": "a", "chosen": "b"}, "the nearest, 'strings', lacks rejected; known"),
        (
            {"prompt": "a", "chosen": 1, "rejected": 2},
            "the nearest, 'strings', has strings in them, and no row at",
        ),
        (
            {"prompt": "a", "answers": []},
            "the nearest, 'nectar', has lists of {answer, rank} in them, and",
        ),
    ],
)
def test_unknown_columns_are_named_with_what_is_missing(row, message):
    with pytest.raises(InputError, match=f"^f.csv: the format of its columns .*{message}"):
        detect_format(list(row), [row], name="f.csv")


def test_formats_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"data\.format is 'alpaca'; known: auto, transcripts"):
        check_format("alpaca", ["prompt"])
    with pytest.raises(InputError, match="needs a column 'rejected'; it has prompt, chosen"):
        check_format("strings", ["prompt", "chosen"])
    with pytest.raises(InputError, match="needs a column 'scores or ranks'; it has prompt, responses"):
        check_format("ranked", ["prompt", "responses"])


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [(STRINGS, "strings", "2 + 2 ="), (MESSAGES, "messages", [USER]), (TRANSCRIPTS, "transcripts", [USER])],
)
def test_pairs_are_read(row, format, prompt):
    space = " " if format == "strings" else ""
    assert to_pairs(row, format) == [PreferenceExample(prompt, f"{space}4", f"{space}5")]


def test_only_the_last_turn_is_the_response():
    turns = [{"role": "system", "content": "Be brief."}, USER, FOUR, {"role": "user", "content": "3 + 3?"}]
    row = {
        "chosen": [*turns, {"role": "assistant", "content": "6", "score": 1.0}],
        "rejected": [*turns, {"role": "assistant", "content": "7"}],
    }
    assert to_pairs(row, "messages") == [PreferenceExample(turns, "6", "7")]
    begin = "\n\nHuman: 2 + 2?\n\nAssistant: 4\n\nHuman: 3 + 3?\n\nAssistant:"
    assert to_pairs({"chosen": f"{begin} 6", "rejected": f"{begin} 7"}, "transcripts") == [
        PreferenceExample(turns[1:], "6", "7")
    ]


def test_a_prompt_column_completes_a_conversation_only_where_it_lacks_one():
    alone = {"prompt": "2 + 2?", "chosen": [FOUR], "rejected": [FIVE]}
    system = {"role": "system", "content": "Be brief."}
    assert to_pairs(alone, "messages")[0].prompt == [USER]
    assert to_pairs({**alone, "prompt": [system, USER]}, "messages")[0].prompt == [system, USER]
    assert to_pairs({**MESSAGES, "prompt": [USER]}, "messages")[0].prompt == [USER]
    assert to_pairs({**MESSAGES, "prompt": "something else"}, "messages")[0].prompt == [USER]


def test_behavior_logps_are_read_and_checked():
    row = {**STRINGS, "chosen_behavior_logps": -1.5, "rejected_behavior_logps": -2}
    assert to_pairs(row, "strings")[0][3:5] == (-1.5, -2.0)
    for bad in (None, float("nan"), 0.5, "x"):
        with pytest.raises(RowError, match="malformed"):
            to_pairs({**row, "rejected_behavior_logps": bad}, "strings")


def test_weights_and_margins_are_read_where_they_are_named():
    row = {**STRINGS, "weight": 0.5, "margin": -2, "confidence": 0}
    assert to_pairs(row, "strings")[0][5:7] == (1.0, 0.0)
    assert to_pairs(row, "strings", weight_column="weight", margin_column="margin")[0][5:7] == (0.5, -2.0)
    assert to_pairs(row, "strings", weight_column="confidence")[0][5:7] == (0.0, 0.0)


@pytest.mark.parametrize("value", [None, "", "half", "nan", True, float("nan"), float("inf"), [1.0]])
def test_a_weight_or_margin_that_is_no_number_makes_a_row_malformed(value):
    for options in ({"weight_column": "w"}, {"margin_column": "w"}):
        with pytest.raises(RowError, match="malformed"):
            to_pairs({**STRINGS, "w": value}, "strings", **options)
    with pytest.raises(RowError, match="malformed"):
        to_pairs({**STRINGS, "w": -0.1}, "strings", weight_column="w")
    assert to_pairs({**STRINGS, "w": -0.1}, "strings", margin_column="w")[0].margin == -0.1


def test_ranked_responses_become_pairs_or_the_best_demonstration():
    pairs = to_pairs(RANKED, "ranked", pairing="all", margin_column="scores")
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [
        (" 4", " 5", 2.0),
        (" 4", " 3", 4.0),
        (" 5", " 3", 2.0),
    ]
    assert to_pairs(RANKED, "ranked") == [PreferenceExample("2 + 2 =", " 4", " 3")]
    assert to_examples(RANKED, "ranked") == [SFTExample("2 + 2 =", " 4")]
    weighted = to_pairs({**RANKED, "w": 3, "m": 0.5}, "ranked", weight_column="w", margin_column="m", pairing="all")
    assert {pair[5:7] for pair in weighted} == {(3.0, 0.5)}
    by_rank = {"instruction": "2 + 2?", "responses": ["5", "4"], "ranks": [2, 1]}
    assert to_pairs(by_rank, "ranked") == [PreferenceExample([USER], "4", "5")]
    assert to_pairs({**RANKED, "prompt": [USER]}, "ranked")[0].prompt == [USER]


def test_a_margin_is_a_number_although_its_scores_are_far_apart():
    with pytest.raises(RowError, match="malformed"):
        to_pairs({**RANKED, "scores": [3e38, -3e38, 0]}, "ranked", margin_column="scores")


@pytest.mark.parametrize("choice", [1, 1.0, True])
def test_a_choice_may_be_of_any_type_of_number(choice):
    info = {"subreddit": "a", "title": "b", "post": "c"}
    row = {"info": info, "summaries": [{"text": " d"}, {"text": " e"}], "choice": choice}
    assert to_pairs(row, "comparisons")[0][1:3] == (" e", " d")


def test_a_choice_of_pairs_is_refused_where_a_row_is_one():
    check_pairing("best_worst", "strings")
    check_pairing("all", "nectar")
    with pytest.raises(
        InputError, match=r"data\.pairing is 'all', but a row of format 'strings' is one pair.*\(ranked,"
    ):
        check_pairing("all", "strings")


def test_a_new_format_is_one_function_and_one_line(make, tmp_path, write_rows, monkeypatch):
    """Its columns hold text that looks like a date or a number; nothing else needs to know of it."""

    def read_debate(row, column):
        return SFTExample(text_in(row.get("motion"), "motion"), text_in(row.get(column), column))

    columns = ("motion, chosen, rejected", "motion, chosen")
    debates = Format(read_debate, *columns, lambda row, column: "motion" in row, "a motion and two speeches")
    monkeypatch.setitem(FORMATS, "debates", debates)
    rows = [{"motion": f"2024-01-1{i}", "chosen": "1e3", "rejected": "null", "note": i or "x"} for i in range(4)]
    for cls in (PreferenceDataModule, SFTDataModule):
        data = make(cls, val=write_rows(tmp_path / "a.jsonl", [*rows, {"motion": 5, "chosen": "a", "rejected": "b"}]))
        data.setup("validate")
        (counts,) = data.splits.counts["val"]
        assert (counts.format, counts.kept) == ("debates", 4)
        assert counts.dropped == {"malformed row: motion is a number": 1}
        assert data.prompts("val", 1)[0].source == "2024-01-10"
        assert data.tokenizer.decode(data.splits.rows["val"][0][1][1]) == "1e3<eos>"
    with pytest.raises(InputError, match=r"debates \(motion, chosen, rejected\)"):
        detect_format(["a"], [{"a": 1}])


OTHER = "\n\nHuman: 3 + 3?\n\nAssistant: 6"


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({**STRINGS, "chosen": None}, "strings", Reason.MALFORMED),
        ({**STRINGS, "prompt": 3}, "strings", Reason.MALFORMED),
        ({**STRINGS, "chosen": "a\ud800"}, "strings", Reason.MALFORMED),  # half a surrogate pair
        ({**MESSAGES, "chosen": [{**USER, "content": "\udfff"}, FOUR]}, "messages", Reason.MALFORMED),
        ({**MESSAGES, "chosen": []}, "messages", Reason.MALFORMED),
        ({**MESSAGES, "chosen": [USER]}, "messages", Reason.MALFORMED),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "messages", Reason.MALFORMED),
        ({**MESSAGES, "chosen": [USER, {"role": "assistant", "content": None}]}, "messages", Reason.MALFORMED),
        ({**MESSAGES, "chosen": [{"role": "narrator", "content": "a"}, FOUR]}, "messages", Reason.MALFORMED),
        ({**MESSAGES, "rejected": [{**USER, "content": "3 + 3?"}, FIVE]}, "messages", Reason.TWO_PROMPTS),
        ({**TRANSCRIPTS, "rejected": OTHER}, "transcripts", Reason.TWO_PROMPTS),
        ({**TRANSCRIPTS, "rejected": OTHER + "\n\nHuman: why?"}, "transcripts", Reason.MALFORMED),
        ({**TRANSCRIPTS, "rejected": "\n\nAssistant: 6"}, "transcripts", Reason.MALFORMED),
        ({**TRANSCRIPTS, "rejected": "Note." + OTHER}, "transcripts", Reason.MALFORMED),
        ({**DIALOGUE, "prompt": "\n\nHuman: 2 + 2?"}, "dialogues", Reason.MALFORMED),
        ({**DIALOGUE, "chosen": [FOUR]}, "dialogues", Reason.MALFORMED),
        ({**QUERY, "query": None}, "queries", Reason.MALFORMED),
        ({**RANKED, "scores": [1]}, "ranked", Reason.MALFORMED),
        ({**RANKED, "scores": [1, None, 3]}, "ranked", Reason.MALFORMED),
        ({**RANKED, "scores": [1, True, 3]}, "ranked", Reason.MALFORMED),
        ({**RANKED, "scores": [1, 10**400, 3]}, "ranked", Reason.MALFORMED),
        ({**RANKED, "scores": [1, 1e39, 3]}, "ranked", Reason.MALFORMED),  # no float32
        ({**RANKED, "scores": [1, float("nan"), 3]}, "ranked", Reason.MALFORMED),
        ({**RANKED, "responses": [" 4", None, " 6"]}, "ranked", Reason.MALFORMED),
        ({**RANKED, "scores": [2, 2, 2]}, "ranked", Reason.NO_PREFERENCE),
        ({**RANKED, "scores": [], "responses": []}, "ranked", Reason.NO_PREFERENCE),
    ],
)
def test_unusable_rows_say_why(row, format, reason):
    with pytest.raises(RowError) as error:
        to_pairs(row, format)
    assert error.value.reason is reason
