"""Token ids of text as it stands within a sequence: behind special tokens, behind other text, as a turn of a chat.

Tokenizers put in front of a text what they want at the beginning of a sequence, a BOS or a blank; what follows a prompt
must have neither. Nothing here knows of pairs or lengths.
"""

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_isdpo.data.readers import Reason, RowError
from lit_isdpo.types import InputError, Message

_ANCHOR = "\n"


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
    """Encodes what follows other text.

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
    """The ids of ``_ANCHOR`` where the tokenizer puts a blank before a text; none where it does not."""
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
    messages: list[Message], responses: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Renders a conversation with and without its last turn; what the turn adds is the completion."""
    prompt = render_chat(messages, tokenizer, add_generation_prompt=True)
    completions = []
    for response in responses:
        turn = Message(role="assistant", content=response)
        full = render_chat([*messages, turn], tokenizer, add_generation_prompt=False)
        if not full.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            raise InputError(
                f"the chat template of {tokenizer.name_or_path!r} does not begin prompt and response as it renders the "
                f"prompt alone, which goes on with {prompt[at:][:60]!r} where both together go on with "
                f"{full[at:][:60]!r}; a template that thinks needs data.chat_template: never, or another template"
            )
        completions.append(_encode_turn(full[len(prompt) :], response, tokenizer))
    # The template writes BOS itself, where it wants one.
    return _encode(prompt, tokenizer), completions


def render_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    """A conversation as the chat template writes it.

    Raises:
        RowError: the template refuses it.
    """
    try:
        conversation: Any = messages
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise RowError(Reason.TEMPLATE) from error
    return str(text)


def _encode_turn(text: str, response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes a rendered assistant turn up to the token that ends it, and adds EOS where the template has none.

    Templates write more after that token, mostly a line break, which the model is never asked for.
    """
    ids = encode_inside(text.rstrip(), tokenizer)
    if ids and ids[-1] in special_ids(tokenizer) and ids[-1] != tokenizer.unk_token_id:
        return _ended_once(ids)
    return with_eos(encode_inside(text, tokenizer) if text.endswith(response) else ids, tokenizer)
