r"""Rows of public data sets, read as text: one pure function for each schema.

A reader of a response column gives one demonstration, a prompt and the response to it; a pair is two of them with the
same prompt. A reader of ranked responses gives them all, with their scores. What a reader returns is only well formed:
whether a response is empty or equals the other one is asked where it is tokenized.
"""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from lit_isdpo.types import Message, SFTExample

Row = Mapping[str, Any]
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
    CUT_BEHAVIOR = "truncated, so that its behavior log-probs do not hold"
    TEMPLATE = "refused by the chat template"
    DUPLICATE = "duplicated row"


class RowError(ValueError):
    """A row that cannot be used. It is counted and left out, never repaired."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Scored(NamedTuple):
    """Responses to one prompt; of two, the one with the higher score is the better one."""

    prompt: str | list[Message]
    responses: list[str]
    scores: list[float]


# A prompt and the response in one column


def read_strings(row: Row, column: str) -> SFTExample:
    """A prompt and a response, used as they stand; the prompt may also be a list of messages.

    >>> read_strings({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "chosen")
    SFTExample(prompt='2 + 2 =', completion=' 4')
    """
    prompt = row["prompt"]
    return SFTExample(_turns(prompt) if isinstance(prompt, list) else _text(prompt), _text(row[column]))


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
    return SFTExample(before, last["content"])


def read_transcript(row: Row, column: str) -> SFTExample:
    r"""A whole dialogue in one string, as in Anthropic/hh-rlhf; the last assistant turn is the response.

    >>> read_transcript({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4')
    """
    *before, last = _transcript_turns(_text(row[column]))
    return SFTExample(before, last["content"].removeprefix(" "))


def read_dialogue(row: Row, column: str) -> SFTExample:
    r"""A dialogue up to "\n\nAssistant:", and what the assistant said next, as in Dahoas/full-hh-rlhf.

    >>> read_dialogue({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4')
    """
    before, opening = _open_dialogue(row["prompt"])
    return SFTExample(before, (opening + _text(row[column])).removeprefix(" "))


def read_query(row: Row, column: str) -> SFTExample:
    """A TL;DR query and a response, as in vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144.

    Its responses were written for GPT-2's tokenizer and end in that one's terminator, which is no text. It puts query
    and response together without the query's outer blanks (column ``query_chosen``), and so does this.

    >>> read_query({"query": "POST: ... TL;DR:", "chosen": " Short.<|endoftext|>"}, "chosen")
    SFTExample(prompt='POST: ... TL;DR:', completion=' Short.')
    """
    return SFTExample(_text(row["query"]).strip(), _text(row[column]).removesuffix("<|endoftext|>"))


def read_comparison(row: Row, column: str) -> SFTExample:
    """A judged pair of summaries with the post that they are of, as in openai/summarize_from_feedback (comparisons).

    The prompts are those of arXiv 2009.01325: Reddit posts with their subreddit and title, and articles, which have
    neither (and here no line break behind "TL;DR:").

    >>> info = {"subreddit": "AskReddit", "title": "Why?", "post": "I wonder.", "article": None}
    >>> summaries = [{"text": " No.", "policy": "sup1"}, {"text": " He wonders.", "policy": "ref"}]
    >>> read_comparison({"info": info, "summaries": summaries, "choice": 1}, "chosen").completion
    ' He wonders.'
    """
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2 or choice not in (0, 1):
        raise RowError(Reason.MALFORMED)
    choice = int(choice)  # a table may hold 1.0
    if info.get("article") is not None:
        prompt = f"Article:\n{_text(info['article'])}\n\nTL;DR:"
    else:
        subreddit, title, post = (_text(info.get(name)) for name in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return SFTExample(prompt, _field(summaries[1 - choice if column == "rejected" else choice], "text"))


# A prompt and several responses with their scores


def read_ranked(row: Row) -> Scored:
    """Responses with scores (higher is better) or ranks (1 is best).

    A ``prompt`` is used as it stands or is a list of messages; a ``question`` or an ``instruction`` is a user turn.

    >>> read_ranked({"question": "2 + 2?", "responses": ["4", "5"], "ranks": [1, 2]})
    Scored(prompt=[{'role': 'user', 'content': '2 + 2?'}], responses=['4', '5'], scores=[-1.0, -2.0])
    """
    if "prompt" in row:
        prompt = _turns(row["prompt"]) if isinstance(row["prompt"], list) else _text(row["prompt"])
    else:
        prompt = [Message(role="user", content=_text(row["question" if "question" in row else "instruction"]))]
    sign, marks = (1, row["scores"]) if "scores" in row else (-1, row["ranks"])
    responses = _list(row["responses"])
    if len(_list(marks)) != len(responses):
        raise RowError(Reason.MALFORMED)
    return Scored(prompt, [_text(response) for response in responses], [sign * number(mark) for mark in marks])


def read_nectar(row: Row) -> Scored:
    r"""A dialogue up to "\n\nAssistant: " and answers with ranks, as in berkeley-nest/Nectar.

    >>> answers = [{"answer": "4", "model": "a", "rank": 1.0}, {"answer": "5", "model": "b", "rank": 2.0}]
    >>> read_nectar({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ", "answers": answers}).scores
    [-1.0, -2.0]
    """
    before, _ = _open_dialogue(row["prompt"])
    answers = _list(row["answers"])
    texts = [_field(answer, "answer") for answer in answers]
    return Scored(before, texts, [-number(answer.get("rank")) for answer in answers])


def read_ultrafeedback(row: Row) -> Scored:
    """An instruction and completions with overall scores, as in openbmb/UltraFeedback.

    >>> completions = [{"response": "4", "overall_score": 9.0}, {"response": "5", "overall_score": 1.0}]
    >>> read_ultrafeedback({"instruction": "2 + 2?", "completions": completions}).scores
    [9.0, 1.0]
    """
    prompt = [Message(role="user", content=_text(row["instruction"]))]
    completions = _list(row["completions"])
    texts = [_field(completion, "response") for completion in completions]
    return Scored(prompt, texts, [number(completion.get("overall_score")) for completion in completions])


# What a row may hold


def is_transcript(value: object) -> bool:
    r"""Whether it is a string that begins as a dialogue, with "Human:"."""
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:")


def is_list_of(value: object, *keys: str) -> bool:
    """Whether it is a list of mappings that have these keys; an empty one tells nothing."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and item.keys() >= set(keys) for item in value)


def number(value: object) -> float:
    """A number that is finite in float32, which batches hold.

    Raises:
        RowError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise RowError(Reason.MALFORMED)
    return float(value)


def _text(value: object) -> str:
    """A string that is text: half a surrogate pair, which JSON can spell, is a character to no tokenizer."""
    if not isinstance(value, str):
        raise RowError(Reason.MALFORMED)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(Reason.MALFORMED) from error
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(Reason.MALFORMED)
    return value


def _field(value: object, key: str) -> str:
    return _text(value.get(key) if isinstance(value, dict) else None)


def _turns(value: object) -> list[Message]:
    """Checks a list of messages, and leaves out what else the data set keeps in them."""
    turns: list[Message] = []
    for turn in _list(value):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ("system", "user", "assistant", "tool"):
            raise RowError(Reason.MALFORMED)
        turns.append(Message(role=role, content=_text(content)))
    if not turns:
        raise RowError(Reason.MALFORMED)
    return turns


def _transcript_turns(text: str) -> list[Message]:
    """A dialogue's turns, from a human one to an assistant one, of which the last one's text is left as it stands.

    One space belongs to the marker before it. Everything else is kept, so that writing the turns out gives the same
    text again.
    """
    head, *pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    turns = [
        Message(role="user" if speaker == "Human" else "assistant", content=content.removeprefix(" "))
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if head.strip() or len(turns) < 2 or turns[0]["role"] != "user" or turns[-1]["role"] != "assistant":
        raise RowError(Reason.MALFORMED)
    turns[-1]["content"] = pieces[-1]
    return turns


def _open_dialogue(prompt: object) -> tuple[list[Message], str]:
    """A dialogue that the assistant is about to continue, and the blank after its last marker, if there is one."""
    *before, last = _transcript_turns(_text(prompt))
    if last["content"].strip():
        raise RowError(Reason.MALFORMED)
    return before, last["content"]


Reader = Callable[[Row, str], SFTExample]
ScoredReader = Callable[[Row], Scored]
