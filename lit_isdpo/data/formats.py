r"""Rows of public preference data sets, read as text: one pure function for each format.

A format says how one response column of a row becomes a demonstration, a prompt and the response to it. A pair is two
demonstrations with the same prompt, so a new format is one function and one line of ``FORMATS``.

    strings      prompt "2 + 2 =", chosen " 4", rejected " 5"
    messages     chosen [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], rejected alike
    transcripts  chosen "\n\nHuman: 2 + 2?\n\nAssistant: 4", rejected alike
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from lit_isdpo.types import InputError, Message, PreferenceExample, SFTExample

Row = Mapping[str, Any]
Kind = Literal["pairs", "demonstrations"]


class Reason(StrEnum):
    """Why a row is left out; the summary counts the rows of each reason."""

    MALFORMED = "malformed row"
    TWO_PROMPTS = "two different prompts"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    IDENTICAL = "identical pair"
    IDENTICAL_TOKENS = "identical after truncation"
    CUT_BEHAVIOR = "truncated, so that its behavior log-probs do not hold"
    TEMPLATE = "refused by the chat template"


class RowError(ValueError):
    """A row that cannot be used. It is counted and left out, never repaired."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def read_strings(row: Row, column: str) -> SFTExample:
    """A prompt and a response, used as they stand; the prompt may also be a list of messages.

    >>> read_strings({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "chosen")
    SFTExample(prompt='2 + 2 =', completion=' 4')
    """
    prompt, response = row["prompt"], row[column]
    if isinstance(prompt, list):
        prompt = _turns(prompt)
    if not isinstance(prompt, str | list) or not isinstance(response, str):
        raise RowError(Reason.MALFORMED)
    return SFTExample(prompt, _not_empty(response))


def read_messages(row: Row, column: str) -> SFTExample:
    """A conversation that ends in an assistant turn: the last turn is the response, all before it the prompt.

    A ``prompt`` column is used where the conversation does not begin with it: as one user turn where it is a string and
    the conversation is the response alone, before the conversation where it is a list of messages.

    >>> read_messages({"prompt": "2 + 2?", "chosen": [{"role": "assistant", "content": "4"}]}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4')
    """
    *before, last = _turns(row[column])
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        stated = _turns(prompt)
        if before[: len(stated)] != stated:
            before = stated + before
    elif isinstance(prompt, str) and not before:
        before = [Message(role="user", content=prompt)]
    if last["role"] != "assistant" or not before:
        raise RowError(Reason.MALFORMED)
    return SFTExample(before, _not_empty(last["content"]))


def read_transcript(row: Row, column: str) -> SFTExample:
    r"""A whole dialogue in one string, as in Anthropic's hh-rlhf; the last assistant turn is the response.

    >>> read_transcript({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4')
    """
    text = row[column]
    if not isinstance(text, str):
        raise RowError(Reason.MALFORMED)
    head, *pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    # One space belongs to the marker. Everything else is kept, so that rendering the turns gives the same text again.
    turns = [
        Message(role="user" if speaker == "Human" else "assistant", content=content.removeprefix(" "))
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if head.strip() or len(turns) < 2 or turns[0]["role"] != "user" or turns[-1]["role"] != "assistant":
        raise RowError(Reason.MALFORMED)
    return SFTExample(turns[:-1], _not_empty(turns[-1]["content"]))


class Format(NamedTuple):
    """One line of ``FORMATS``.

    Attributes:
        read: row and response column -> demonstration.
        holds: whether a value of a response column looks like this format's.
        needs_prompt: whether the row must have a ``prompt`` column.
        response_columns: where a demonstration's response is looked for, in this order.
        looks: the format in words, for messages.
    """

    read: Callable[[Row, str], SFTExample]
    holds: Callable[[object], bool]
    needs_prompt: bool
    response_columns: tuple[str, ...]
    looks: str

    def required(self, kind: Kind, columns: Iterable[str]) -> list[str]:
        """The columns that this format reads, given those that the data set has."""
        if kind == "pairs":
            responses = ["chosen", "rejected"]
        else:
            found = [name for name in self.response_columns if name in columns]
            responses = (found or list(self.response_columns))[:1]
        return ["prompt"] * self.needs_prompt + responses


FORMATS: dict[str, Format] = {  # the first that fits is taken
    "transcripts": Format(
        read_transcript,
        lambda value: isinstance(value, str) and value.lstrip("\n").startswith("Human:"),
        needs_prompt=False,
        response_columns=("chosen",),
        looks=r'strings such as "\n\nHuman: ...\n\nAssistant: ..."',
    ),
    "messages": Format(
        read_messages,
        lambda value: isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value),
        needs_prompt=False,
        response_columns=("messages", "completion", "chosen"),
        looks="lists of {role, content}; a prompt column is optional",
    ),
    "strings": Format(
        read_strings,
        lambda value: isinstance(value, str),
        needs_prompt=True,
        response_columns=("completion", "chosen"),
        looks="strings",
    ),
}


