"""The fields of a row: checks that name the field and its fault, and conversations in their spellings.

A list or an object may also be JSON text, as in CSV files.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from lit_isdpo.data.outcomes import Reason, RowError
from lit_isdpo.types import Answer, Message, Prompt

Row = Mapping[str, Any]
ROLES = get_args(Message.__annotations__["role"])
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields with the assistant's thoughts before it answers
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


def is_transcript(value: object) -> bool:
    r"""Whether it is a string that begins as a dialogue, with "Human:"."""
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:")


def is_list_of(value: object, *keys: str) -> bool:
    """Whether it is a list of mappings that have these keys; an empty one tells nothing."""
    value = decoded(value)
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and item.keys() >= set(keys) for item in value)


def messages_in(value: object) -> object:
    """A list of messages that is written as JSON text, else the value itself.

    >>> messages_in('[{"role": "user", "content": "a"}]'), messages_in("[1]")
    ([{'role': 'user', 'content': 'a'}], '[1]')
    """
    found = decoded(value)
    is_conversation = is_list_of(found, "role") and all(turn["role"] in ROLES for turn in cast(list[Any], found))
    return found if is_conversation else value


def decoded(value: object) -> object:
    """The list or object that a text is the JSON of, else the value itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def number(value: object, column: str) -> float:
    """A number that is finite in float32, which batches hold; it may be written as text.

    Raises:
        RowError: it is not.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = float(value)
        except ValueError:
            raise malformed(f"{column} is a text that is no number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise malformed(f"{column} {kind_of(value)}")
    if not abs(value) <= _LARGEST:
        infinite = value in (math.inf, -math.inf)
        problem = "is NaN" if value != value else "is infinite" if infinite else "is more than float32 can hold"
        raise malformed(f"{column} {problem}")
    return float(value)


def tools_in(row: Row) -> list[dict[str, Any]] | None:
    """The tools that a row's assistant may call; ``None`` if it has none.

    Raises:
        RowError: they are no list of objects.
    """
    value = row.get("tools")
    if value in (None, "", []):
        return None
    tools = [object_in(tool, f"tools[{i}]") for i, tool in enumerate(list_in(value, "tools"))]
    for i, tool in enumerate(tools):
        object_in(tool.get("function", {}), f"tools[{i}].function")
    return tools


def malformed(problem: str, shown: object = None) -> RowError:
    """The error of a row that is not well formed."""
    return RowError(Reason.MALFORMED, problem, "" if shown is None else str(shown)[:80])


def kind_of(value: object) -> str:
    """The kind of a value, in words that follow its name."""
    if value is None:
        return "is missing"
    if isinstance(value, str):
        return "is a text" if value else "is empty"
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"is {kinds.get(type(value), f'a {type(value).__name__}')}"


def text_in(value: object, where: str) -> str:
    """A string that is text: half a surrogate pair, which JSON can spell, is a character to no tokenizer."""
    if not isinstance(value, str):
        raise malformed(f"{where} {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise malformed(f"{where} has half a surrogate pair, which is no character") from error
    return value


def list_in(value: object, where: str) -> list[Any]:
    """A list, or the JSON text of one."""
    found = decoded(value)
    if not isinstance(found, list):
        raise malformed(f"{where} {kind_of(value)} and no list")
    return found


def object_in(value: object, where: str) -> dict[str, Any]:
    """An object, or the JSON text of one."""
    found = decoded(value)
    if not isinstance(found, dict):
        raise malformed(f"{where} {kind_of(value)} and no object")
    return found


def item_text(items: list[Any], place: int, key: str, column: str) -> str:
    """The text under a key of an item of a list of objects."""
    item = items[place]
    return text_in(item.get(key) if isinstance(item, dict) else None, f"{column}[{place}].{key}")


def prompt_in(row: Row, column: str) -> Prompt:
    """A text, or a conversation; the response continues an assistant's turn at its end."""
    value = messages_in(row.get(column))
    if not isinstance(value, list):
        return text_in(value, column)
    return _with_prefix(turns_in(value, column))


def _with_prefix(turns: list[Message]) -> list[Message]:
    *before, last = turns
    return [*before, cast(Message, {**last, "prefix": True})] if before and last["role"] == "assistant" else turns


