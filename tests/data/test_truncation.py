"""What is cut, worked by hand: a message is "x" and its text, a token a character, and "A" opens the answer."""

from types import SimpleNamespace

import pytest

from lit_isdpo.data.encoding import Encoded
from lit_isdpo.data.outcomes import Reason, RowError
from lit_isdpo.data.tokenization import Limits, fit_length
from lit_isdpo.types import Message

HEADER = [ord("A")]
DIALOGUE = [
    Message(role="system", content="s"),
    Message(role="user", content="uv"),
    Message(role="assistant", content="a"),
    Message(role="user", content="wxy"),
]


def encode(prompt):
    text = "".join("x" + turn["content"] for turn in prompt) + "A"
    return Encoded([*map(ord, text)], [[ord("r"), 0], [ord("q"), ord("q"), 0]])


ENCODER = SimpleNamespace(header=lambda prompt: HEADER, tokenizer=SimpleNamespace(bos_token_id=None))


def fit(prompt, length, mode="keep_end", room=10, encode=encode):
    fitted = fit_length(prompt, encode, Limits(length + room, length, mode), ENCODER)
    return "".join(map(chr, fitted.prompt_ids)), list(fitted.changes)


@pytest.mark.parametrize(
    ("length", "mode", "text", "changes"),
    [
        (12, "keep_end", "xsxuvxaxwxyA", []),
        (11, "keep_end", "xsxwxyA", ["first messages left out"]),
        (7, "keep_end", "xsxwxyA", ["first messages left out"]),
        (6, "keep_end", "xwxyA", ["first messages left out"]),
        (2, "keep_end", "yA", ["prompt cut"]),
        (11, "keep_start", "xsxuvxaxwxA", ["prompt cut"]),
        (2, "keep_start", "xA", ["prompt cut"]),
    ],
)
def test_messages_go_before_tokens_do_and_the_header_stays(length, mode, text, changes):
    assert fit(DIALOGUE, length, mode) == (text, changes)


def test_a_developers_words_stay_as_the_systems_do():
    assert fit([{**DIALOGUE[0], "role": "developer"}, *DIALOGUE[1:]], 7) == ("xsxwxyA", ["first messages left out"])


def test_a_dialogue_loses_no_more_messages_than_it_must():
    longer = [*DIALOGUE, Message(role="assistant", content="b"), Message(role="user", content="z")]
    assert fit(longer, 12) == ("xsxwxyxbxzA", ["first messages left out"])
    assert fit(longer, 10) == ("xsxzA", ["first messages left out"])


@pytest.mark.parametrize(("length", "mode"), [(1, "keep_end"), (1, "keep_start"), (11, "drop")])
def test_where_the_header_alone_has_room_the_row_is_dropped(length, mode):
    with pytest.raises(RowError) as error:
        fit(DIALOGUE, length, mode)
    assert error.value.reason is Reason.LONG_PROMPT


def test_an_end_that_the_template_refuses_is_passed_over():
    def refusing(prompt):
        if len(prompt) == 2:  # the system's and the last user's turn
            raise RowError(Reason.TEMPLATE)
        return encode(prompt)

    assert fit(DIALOGUE, 11, encode=refusing) == ("xwxyA", ["first messages left out"])


def test_a_text_keeps_its_end():
    def characters(text):
        return Encoded([*map(ord, text)], [[101, 0]])

    encoder = SimpleNamespace(header=lambda prompt: [], tokenizer=SimpleNamespace(bos_token_id=None))
    fitted = fit_length("abcd", characters, Limits(3, 2), encoder)
    assert fitted == Encoded([99, 100], [[101]], ("prompt cut", "response cut"))


def test_responses_get_the_room_that_the_shorter_prompt_leaves():
    fitted = fit_length(DIALOGUE, encode, Limits(10, 7), ENCODER)
    assert fitted.completions == [[ord("r"), 0], [ord("q"), ord("q"), 0]]
    fitted = fit_length(DIALOGUE, encode, Limits(9, 7), ENCODER)
    assert fitted.completions == [[ord("r"), 0], [ord("q"), ord("q")]]
    assert list(fitted.changes) == ["first messages left out", "response cut"]
