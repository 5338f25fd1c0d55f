"""Makes a prompt and its responses fit, at the borders of messages where that is possible, and says what it did.

A dialogue that is too long loses its first messages: at most 30 tokens of

    system  "Be brief."      user "2 + 2?"     assistant "4"     user "And 3 + 3?"        (41 tokens)
    system  "Be brief."                                          user "And 3 + 3?"        (22 tokens)

Where one message alone is too long, its tokens are cut, at the end that the user chose; but never those that open the
assistant's turn, without which the response would begin nowhere.
"""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Literal, NamedTuple

from lit_isdpo.data.encoding import Encoded
from lit_isdpo.data.readers import Reason, RowError
from lit_isdpo.types import Conversation, Message, Prompt

TruncationMode = Literal["keep_end", "keep_start", "drop"]
Encode = Callable[[Prompt], Encoded]


class Change(StrEnum):
    """What was done to a row to make it fit, or is odd about it; the summary counts those of each kind."""

    FIRST_MESSAGES_CUT = "first messages left out"
    PROMPT_CUT = "prompt cut"
    RESPONSE_CUT = "response cut"
    INNER_TERMINATOR = "terminator inside a response"


class Fitted(NamedTuple):
    """A prompt, the responses to it, and what was done to them."""

    prompt_ids: list[int]
    completions: list[list[int]]
    changes: list[str]


def fit_length(
    prompt: Prompt,
    encode: Encode,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
    bos_token_id: int | None = None,
    header: Callable[[], list[int]] = list,
) -> Fitted:
    """Encodes a prompt with its responses, and cuts what is too long.

    Args:
        prompt: a text, or the messages of a conversation.
        encode: gives the ids of a prompt, and of the responses to it with their terminators, and what it notes.
        max_length: of the prompt and a response together, in tokens; a response that is longer loses its end.
        max_prompt_length: in tokens, at least 1 and less than ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept; ``drop`` keeps none.
        bos_token_id: stays where a prompt begins with it.
        header: gives the ids at a prompt's end that open the assistant's turn, which are never cut.

    Raises:
        RowError: a prompt is too long and may not be cut, or there is no room for more than the header.

    >>> fit_length("abcd", lambda text: Encoded([*map(ord, text)], [[101, 0]]), max_length=3, max_prompt_length=2)
    Fitted(prompt_ids=[99, 100], completions=[[101]], changes=['prompt cut', 'response cut'])
    """
    assert 1 <= max_prompt_length < max_length
    prompt_ids, completions, noted, _ = encode(prompt)
    changes = []
    if len(prompt_ids) > max_prompt_length:
        if truncation_mode == "drop":
            raise RowError(Reason.LONG_PROMPT)
        shorter = _last_messages(prompt, encode, max_prompt_length) if truncation_mode == "keep_end" else None
        if shorter is not None:
            prompt_ids, completions, noted, _ = shorter
            changes.append(Change.FIRST_MESSAGES_CUT.value)
        else:
            prompt_ids = _cut(prompt_ids, header(), max_prompt_length, truncation_mode, bos_token_id)
            changes.append(Change.PROMPT_CUT.value)
    if any(ids and ids[-1] in ids[:-1] for ids in completions):
        changes.append(Change.INNER_TERMINATOR.value)
    room = max_length - len(prompt_ids)
    if any(len(ids) > room for ids in completions):
        changes.append(Change.RESPONSE_CUT.value)
    return Fitted(prompt_ids, [ids[:room] for ids in completions], [*changes, *noted])


def _last_messages(prompt: Prompt, encode: Encode, max_length: int) -> Encoded | None:
    """The longest end of a conversation that fits, from a user's turn on; the system's words go last."""
    if isinstance(prompt, str):
        return None
    for messages in _ends(prompt):
        try:
            encoded = encode(Conversation.like(prompt, messages))
        except RowError:  # a template may refuse a conversation that it accepts as a whole
            continue
        if len(encoded.prompt_ids) <= max_length:
            return encoded
    return None


def _ends(messages: list[Message]) -> Iterator[list[Message]]:
    first = next((at for at, turn in enumerate(messages) if turn["role"] not in ("system", "developer")), len(messages))
    users = [at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"]
    for at in users:
        yield messages[:first] + messages[at:]
    if first:
        yield messages[max([first, *users]) :]


def _cut(ids: list[int], header: list[int], length: int, mode: TruncationMode, bos_token_id: int | None) -> list[int]:
    """At most ``length`` ids of a prompt, BOS and the header among them."""
    head = ids[:1] if ids[0] == bos_token_id else []
    room = length - len(head) - len(header)
    if room < bool(header):
        raise RowError(Reason.LONG_PROMPT)
    if mode == "keep_start":
        return head + ids[len(head) :][:room] + header
    return head + ids[len(ids) - length + len(head) :]
