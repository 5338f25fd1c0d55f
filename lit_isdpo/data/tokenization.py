r"""Text in, token ids out: one prompt for both responses, and exact boundaries between prompt and response.

For a conversation with one turn and the response "4", these texts are encoded:

    a string prompt      "2 + 2 ="  (with the tokenizer's BOS)               " 4" + EOS
    a chat template      "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"   "4<|im_end|>"
    without a template   "\n\nHuman: 2 + 2?\n\nAssistant:"  (with BOS)        " 4" + EOS

A dialogue that is too long loses its first messages: at most 30 tokens of

    system  "Be brief."      user "2 + 2?"     assistant "4"     user "And 3 + 3?"        (41 tokens)
    system  "Be brief."                                          user "And 3 + 3?"        (22 tokens)

If one message is too long by itself, its tokens are cut at the end that the user chose, but never those that open the
assistant's turn. A response that is too long loses its end and EOS, so that the model does not learn to stop there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_isdpo.data.encoding import (
    Encoded,
    encode_chat,
    encode_inside,
    encode_prompt,
    has_more_than_text,
    render_chat,
    special_in,
    split_prefix,
    with_eos,
)
from lit_isdpo.data.outcomes import Change, Reason, RowError
from lit_isdpo.types import (
    Answer,
    Conversation,
    InputError,
    Message,
    PreferenceExample,
    Prompt,
    SFTExample,
    TokenizedExample,
    TokenizedPair,
)

ChatTemplate = Literal["auto", "always", "never"]
TruncationMode = Literal["keep_end", "keep_start", "drop"]
_OPENING = "\n\nAssistant:"  # opens the answer in a plain transcript
_CUTS = {Change.FIRST_MESSAGES_CUT, Change.PROMPT_CUT, Change.RESPONSE_CUT}


@dataclass(frozen=True)
class Limits:
    """How long texts may be, in tokens.

    Args:
        max_length: of the prompt and a response together; a response that is longer loses its end.
        max_prompt_length: at least 1 and less than ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept; ``drop`` leaves the row out.
    """

    max_length: int
    max_prompt_length: int
    truncation_mode: TruncationMode = "keep_end"

    def __post_init__(self) -> None:
        assert 1 <= self.max_prompt_length < self.max_length


@dataclass(frozen=True)
class TextEncoder:
    """Writes prompts and responses as a model reads them.

    Args:
        tokenizer: with an EOS token.
        chat_template: ``auto`` uses the tokenizer's template for message lists, ``always`` for strings too (as one user
            turn), ``never`` writes conversations as a plain transcript.
        template_options: further variables of the chat template.
        first_without_row: the first id that the model's embedding has no row for; ``None`` if it has all.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate = "auto"
    template_options: Mapping[str, Any] = field(default_factory=dict)
    first_without_row: int | None = None

    def render(self, prompt: Prompt) -> str:
        """The text of a prompt up to the response; only a template writes a BOS into it.

        Raises:
            RowError: the chat template refuses the conversation.
        """
        messages = self._templated(prompt)
        if messages is not None:
            before, prefix = split_prefix(messages)
            return self._rendered(before, opens_answer=True) + prefix
        return prompt if isinstance(prompt, str) else transcript(prompt)

    def encode(self, prompt: Prompt, responses: Sequence[Answer]) -> Encoded:
        """Encodes a prompt, and each response up to the token that ends it.

        Raises:
            RowError: the prompt has no tokens, or the model has no row for one, or the chat template refuses the
                conversation or does not render the prompt as the beginning of prompt and response.
            InputError: there is no template, and ``always`` asks for one; or none of several is the default.
        """
        messages = self._templated(prompt)
        if messages is not None:
            encoded = encode_chat(messages, responses, self.tokenizer, self.template_options)
        else:
            encoded = self._encode_plain(prompt, responses)
        if not encoded.prompt_ids:
            raise RowError(Reason.EMPTY_PROMPT)
        if self.first_without_row is not None:
            largest = max(map(max, filter(None, [encoded.prompt_ids, *encoded.completions])))
            if largest >= self.first_without_row:
                raise RowError(Reason.NO_ROW, shown=f"{self.tokenizer.convert_ids_to_tokens(largest)} is {largest}")
        return encoded

    def header(self, prompt: Prompt) -> list[int]:
        """The ids at a prompt's end that open the assistant's turn; a plain text has none."""
        messages = self._templated(prompt)
        if messages is None:
            if isinstance(prompt, str):
                return []
            prefix = split_prefix(prompt)[1]
            return encode_inside(_OPENING + (f" {prefix}" if prefix else ""), self.tokenizer)
        turns, prefix = split_prefix(messages)
        opened, before = (self._rendered(turns, opens_answer=added) for added in (True, False))
        text = (opened[len(before) :] if opened.startswith(before) else "") + prefix
        return encode_inside(text, self.tokenizer) if text else []

    def uses_template(self, prompt: Prompt) -> bool:
        """Whether a prompt is rendered with the chat template."""
        return self._templated(prompt) is not None

    def has_special(self, prompt: Prompt) -> bool:
        """Whether a prompt's text holds a special token, other than BOS at the beginning of a plain one."""
        bos = str(self.tokenizer.bos_token or "")
        texts = [prompt.removeprefix(bos)] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
        return any(special_in(text, self.tokenizer) for text in texts)

    def _rendered(self, turns: list[Message], *, opens_answer: bool) -> str:
        return render_chat(turns, self.tokenizer, self.template_options, opens_answer=opens_answer)

    def _encode_plain(self, prompt: Prompt, responses: Sequence[Answer]) -> Encoded:
        """A plain text or transcript, which has a place for text only, not for thoughts, calls and tools."""
        tokenizer, rewritten, changes = self.tokenizer, None, []
        # A transcript's turns begin with a space; a string's own spaces are the user's.
        space = "" if isinstance(prompt, str) or split_prefix(prompt)[1] else " "
        texts = [response if isinstance(response, str) else response["content"] for response in responses]
        if not all(isinstance(response, str) for response in responses):
            rewritten = RowError(Reason.REWRITTEN, "a plain transcript has no place for thoughts and tool calls")
        has_tools = isinstance(prompt, Conversation) and bool(prompt.tools)
        if has_tools or (not isinstance(prompt, str) and any(map(has_more_than_text, prompt))):
            changes.append(Change.PROMPT_REWRITTEN)
        return Encoded(
            encode_prompt(self.render(prompt), tokenizer),
            [with_eos(encode_inside(space + text, tokenizer), tokenizer) for text in texts],
            tuple(changes),
            rewritten,
        )

    def _templated(self, prompt: Prompt) -> list[Message] | None:
        """The messages to render with the chat template, or ``None`` if it is not to be used."""
        if self.chat_template == "always" and not self.tokenizer.chat_template:
            raise InputError(
                f"data.chat_template is 'always', but the tokenizer of {self.tokenizer.name_or_path!r} has no chat "
                "template"
            )
        if isinstance(prompt, str):
            messages = [Message(role="user", content=prompt)] if self.chat_template == "always" else None
        else:
            messages = None if self.chat_template == "never" or not self.tokenizer.chat_template else prompt
        templates = self.tokenizer.chat_template
        if messages is not None and isinstance(templates, dict) and "default" not in templates:
            raise InputError(
                f"data.chat_template: the tokenizer of {self.tokenizer.name_or_path!r} has the chat templates "
                f"{', '.join(sorted(templates))}, and none is the default; copy additional_chat_templates/"
                f"{min(templates)}.jinja, or another, to chat_template.jinja in a folder of the model, or set the "
                "option to never"
            )
        return messages