def detect_format(columns: Sequence[str], first_rows: Sequence[Row], *, kind: Kind = "pairs", name: str = "") -> str:
    """Recognises a format by its columns and by the type of the values in the first rows.

    Args:
        columns: the data set's columns.
        first_rows: a few rows, of which one with a value is enough.
        kind: what is to be read, preference pairs or demonstrations.
        name: the data set, for the message.

    Returns:
        A key of ``FORMATS``.

    Raises:
        InputError: no format fits; the message has the columns found and the formats known.

    >>> detect_format(["prompt", "chosen", "rejected"], [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    'strings'
    """
    for key, known in FORMATS.items():
        required = known.required(kind, columns)
        if set(required) <= set(columns) and any(known.holds(row[required[-1]]) for row in first_rows):
            return key
    layouts = []
    for key, known in FORMATS.items():
        responses = "chosen, rejected" if kind == "pairs" else " or ".join(known.response_columns)
        layouts.append(f"{key} ({'prompt, ' * known.needs_prompt}{responses}: {known.looks})")
    raise InputError(
        f"{name or 'the data set'}: the format of its columns {_listed(columns)} is not known; "
        f"known for {kind}: {'; '.join(layouts)}"
    )


def check_format(key: str, columns: Sequence[str], *, kind: Kind = "pairs", name: str = "") -> str:
    """Returns a format that was named by hand.

    Raises:
        InputError: there is no such format, or the data set lacks one of its columns.
    """
    if key not in FORMATS:
        raise InputError(f"data.format: no format {key!r}; known: auto, {', '.join(FORMATS)}")
    for column in FORMATS[key].required(kind, columns):
        if column not in columns:
            raise InputError(
                f"{name or 'the data set'}: format {key!r} needs a column {column!r}; it has {_listed(columns)}"
            )
    return key


def to_example(row: Row, format: str) -> SFTExample:
    """Reads a row as one demonstration; of a preference pair it is the chosen response.

    Raises:
        RowError: the row cannot be used.

    >>> to_example({"prompt": "2 + 2 =", "completion": " 4"}, "strings")
    SFTExample(prompt='2 + 2 =', completion=' 4')
    """
    return FORMATS[format].read(row, FORMATS[format].required("demonstrations", row)[-1])


def to_pair(row: Row, format: str) -> PreferenceExample:
    """Reads a row as a preference pair.

    Raises:
        RowError: the row cannot be used.

    >>> to_pair({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "strings").rejected
    ' 5'
    """
    chosen, rejected = FORMATS[format].read(row, "chosen"), FORMATS[format].read(row, "rejected")
    if chosen.prompt != rejected.prompt:
        raise RowError(Reason.TWO_PROMPTS)
    if chosen.completion == rejected.completion:
        raise RowError(Reason.IDENTICAL)
    chosen_logps, rejected_logps = (_behavior_logps(row, side) for side in ("chosen", "rejected"))
    if (chosen_logps is None) != (rejected_logps is None):
        raise RowError(Reason.MALFORMED)
    return PreferenceExample(chosen.prompt, chosen.completion, rejected.completion, chosen_logps, rejected_logps)


def _behavior_logps(row: Row, side: str) -> float | None:
    value = row.get(f"{side}_behavior_logps")
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:  # rounding aside
        raise RowError(Reason.MALFORMED)
    return float(value)


def _turns(value: object) -> list[Message]:
    """Checks a list of messages, and leaves out what else the data set keeps in them."""
    if not isinstance(value, list) or not value:
        raise RowError(Reason.MALFORMED)
    turns: list[Message] = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
            raise RowError(Reason.MALFORMED)
        turns.append(Message(role=role, content=content))
    return turns


def _not_empty(response: str) -> str:
    if not response.strip():
        raise RowError(Reason.EMPTY_RESPONSE)
    return response


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "(none)"