def turns_in(value: object, where: str) -> list[Message]:
    """Checks a list of messages, and leaves out their other fields."""
    turns = [_turn(turn, f"{where}[{i}]") for i, turn in enumerate(list_in(value, where))]
    if not turns:
        raise malformed(f"{where} is an empty list")
    return turns


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise malformed(f"{where} {kind_of(turn)} and no message")
    role = turn.get("role")
    if role not in ROLES:
        problem = "is no role" if isinstance(role, str) and role else kind_of(role)
        raise malformed(f"{where}.role {problem}", role)
    fields = {} if turn.keys() == {"role", "content"} else _fields(turn, where)
    content = turn.get("content")
    if content is None and role == "assistant" and len(fields) > ("name" in fields):
        content = ""  # the usual form of a turn that calls a tool
    return cast(Message, {"role": role, "content": _content(content, f"{where}.content"), **fields})


def _fields(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a turn that a chat template may read besides its role and content."""
    fields: dict[str, Any] = {}
    for name in ("name", "tool_call_id", *THOUGHTS):
        if turn.get(name) not in (None, ""):
            fields[name] = text_in(turn[name], f"{where}.{name}")
    if turn.get("tool_calls") not in (None, "", []):
        calls = list_in(turn["tool_calls"], f"{where}.tool_calls")
        fields["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if turn.get("function_call") is not None:
        raise malformed(f"{where}.function_call is the older form of tool_calls")
    if turn.get("prefix") is True:
        fields["prefix"] = True
    return fields


def _content(value: object, where: str) -> str:
    """A turn's text; one that is given in parts is joined."""
    if not isinstance(value, list):
        return text_in(value, where)
    texts = []
    for part in value:
        is_text = isinstance(part, dict) and part.get("type", "text") == "text"
        if not is_text and not isinstance(part, str):
            raise malformed(f"{where} is a list of parts that are not all text", part)
        texts.append(text_in(part.get("text") if isinstance(part, dict) else part, f"{where}[].text"))
    return "".join(texts)


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates expect; OpenAI's are JSON text."""
    call = function = dict(object_in(call, where))
    if "function" in call:
        where = f"{where}.function"
        function = call["function"] = dict(object_in(call["function"], where))
    text_in(function.get("name"), f"{where}.name")
    if "arguments" in function:
        function["arguments"] = decoded(function["arguments"])
    return call


def answer_of(turn: Message) -> Answer:
    """The text of a response, or the whole turn if it holds more."""
    return turn if turn.keys() - {"role", "content", "name", "prefix"} else turn["content"]


def joined(stated: list[Message], before: list[Message]) -> list[Message]:
    """The turns of a prompt column and those of a conversation, without those that both hold."""

    def same(some: list[Message], others: list[Message]) -> bool:
        pairs = zip(some, others, strict=True)
        return all({**a, "content": a["content"].strip()} == {**b, "content": b["content"].strip()} for a, b in pairs)

    if not before:
        return _with_prefix(stated)
    if len(stated) < len(before) and same(stated, before[-len(stated) :]):
        return before
    shared = next(
        k for k in range(min(len(stated), len(before)), -1, -1) if same(stated[len(stated) - k :], before[:k])
    )
    return stated[: len(stated) - shared] + before


def transcript_turns(text: str, where: str) -> list[Message]:
    """A dialogue's turns, from a human one to an assistant one, of which the last one's text is left as it stands.

    One space belongs to the marker before it. Everything else is kept, so that writing the turns out gives the same
    text again.
    """
    head, *pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    turns = [
        Message(role="user" if speaker == "Human" else "assistant", content=content.removeprefix(" "))
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if head.strip() or not turns or turns[0]["role"] != "user":
        raise malformed(f'{where} does not begin with "Human:"')
    if turns[-1]["role"] != "assistant":
        raise malformed(f'{where} does not end with a turn of "Assistant:"')
    turns[-1]["content"] = pieces[-1]
    return turns


def open_dialogue(prompt: object) -> tuple[list[Message], str]:
    """A dialogue that the assistant is about to continue, and the blank after its last marker, if there is one.

    An answer that has begun is a turn of its own, which the response continues.
    """
    *before, last = transcript_turns(text_in(prompt, "prompt"), "prompt")
    if last["content"].strip():
        content = last["content"].removeprefix(" ")
        return [*before, Message(role="assistant", content=content, prefix=True)], ""
    return before, last["content"]