def transcript(messages: Sequence[Message]) -> str:
    r"""A conversation as plain text, in the form of Anthropic's hh-rlhf; a system turn stands without a name.

    >>> transcript([{"role": "user", "content": "2 + 2?"}])
    '\n\nHuman: 2 + 2?\n\nAssistant:'
    """
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", **dict.fromkeys(("tool", "function"), "\n\nTool: ")}
    text = "".join(names.get(turn["role"], "\n\n" if i else "") + turn["content"] for i, turn in enumerate(messages))
    return text if messages[-1].get("prefix") else text + _OPENING


def tokenize_pair(example: PreferenceExample, encoder: TextEncoder, limits: Limits) -> TokenizedPair:
    """Encodes a pair. Both responses follow the same prompt ids.

    Raises:
        RowError: the prompt has no tokens or may not be cut, a response is empty or not rendered as given, the
            responses are the same, or they were cut although they have behavior log-probs, which are those of the whole
            response.
        InputError: as :meth:`TextEncoder.encode`.
    """
    if example.chosen == example.rejected:
        raise RowError(Reason.IDENTICAL)
    fitted = _tokenize(example.prompt, [example.chosen, example.rejected], encoder, limits)
    chosen_ids, rejected_ids = fitted.completions
    if chosen_ids == rejected_ids:
        raise RowError(Reason.IDENTICAL_TOKENS)
    if example.chosen_behavior_logps is not None and _CUTS.intersection(fitted.changes):
        raise RowError(Reason.CUT_BEHAVIOR)
    shared = {name: getattr(example, name) for name in PreferenceExample._fields if name in TokenizedPair._fields}
    shared["changes"] = [*fitted.changes, *example.changes]
    return TokenizedPair(fitted.prompt_ids, chosen_ids, rejected_ids, **shared)


def tokenize_example(example: SFTExample, encoder: TextEncoder, limits: Limits) -> TokenizedExample:
    """Encodes a demonstration; errors as in :func:`tokenize_pair`."""
    prompt_ids, (completion_ids,), changes, _ = _tokenize(example.prompt, [example.completion], encoder, limits)
    return TokenizedExample(prompt_ids, completion_ids, [*changes, *example.changes])


