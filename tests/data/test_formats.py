import pytest

from lit_isdpo.data.formats import Reason, RowError, check_format, detect_format, to_example, to_pair
from lit_isdpo.types import InputError, PreferenceExample, SFTExample

USER, FOUR, FIVE = (
    {"role": role, "content": content} for role, content in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5"))
)
STRINGS = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
MESSAGES = {"prompt": "2 + 2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}
TRANSCRIPTS = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (STRINGS, "strings"),
        (MESSAGES, "messages"),
        (TRANSCRIPTS, "transcripts"),
        ({**STRINGS, "prompt": [USER]}, "strings"),
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
    assert to_example(row, expected) == example


def test_unknown_columns_are_named_with_the_known_formats():
    with pytest.raises(InputError, match=r"f\.csv: .*columns question, answer .*strings \(prompt, chosen, rejected"):
        detect_format(["question", "answer"], [{"question": "a", "answer": "b"}], name="f.csv")
    with pytest.raises(InputError, match=r"data\.format: no format 'alpaca'; known: auto, transcripts"):
        check_format("alpaca", ["prompt"])
    with pytest.raises(InputError, match="needs a column 'rejected'; it has prompt, chosen"):
        check_format("strings", ["prompt", "chosen"])


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [(STRINGS, "strings", "2 + 2 ="), (MESSAGES, "messages", [USER]), (TRANSCRIPTS, "transcripts", [USER])],
)
def test_pairs_are_read(row, format, prompt):
    space = " " if format == "strings" else ""
    assert to_pair(row, format) == PreferenceExample(prompt, f"{space}4", f"{space}5")


def test_only_the_last_turn_is_the_response():
    turns = [{"role": "system", "content": "Be brief."}, USER, FOUR, {"role": "user", "content": "3 + 3?"}]
    row = {
        "chosen": [*turns, {"role": "assistant", "content": "6", "score": 1.0}],
        "rejected": [*turns, {"role": "assistant", "content": "7"}],
    }
    assert to_pair(row, "messages") == PreferenceExample(turns, "6", "7")
    begin = "\n\nHuman: 2 + 2?\n\nAssistant: 4\n\nHuman: 3 + 3?\n\nAssistant:"
    assert to_pair({"chosen": f"{begin} 6", "rejected": f"{begin} 7"}, "transcripts") == PreferenceExample(
        turns[1:], "6", "7"
    )


def test_a_prompt_column_completes_a_conversation_only_where_it_lacks_one():
    alone = {"prompt": "2 + 2?", "chosen": [FOUR], "rejected": [FIVE]}
    system = {"role": "system", "content": "Be brief."}
    assert to_pair(alone, "messages").prompt == [USER]
    assert to_pair({**alone, "prompt": [system, USER]}, "messages").prompt == [system, USER]
    assert to_pair({**MESSAGES, "prompt": [USER]}, "messages").prompt == [USER]
    assert to_pair({**MESSAGES, "prompt": "something else"}, "messages").prompt == [USER]


def test_behavior_logps_are_read_and_checked():
    row = {**STRINGS, "chosen_behavior_logps": -1.5, "rejected_behavior_logps": -2}
    assert to_pair(row, "strings")[3:] == (-1.5, -2.0)
    for bad in (None, float("nan"), 0.5, "x"):
        with pytest.raises(RowError, match="malformed"):
            to_pair({**row, "rejected_behavior_logps": bad}, "strings")


OTHER = "\n\nHuman: 3 + 3?\n\nAssistant: 6"


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({**STRINGS, "chosen": None}, "strings", Reason.MALFORMED),
        ({**STRINGS, "prompt": 3}, "strings", Reason.MALFORMED),
        ({**STRINGS, "rejected": " \n"}, "strings", Reason.EMPTY_RESPONSE),
        ({**STRINGS, "rejected": " 4"}, "strings", Reason.IDENTICAL),
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
        ({**TRANSCRIPTS, "chosen": "\n\nHuman: 2 + 2?\n\nAssistant:"}, "transcripts", Reason.EMPTY_RESPONSE),
    ],
)
def test_unusable_rows_say_why(row, format, reason):
    with pytest.raises(RowError) as error:
        to_pair(row, format)
    assert error.value.reason is reason
