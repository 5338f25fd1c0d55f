r"""Rows of public data sets, read as text: one pure function for each schema.

A reader of a response column gives one demonstration, a prompt and the response to it; a pair is two of them with the
same prompt. A reader of ranked responses gives them all, with their scores. What a reader returns is only well formed:
whether a response is empty or equals the other one is asked where it is tokenized.

A list or an object may also stand in its column as JSON text, as CSV files have it. The module is long because it has a
reader for each schema, and below them the checks that name the field and the fault.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, cast, get_args

from lit_isdpo.types import Answer, Message, SFTExample

Row = Mapping[str, Any]
ROLES = get_args(Message.__annotations__["role"])
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields with what the assistant thinks before it answers
OTHER_PROMPT = "the prompt column is not in the conversation"  # a change
_LARGEST = (2 - 2**-23) * 2.0**127  # float32's


class Reason(StrEnum):
    """Why a row or a pair is left out; the summary counts those of each reason."""

    MALFORMED = "malformed row"
    TWO_PROMPTS = "two different prompts"
    NO_PREFERENCE = "no two responses with different scores"
    EMPTY_PROMPT = "empty prompt"
    LONG_PROMPT = "over-long prompt"
    EMPTY_RESPONSE = "empty response"
    IDENTICAL = "identical pair"
    IDENTICAL_TOKENS = "identical after truncation"
    NO_ROW = "token without a row in the model's embedding"
    CUT_BEHAVIOR = "truncated, so that its behavior log-probs do not hold"
    TEMPLATE = "refused by the chat template"
    NO_BEGINNING = "prompt not rendered as the beginning of prompt and response"
    REWRITTEN = "response not rendered as given"
    DUPLICATE = "duplicated row"


class RowError(ValueError):
    """A row that cannot be used. It is counted and left out, never repaired.

    Args:
        reason: why.
        problem: which field has which fault; rows are counted by it too.
        shown: what the row itself holds there, for the listing.
    """

    def __init__(self, reason: Reason, problem: str = "", shown: str = "") -> None:
        super().__init__(noted(f"{reason.value}: {problem}" if problem else reason.value, shown))
        self.reason = reason


def noted(words: str, shown: str = "") -> str:
    """What is noted of a row: words that rows are counted by, and behind a line break what one row shows."""
    shown = " ".join(shown.split()).encode(errors="backslashreplace").decode()  # half a surrogate is no text
    return f"{words}\n{shown}" if shown else words


def counted(note: str) -> str:
    """The words that a row is counted by: without what it shows, and without places in lists.

    >>> counted("malformed row: prompt[3].content is a number")
    'malformed row: prompt[].content is a number'
    """
    return re.sub(r"\[\d+\]", "[]", note.partition("\n")[0])


class Scored(NamedTuple):
    """Responses to one prompt; of two, the one with the higher score is the better one."""

    prompt: str | list[Message]
    responses: list[str]
    scores: list[float]


# A prompt and the response in one column


def read_strings(row: Row, column: str) -> SFTExample:
    """A prompt and a response, used as they stand; the prompt may also be a list of messages.

    >>> read_strings({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "chosen")
    SFTExample(prompt='2 + 2 =', completion=' 4', changes=())
    """
    return SFTExample(_prompt(row, "prompt"), _text(row.get(column), column))


def read_messages(row: Row, column: str) -> SFTExample:
    """A conversation that ends in an assistant turn: the last turn is the response, all before it the prompt.

    A ``prompt`` column is used if the conversation does not hold it. A string becomes a user turn if the conversation
    is only the response. A list of messages comes before the conversation; turns at its end that the conversation
    begins with are not repeated, and blanks around their text do not matter.

    >>> read_messages({"prompt": "2 + 2?", "chosen": [{"role": "assistant", "content": "4"}]}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4', changes=())
    """
    *before, last = _turns(row.get(column), column)
    changes: tuple[str, ...] = ()
    prompt = messages_in(row.get("prompt"))
    if isinstance(prompt, list) and prompt:
        before = _joined(_turns(prompt, "prompt"), before)
    elif isinstance(prompt, str) and prompt.strip():
        if not before:
            before = [Message(role="user", content=_text(prompt, "prompt"))]
        elif not any(prompt.strip() in turn["content"] for turn in before):
            changes = (OTHER_PROMPT,)
    if last["role"] != "assistant":
        raise _malformed(f"the last turn of {column} has another role than assistant")
    if not before:
        raise _malformed(f"no prompt stands before the response, neither in {column} nor in prompt")
    return SFTExample(before, _answer(last), changes)


def read_transcript(row: Row, column: str) -> SFTExample:
    r"""A whole dialogue in one string, as in Anthropic/hh-rlhf; the last assistant turn is the response.

    >>> read_transcript({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4', changes=())
    """
    *before, last = _transcript_turns(_text(row.get(column), column), column)
    return SFTExample(before, last["content"].removeprefix(" "))


def read_dialogue(row: Row, column: str) -> SFTExample:
    r"""A dialogue up to "\n\nAssistant:", and what the assistant said next, as in Dahoas/full-hh-rlhf.

    >>> read_dialogue({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4', changes=())
    """
    before, opening = _open_dialogue(row.get("prompt"))
    text = opening + _text(row.get(column), column)
    return SFTExample(before, text if before[-1].get("prefix") else text.removeprefix(" "))


def read_query(row: Row, column: str) -> SFTExample:
    """A TL;DR query and a response, as in vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144.

    Its responses were written for GPT-2's tokenizer and end in that one's terminator, which is no text. It puts query
    and response together without the query's outer blanks (column ``query_chosen``), and so does this.

    >>> read_query({"query": "POST: ... TL;DR:", "chosen": " Short.<|endoftext|>"}, "chosen")
    SFTExample(prompt='POST: ... TL;DR:', completion=' Short.', changes=())
    """
    query, response = _text(row.get("query"), "query"), _text(row.get(column), column)
    return SFTExample(query.strip(), response.removesuffix("<|endoftext|>"))


def read_comparison(row: Row, column: str) -> SFTExample:
    """A judged pair of summaries with the post that they are of, as in openai/summarize_from_feedback (comparisons).

    The prompts are those of arXiv 2009.01325: Reddit posts with their subreddit and title, and articles, which have
    neither (and here no line break behind "TL;DR:").

    >>> info = {"subreddit": "AskReddit", "title": "Why?", "post": "I wonder.", "article": None}
    >>> summaries = [{"text": " No.", "policy": "sup1"}, {"text": " He wonders.", "policy": "ref"}]
    >>> read_comparison({"info": info, "summaries": summaries, "choice": 1}, "chosen").completion
    ' He wonders.'
    """
    info, summaries = _object(row.get("info"), "info"), _list(row.get("summaries"), "summaries")
    if len(summaries) != 2:
        raise _malformed("summaries has another number of items than 2")
    choice = number(int(row["choice"]) if row.get("choice") in (True, False) else row.get("choice"), "choice")
    if choice not in (0, 1):
        raise _malformed("choice is neither 0 nor 1")
    if info.get("article") is not None:
        prompt = f"Article:\n{_text(info['article'], 'info.article')}\n\nTL;DR:"
    else:
        subreddit, title, post = (_text(info.get(name), f"info.{name}") for name in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    place = int(1 - choice if column == "rejected" else choice)
    return SFTExample(prompt, _field(summaries, place, "text", "summaries"))


# A prompt and several responses with their scores


def read_ranked(row: Row) -> Scored:
    """Responses with scores (higher is better) or ranks (1 is best).

    A ``prompt`` is used as it stands or is a list of messages; a ``question`` or an ``instruction`` is a user turn.

    >>> read_ranked({"question": "2 + 2?", "responses": ["4", "5"], "ranks": [1, 2]})
    Scored(prompt=[{'role': 'user', 'content': '2 + 2?'}], responses=['4', '5'], scores=[-1.0, -2.0])
    """
    if "prompt" in row:
        prompt = _prompt(row, "prompt")
    else:
        column = "question" if "question" in row else "instruction"
        prompt = [Message(role="user", content=_text(row.get(column), column))]
    sign, column = (1, "scores") if "scores" in row else (-1, "ranks")
    marks, responses = _list(row.get(column), column), _list(row.get("responses"), "responses")
    if len(marks) != len(responses):
        raise _malformed(f"{column} has another number of items than responses")
    return Scored(
        prompt,
        [_text(response, f"responses[{i}]") for i, response in enumerate(responses)],
        [sign * number(mark, f"{column}[{i}]") for i, mark in enumerate(marks)],
    )


def read_nectar(row: Row) -> Scored:
    r"""A dialogue up to "\n\nAssistant: " and answers with ranks, as in berkeley-nest/Nectar.

    >>> answers = [{"answer": "4", "model": "a", "rank": 1.0}, {"answer": "5", "model": "b", "rank": 2.0}]
    >>> read_nectar({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ", "answers": answers}).scores
    [-1.0, -2.0]
    """
    before, _ = _open_dialogue(row.get("prompt"))
    texts, ranks = _scored_items(row, "answers", "answer", "rank")
    return Scored(before, texts, [-rank for rank in ranks])


def read_ultrafeedback(row: Row) -> Scored:
    """An instruction and completions with overall scores, as in openbmb/UltraFeedback.

    >>> completions = [{"response": "4", "overall_score": 9.0}, {"response": "5", "overall_score": 1.0}]
    >>> read_ultrafeedback({"instruction": "2 + 2?", "completions": completions}).scores
    [9.0, 1.0]
    """
    prompt = [Message(role="user", content=_text(row.get("instruction"), "instruction"))]
    return Scored(prompt, *_scored_items(row, "completions", "response", "overall_score"))


# What a row may hold


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
            raise _malformed(f"{column} is a text that is no number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _malformed(f"{column} {_kind(value)}")
    if not abs(value) <= _LARGEST:
        infinite = value in (math.inf, -math.inf)
        problem = "is NaN" if value != value else "is infinite" if infinite else "is more than float32 can hold"
        raise _malformed(f"{column} {problem}")
    return float(value)


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools that a row's assistant may call; ``None`` where it has none.

    Raises:
        RowError: they are no list of objects.
    """
    value = row.get("tools")
    if value in (None, "", []):
        return None
    tools = [_object(tool, f"tools[{i}]") for i, tool in enumerate(_list(value, "tools"))]
    for i, tool in enumerate(tools):
        if "function" in tool:
            _object(tool["function"], f"tools[{i}].function")
    return tools


def read_system(row: Row) -> str:
    """The text of a ``system`` column; empty where there is none.

    Raises:
        RowError: it is no text.
    """
    value = row.get("system")
    return "" if value is None else _text(value, "system")


def _malformed(problem: str, shown: object = None) -> RowError:
    return RowError(Reason.MALFORMED, problem, "" if shown is None else str(shown)[:80])


def _kind(value: object) -> str:
    """What a value is, in words that follow its name."""
    if value is None:
        return "is missing"
    if isinstance(value, str):
        return "is a text" if value else "is empty"
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"is {kinds.get(type(value), f'a {type(value).__name__}')}"


def _text(value: object, where: str) -> str:
    """A string that is text: half a surrogate pair, which JSON can spell, is a character to no tokenizer."""
    if not isinstance(value, str):
        raise _malformed(f"{where} {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _malformed(f"{where} has half a surrogate pair, which is no character") from error
    return value


def _list(value: object, where: str) -> list[Any]:
    found = decoded(value)
    if not isinstance(found, list):
        raise _malformed(f"{where} {_kind(value)} and no list")
    return found


def _object(value: object, where: str) -> dict[str, Any]:
    found = decoded(value)
    if not isinstance(found, dict):
        raise _malformed(f"{where} {_kind(value)} and no object")
    return found


def _field(items: Sequence[Any], place: int, key: str, column: str) -> str:
    item = items[place]
    return _text(item.get(key) if isinstance(item, dict) else None, f"{column}[{place}].{key}")


def _scored_items(row: Row, column: str, text: str, mark: str) -> tuple[list[str], list[float]]:
    items = _list(row.get(column), column)
    texts = [_field(items, place, text, column) for place in range(len(items))]
    return texts, [number(item.get(mark), f"{column}[{place}].{mark}") for place, item in enumerate(items)]


def _prompt(row: Row, column: str) -> str | list[Message]:
    """A text, or a conversation; the assistant's turn at the end of one is where the response goes on."""
    value = messages_in(row.get(column))
    if not isinstance(value, list):
        return _text(value, column)
    return _with_prefix(_turns(value, column))


def _with_prefix(turns: list[Message]) -> list[Message]:
    *before, last = turns
    return [*before, cast(Message, {**last, "prefix": True})] if before and last["role"] == "assistant" else turns


def _turns(value: object, where: str) -> list[Message]:
    """Checks a list of messages, and leaves out what else the data set keeps in them."""
    turns = [_turn(turn, f"{where}[{i}]") for i, turn in enumerate(_list(value, where))]
    if not turns:
        raise _malformed(f"{where} is an empty list")
    return turns


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _malformed(f"{where} {_kind(turn)} and no message")
    role = turn.get("role")
    if role not in ROLES:
        raise _malformed(f"{where}.role {_kind(role)}" + " that is no role" * isinstance(role, str), role)
    fields = {} if turn.keys() == {"role", "content"} else _fields(turn, where)
    content = turn.get("content")
    if content is None and role == "assistant" and len(fields) > ("name" in fields):
        content = ""  # the usual form of a turn that calls a tool
    return cast(Message, {"role": role, "content": _content(content, f"{where}.content"), **fields})


def _fields(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a turn holds besides its role and content, and a chat template may read."""
    fields: dict[str, Any] = {}
    for name in ("name", "tool_call_id", *THOUGHTS):
        if turn.get(name) not in (None, ""):
            fields[name] = _text(turn[name], f"{where}.{name}")
    if turn.get("tool_calls") not in (None, "", []):
        calls = _list(turn["tool_calls"], f"{where}.tool_calls")
        fields["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if turn.get("function_call") is not None:
        raise _malformed(f"{where}.function_call is the older form of tool_calls")
    if turn.get("prefix") is True:
        fields["prefix"] = True
    return fields


def _content(value: object, where: str) -> str:
    """A turn's text; one that is given in parts is joined."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for part in value:
        is_text = isinstance(part, dict) and part.get("type", "text") == "text"
        if not is_text and not isinstance(part, str):
            raise _malformed(f"{where} is a list of parts that are not all text", part)
        texts.append(_text(part.get("text") if isinstance(part, dict) else part, f"{where}[].text"))
    return "".join(texts)


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates expect; OpenAI's are JSON text."""
    call = dict(_object(call, where))
    function = _object(call["function"], f"{where}.function") if "function" in call else None
    _text((function or call).get("name"), f"{where}.name" if function is None else f"{where}.function.name")
    if function is not None:
        call["function"] = function
    for place in (call, function):
        if isinstance(place, dict) and "arguments" in place:
            place = {**place, "arguments": decoded(place["arguments"])}
            call = place if function is None else {**call, "function": place}
    return call


def _answer(turn: Message) -> Answer:
    """The text of a response, or the whole turn where it holds more."""
    return turn if turn.keys() - {"role", "content", "name", "prefix"} else turn["content"]


def _joined(stated: list[Message], before: list[Message]) -> list[Message]:
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


def _transcript_turns(text: str, where: str) -> list[Message]:
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
        raise _malformed(f'{where} does not begin with "Human:"')
    if turns[-1]["role"] != "assistant":
        raise _malformed(f'{where} does not end with a turn of "Assistant:"')
    turns[-1]["content"] = pieces[-1]
    return turns


def _open_dialogue(prompt: object) -> tuple[list[Message], str]:
    """A dialogue that the assistant is about to continue, and the blank after its last marker, if there is one.

    What the assistant has begun to say is a turn of its own, which the response goes on with.
    """
    *before, last = _transcript_turns(_text(prompt, "prompt"), "prompt")
    if last["content"].strip():
        content = last["content"].removeprefix(" ")
        return [*before, Message(role="assistant", content=content, prefix=True)], ""
    return before, last["content"]


Reader = Callable[[Row, str], SFTExample]
ScoredReader = Callable[[Row], Scored]