def tokenize_response(
    prompt: Prompt, response: str, encoder: TextEncoder, limits: Limits, *, finished: bool
) -> TokenizedExample:
    """Encodes a response that was sampled, as :func:`tokenize_example` would.

    It may be empty, and a chat template may leave some of it out, such as a thought.

    Args:
        prompt: as the data has it.
        response: text, special tokens left out.
        encoder: writes the text.
        limits: the largest lengths.
        finished: false if the token limit cut the response, which then gets no EOS.

    Raises:
        RowError: the prompt has no tokens or may not be cut, or the chat template refuses it.
        InputError: as in :func:`tokenize_pair`.
    """
    if not isinstance(prompt, str) and not encoder.uses_template(prompt) and not split_prefix(prompt)[1]:
        response = response.removeprefix(" ")  # a policy writes the transcript's space itself

    def encode(prompt: Prompt) -> Encoded:
        encoded = encoder.encode(prompt, [response])
        return encoded if finished else encoded._replace(completions=[ids[:-1] for ids in encoded.completions])

    prompt_ids, (ids,), changes, _ = fit_length(prompt, encode, limits, encoder)
    return TokenizedExample(prompt_ids, ids, changes)


def _tokenize(prompt: Prompt, responses: list[Answer], encoder: TextEncoder, limits: Limits) -> Encoded:
    """Encodes a prompt with its responses, and makes them fit."""
    texts = [response if isinstance(response, str) else response["content"] for response in responses]
    if not all(text.strip() or text is not response for text, response in zip(texts, responses, strict=True)):
        raise RowError(Reason.EMPTY_RESPONSE)

    def encode(prompt: Prompt) -> Encoded:
        encoded = encoder.encode(prompt, responses)
        if encoded.rewritten is not None:
            raise encoded.rewritten
        if any(len(ids) == 1 for ids in encoded.completions):  # only the terminator
            raise RowError(Reason.EMPTY_RESPONSE)
        return encoded

    fitted = fit_length(prompt, encode, limits, encoder)
    odd = []
    if encoder.has_special(prompt):
        odd.append(Change.SPECIAL_IN_PROMPT)
    inside = any(special_in(text.rstrip()[:-1], encoder.tokenizer) for text in texts)
    if inside and Change.INNER_TERMINATOR not in fitted.changes:
        odd.append(Change.SPECIAL_IN_RESPONSE)
    return fitted._replace(changes=(*fitted.changes, *odd))


def fit_length(prompt: Prompt, encode: Callable[[Prompt], Encoded], limits: Limits, encoder: TextEncoder) -> Encoded:
    """Encodes a prompt with its responses, and cuts them if they are too long.

    Args:
        prompt: a text, or the messages of a conversation.
        encode: gives the ids of a prompt, and of the responses to it with their terminators.
        limits: the largest lengths.
        encoder: tells which ids of a prompt are never cut: BOS, and those that open the assistant's turn.

    Raises:
        RowError: a prompt is too long and may not be cut, or there is no room for more than the header.
    """
    encoded, changes = encode(prompt), []
    if len(encoded.prompt_ids) > limits.max_prompt_length:
        if limits.truncation_mode == "drop":
            raise RowError(Reason.LONG_PROMPT)
        shorter = _last_messages(prompt, encode, limits) if limits.truncation_mode == "keep_end" else None
        if shorter is not None:
            encoded = shorter
            changes.append(Change.FIRST_MESSAGES_CUT)
        else:
            header, bos = encoder.header(prompt), encoder.tokenizer.bos_token_id
            encoded = encoded._replace(prompt_ids=_cut(encoded.prompt_ids, header, limits, bos))
            changes.append(Change.PROMPT_CUT)
    if any(ids and ids[-1] in ids[:-1] for ids in encoded.completions):
        changes.append(Change.INNER_TERMINATOR)
    room = limits.max_length - len(encoded.prompt_ids)
    if any(len(ids) > room for ids in encoded.completions):
        changes.append(Change.RESPONSE_CUT)
    return encoded._replace(
        completions=[ids[:room] for ids in encoded.completions], changes=(*changes, *encoded.changes)
    )


def _last_messages(prompt: Prompt, encode: Callable[[Prompt], Encoded], limits: Limits) -> Encoded | None:
    """The longest end of a conversation that fits, from a user's turn on; the system's words go last."""
    if isinstance(prompt, str):
        return None
    for messages in _ends(prompt):
        try:
            encoded = encode(Conversation.like(prompt, messages))
        except RowError:  # a template may refuse a conversation that it accepts as a whole
            continue
        if len(encoded.prompt_ids) <= limits.max_prompt_length:
            return encoded
    return None


def _ends(messages: list[Message]) -> Iterator[list[Message]]:
    first = next((at for at, turn in enumerate(messages) if turn["role"] not in ("system", "developer")), len(messages))
    users = [at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"]
    for at in users:
        yield messages[:first] + messages[at:]
    if first:
        yield messages[max([first, *users]) :]


def _cut(ids: list[int], header: list[int], limits: Limits, bos_token_id: int | None) -> list[int]:
    """The ids of a prompt that fit, BOS and the header among them."""
    head = ids[:1] if ids[0] == bos_token_id else []
    room = limits.max_prompt_length - len(head) - len(header)
    if room < bool(header):
        raise RowError(Reason.LONG_PROMPT)
    if limits.truncation_mode == "keep_start":
        return head + ids[len(head) :][:room] + header
    return head + ids[len(ids) - limits.max_prompt_length + len(head) :]
