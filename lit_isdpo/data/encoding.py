"""Token ids of text within a sequence: after special tokens, after other text, as a turn of a chat.

Tokenizers begin a text with a BOS or a blank, as at the beginning of a sequence; the text after a prompt must have
neither. Nothing here knows pairs or lengths.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_isdpo.data.outcomes import Change, Reason, RowError, noted
from lit_isdpo.data.row_fields import THOUGHTS
from lit_isdpo.names import named_path
from lit_isdpo.types import NEEDS_CODE, Answer, Conversation, InputError, Message, first_line

THINKS = "a template that thinks may need data.chat_template_kwargs, as in {enable_thinking: false} or true"
_ANCHOR = "\n"
_SHOWN = 80  # characters of a text in a message
_ANYWHERE = ("system", "developer")  # some templates move their turns, into the last user turn for one


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a local folder or from the hub.

    Args:
        path: folder or hub id of a model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        InputError: there is none, or it has no EOS token.
    """
    try:
        local = named_path(path, "reference")
        tokenizer = AutoTokenizer.from_pretrained(local, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = NEEDS_CODE if "trust_remote_code" in str(error) else first_line(error)
        raise InputError(f"no tokenizer can be loaded from {path!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path!r} has no EOS token, so that no response could end")
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of padding: EOS if the tokenizer has no padding token, as the masks tell padding from text."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def terminator_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: EOS, and the one that ends an assistant's turn in the chat template."""
    ids = [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
        with suppress(RowError):  # the template refuses a plain turn
            ids.append(_encode_turn(render_chat(turns, tokenizer, {}, opens_answer=False), "b", tokenizer)[-1])
    return list(dict.fromkeys(ids))


def check_template_options(options: Mapping[str, Any]) -> None:
    """Checks the further variables of a chat template.

    Raises:
        InputError: a name is no text or means something to ``apply_chat_template``, or JSON has no word for a value.
    """
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"} | {"messages"}
    for name, value in options.items():
        if not isinstance(name, str) or name in own:
            raise InputError(
                f"data.chat_template_kwargs: {name!r} is no name for a variable of the template; rename it"
            )
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"data.chat_template_kwargs: {name} must be a plain value: {error}") from error


class Encoded(NamedTuple):
    """A prompt and the responses to it as token ids.

    Attributes:
        prompt_ids: of the prompt.
        completions: of each response, with its terminator.
        changes: notes about text that differs from the data.
        rewritten: the error of a response whose text is not in the rendering.
    """

    prompt_ids: list[int]
    completions: list[list[int]]
    changes: Sequence[str] = ()
    rewritten: RowError | None = None


@lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are no text; not all of them are among ``all_special_ids``: Llama 3's <|eot_id|> is not."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose would warn of texts longer than the model takes; they are cut later
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair
        raise RowError(Reason.MALFORMED) from error


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes with the tokenizer's own special tokens before the text, but none after it: the response follows."""
    ids, leading = _encode(text, tokenizer), _leading_ids(tokenizer)
    has_bos = ids[:1] == [tokenizer.bos_token_id] and leading[-1:] == ids[:1]
    return [*(leading[:-1] if has_bos else leading), *ids]


def encode_inside(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes text that follows other text.

    SentencePiece puts a blank before every text, which would stand between a prompt and its response.
    """
    anchor = _anchor(tokenizer)
    ids = _encode(_ANCHOR + text, tokenizer) if anchor else []
    return ids[len(anchor) :] if anchor and ids[: len(anchor)] == anchor else _encode(text, tokenizer)


@lru_cache(maxsize=8)
def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain, full = _encode("a", tokenizer), list(tokenizer("a")["input_ids"])
    starts = (at for at in range(len(full)) if full[at : at + len(plain)] == plain)
    return full[: next(starts, 0)]


@lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of ``_ANCHOR`` if the tokenizer puts a blank before a text; else none."""
    alone, inside = _encode("b", tokenizer), _encode(_ANCHOR + "b", tokenizer)
    return [] if inside[len(inside) - len(alone) :] == alone else _encode(_ANCHOR, tokenizer)


def with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with one EOS at their end."""
    return _ended_once(ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, int(tokenizer.eos_token_id)])


def _ended_once(ids: list[int]) -> list[int]:
    while len(ids) > 1 and ids[-1] == ids[-2]:
        ids.pop()
    return ids


def encode_chat(
    messages: list[Message], responses: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> Encoded:
    """Renders a conversation with and without its last turn; the completion is the text that the turn adds.

    Raises:
        RowError: the template refuses the conversation, does not render a prompt as the beginning of prompt and
            response, or writes the beginning of an answer in other words.
    """
    before, prefix = split_prefix(messages)
    prompt = opened = render_chat(before, tokenizer, options, opens_answer=True)
    added, rewritten, completions = [], None, []
    for response in responses:
        turn = Message(role="assistant", content=response) if isinstance(response, str) else response
        whole = cast(Message, {**turn, "content": prefix + turn["content"]})
        turns = Conversation.like(before, [*before, whole])
        full = render_chat(turns, tokenizer, options, opens_answer=False)
        if not full.startswith(opened):
            at = next((i for i, (a, b) in enumerate(zip(opened, full, strict=False)) if a != b), len(full))
            shown = f"goes on with {opened[at:][:60]!r}, and both together with {full[at:][:60]!r}"
            raise RowError(Reason.NO_BEGINNING, shown=f"the prompt {shown}; {THINKS}")
        completion = full[len(opened) :]
        if prefix:
            blanks = completion[: -len(completion.lstrip())]  # the template's, which may also take those of the text
            begun = prefix if completion.startswith(prefix) else blanks + prefix.lstrip()
            if not completion.startswith(begun):
                raise RowError(Reason.REWRITTEN, "the beginning of an answer in the prompt", _beside(prefix, full))
            prompt, completion = opened + begun, completion[len(begun) :]
        try:
            added += _added(turn, completion, tokenizer)
        except RowError as error:
            rewritten = rewritten or error
        completions.append(_encode_turn(completion, turn["content"], tokenizer))
    changes = added[:1]  # it is the row that is counted
    if lost := _left_out(before, prompt):
        changes.append(noted(Change.PROMPT_REWRITTEN, lost))
    # A template that wants a BOS writes it.
    return Encoded(_encode(prompt, tokenizer), completions, tuple(changes), rewritten)


def split_prefix(messages: list[Message]) -> tuple[Conversation, str]:
    """The turns of a conversation, and the beginning of an answer after them; mostly there is none."""
    if messages[-1].get("prefix") and len(messages) > 1:
        return Conversation.like(messages, messages[:-1]), messages[-1]["content"]
    return Conversation.like(messages, messages), ""


def render_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], *, opens_answer: bool
) -> str:
    """A conversation as the chat template writes it.

    Raises:
        RowError: the template refuses it.
    """
    conversation: Any = messages
    if any("prefix" in turn for turn in messages):
        conversation = [{key: value for key, value in turn.items() if key != "prefix"} for turn in messages]
    tools: Any = messages.tools if isinstance(messages, Conversation) else None
    try:
        text = tokenizer.apply_chat_template(
            conversation, tools=tools, tokenize=False, add_generation_prompt=opens_answer, **options
        )
    except Exception as error:  # a template is a program: it may divide by zero, or add text to a number
        raise RowError(Reason.TEMPLATE, shown=str(error)) from error
    return str(text)


def special_in(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer reads a part of a text as a special token, which is no text to the model."""
    return not tokenizer.split_special_tokens and _special_pattern(tokenizer).search(text) is not None


@lru_cache(maxsize=8)
def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = (str(tokenizer.convert_ids_to_tokens(token)) for token in special_ids(tokenizer))
    return re.compile("|".join(re.escape(token) for token in tokens) or "(?!)")


def _added(turn: Message, completion: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Notes the text of a rendered response that is not the response's own.

    Raises:
        RowError: some of the text is not there, or stands in markup that it has itself.
    """
    content = turn["content"].strip()
    others = list(_other_texts(turn)) if len(turn) > 2 else []  # role and content are in every turn
    missing = [text for text in [content, *others] if _find(text, completion) is None]
    if missing == [content] and _without_blanks(content) in _without_blanks(completion):
        return [noted(Change.RESPONSE_BLANKS, _beside(content, completion))]
    if missing:
        raise RowError(Reason.REWRITTEN, shown=_beside(missing[0], completion))
    blanks = turn["content"][: -len(turn["content"].lstrip())]
    if blanks and turn["content"].rstrip() not in completion:  # an indentation may have a meaning
        return [noted(Change.RESPONSE_BLANKS, _beside(turn["content"], completion))]
    if others:  # how a thought or a call is written is the template's business
        return []
    at = completion.find(content)
    before, after = completion[:at], completion[at + len(content) :]
    added = _special_pattern(tokenizer).sub("", before + after).strip()
    if any(tag in content for tag in re.findall(r"</?\w+>", added)):
        raise RowError(Reason.REWRITTEN, "it stands in markup that it has itself", _beside(content, completion))
    return [noted(Change.RESPONSE_EXTENDED, _beside(content, completion))] if added else []


def _left_out(messages: Conversation, rendered: str) -> str:
    """Describes the first text of a conversation that is missing in its rendering; empty if none is."""
    at = 0
    for place, turn in enumerate(messages):
        moves = turn["role"] in _ANYWHERE
        end = _find(turn["content"].strip(), rendered, 0 if moves else at)
        missing = [turn["content"]] if end is None else []
        if len(turn) > 2:
            missing += [text for text in _other_texts(turn) if _find(text, rendered) is None]
        if missing:
            return f"prompt[{place}]: {_beside(missing[0], rendered)}"
        at = at if moves or end is None else end
    names = (tool.get("function", tool).get("name") for tool in messages.tools or ())
    missing = [name for name in names if isinstance(name, str) and _find(name, rendered) is None]
    return f"tools: {_beside(missing[0], rendered)}" if missing else ""


def _other_texts(turn: Message) -> Iterator[str]:
    """The text of a turn besides its content: who speaks, thoughts, and the names and arguments of calls."""
    fields = cast(dict[str, Any], turn)
    if "name" in fields and turn["role"] not in ("tool", "function"):  # the call says the name of a tool
        yield fields["name"]
    yield from (fields[name].strip() for name in THOUGHTS if name in fields)
    for call in fields.get("tool_calls", ()):
        function = call.get("function", call)
        yield from _leaves({key: function[key] for key in ("name", "arguments") if key in function})


def has_more_than_text(turn: Message) -> bool:
    """Whether a plain transcript has no place for some of a turn."""
    return next(_other_texts(turn), None) is not None


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _find(text: str, rendered: str, start: int = 0) -> int | None:
    """The end of a text in a rendering that has it unchanged, as JSON, or as JSON within JSON."""
    if (at := rendered.find(text, start)) >= 0:
        return at + len(text)
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    for form in (once, json.dumps(text)[1:-1], json.dumps(once, ensure_ascii=False)[1:-1]):
        if (at := rendered.find(form, start)) >= 0:
            return at + len(form)
    return None


def _without_blanks(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _beside(text: str, rendered: str) -> str:
    """A text and its rendering, for a message."""
    return f"{text[:_SHOWN]!r} is rendered as {rendered[-_SHOWN:].strip()!r}"


def _encode_turn(text: str, response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes a rendered assistant turn up to the token that ends it, and adds EOS if the template has no such token.

    Templates write more after that token, mostly a line break, which the model is never asked for.
    """
    ids = encode_inside(text.rstrip(), tokenizer)
    if ids and ids[-1] in special_ids(tokenizer) and ids[-1] != tokenizer.unk_token_id:
        return _ended_once(ids)
    return with_eos(encode_inside(text, tokenizer) if text.endswith(response) else ids, tokenizer)
