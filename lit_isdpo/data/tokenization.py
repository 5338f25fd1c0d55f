r"""Text in, token ids out: one prompt for both responses, and exact boundaries between prompt and response.

What is encoded, for a conversation with one turn and the response "4":

    a string prompt      "2 + 2 ="  (with the tokenizer's BOS)               " 4" + EOS
    a chat template      "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"   "4<|im_end|>"
    without a template   "\n\nHuman: 2 + 2?\n\nAssistant:"  (with BOS)        " 4" + EOS

A prompt that is too long loses its first messages, else its beginning (or its end), see ``truncation``; a response that
is too long loses its end, EOS included, so that the model does not learn to stop where the data was merely cut. The
module is long because it documents the limits of pairs, demonstrations and sampled responses.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_isdpo.data.encoding import (
    PROMPT_REWRITTEN,
    SPECIAL_IN_PROMPT,
    SPECIAL_IN_RESPONSE,
    Encoded,
    encode_chat,
    encode_inside,
    encode_prompt,
    has_more_than_text,
    render_chat,
    special_in,
    split_prefix,
    turn_end,
    with_eos,
)
from lit_isdpo.data.readers import Reason, RowError
from lit_isdpo.data.truncation import Change, Fitted, TruncationMode, fit_length
from lit_isdpo.names import named_path
from lit_isdpo.types import (
    NEEDS_CODE,
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
_OPENING = "\n\nAssistant:"  # of a plain transcript's answer
_CUTS = {Change.FIRST_MESSAGES_CUT, Change.PROMPT_CUT, Change.RESPONSE_CUT}


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
        # The libraries' messages run over many lines; the first one says what went wrong.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = NEEDS_CODE
        raise InputError(f"no tokenizer can be loaded from {path!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path!r} has no EOS token, so that no response could end")
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up: EOS where the tokenizer has no padding token, as masks say what counts."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def terminator_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: EOS, and what the chat template ends an assistant turn with, where it differs."""
    eos = int(tokenizer.eos_token_id)
    end = turn_end(tokenizer) if tokenizer.chat_template else None
    return [eos] if end is None else list(dict.fromkeys([eos, end]))


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


@dataclass(frozen=True)
class TextEncoder:
    """Writes prompts and responses as a model reads them.

    Args:
        tokenizer: with an EOS token.
        chat_template: ``auto`` uses the tokenizer's template for message lists, ``always`` for strings too (as one user
            turn), ``never`` writes conversations as a plain transcript.
        template_options: further variables of the chat template.
        first_without_row: the first id that the model's embedding has no row for; ``None`` where it has all.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate = "auto"
    template_options: Mapping[str, Any] = field(default_factory=dict)
    first_without_row: int | None = None

    def render(self, prompt: Prompt) -> str:
        """The text of a prompt up to where the response begins; BOS is not in it, but for templates.

        Raises:
            RowError: the chat template refuses the conversation.
        """
        messages = self._templated(prompt)
        if messages is not None:
            before, prefix = split_prefix(messages)
            return self._rendered(before, add_generation_prompt=True) + prefix
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
        opened = self._rendered(turns, add_generation_prompt=True)
        before = self._rendered(turns, add_generation_prompt=False)
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

    def _rendered(self, turns: list[Message], *, add_generation_prompt: bool) -> str:
        return render_chat(turns, self.tokenizer, self.template_options, add_generation_prompt=add_generation_prompt)

    def _encode_plain(self, prompt: Prompt, responses: Sequence[Answer]) -> Encoded:
        """A plain text or transcript, which has a place for text only, not for thoughts, calls and tools."""
        tokenizer, rewritten, changes = self.tokenizer, None, []
        # A transcript's turns begin with a space; a string's own spaces are the user's.
        space = "" if isinstance(prompt, str) or split_prefix(prompt)[1] else " "
        texts = [response if isinstance(response, str) else response["content"] for response in responses]
        if not all(isinstance(response, str) for response in responses):
            rewritten = RowError(Reason.REWRITTEN, "a plain transcript has no place for thoughts and tool calls")
        if not isinstance(prompt, str) and (
            any(has_more_than_text(turn) for turn in prompt) or (isinstance(prompt, Conversation) and prompt.tools)
        ):
            changes.append(PROMPT_REWRITTEN)
        return Encoded(
            encode_prompt(self.render(prompt), tokenizer),
            [with_eos(encode_inside(space + text, tokenizer), tokenizer) for text in texts],
            tuple(changes),
            rewritten,
        )

    def _templated(self, prompt: Prompt) -> list[Message] | None:
        """The messages to render with the chat template, or ``None`` where it is not to be used."""
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


def tokenize_pair(
    example: PreferenceExample,
    encoder: TextEncoder,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
) -> TokenizedPair:
    """Encodes a pair. Both responses follow the same prompt ids.

    Args:
        example: the pair as text.
        encoder: writes it.
        max_length: of the prompt and a response together, in tokens.
        max_prompt_length: in tokens, at least 1 and less than ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept, or ``drop``.

    Raises:
        RowError: the prompt has no tokens or may not be cut, a response is empty or not what the chat template writes,
            the responses are the same, or they were cut although they have behavior log-probs, which are those of the
            whole response.
        InputError: as :meth:`TextEncoder.encode`.
    """
    if example.chosen == example.rejected:
        raise RowError(Reason.IDENTICAL)
    prompt_ids, (chosen_ids, rejected_ids), changes = _tokenize(
        example.prompt,
        [example.chosen, example.rejected],
        encoder,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
    )
    if chosen_ids == rejected_ids:
        raise RowError(Reason.IDENTICAL_TOKENS)
    if example.chosen_behavior_logps is not None and _CUTS.intersection(changes):
        raise RowError(Reason.CUT_BEHAVIOR)
    return TokenizedPair(
        prompt_ids,
        chosen_ids,
        rejected_ids,
        example.chosen_behavior_logps,
        example.rejected_behavior_logps,
        example.weight,
        example.margin,
        [*changes, *example.changes],
    )


def tokenize_example(
    example: SFTExample,
    encoder: TextEncoder,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
) -> TokenizedExample:
    """Encodes a demonstration; arguments and errors as in :func:`tokenize_pair`."""
    prompt_ids, (completion_ids,), changes = _tokenize(
        example.prompt,
        [example.completion],
        encoder,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
    )
    return TokenizedExample(prompt_ids, completion_ids, [*changes, *example.changes])


def tokenize_response(
    prompt: Prompt,
    response: str,
    encoder: TextEncoder,
    *,
    finished: bool,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
) -> TokenizedExample:
    """Encodes a response that was sampled, as :func:`tokenize_example` would.

    It may be empty, and a chat template may leave some of it out, such as a thought.

    Args:
        prompt: as the data has it.
        response: text, special tokens left out.
        encoder: writes it.
        finished: false where the token limit cut the response, which then gets no EOS.
        max_length: as in :func:`tokenize_pair`.
        max_prompt_length: as in :func:`tokenize_pair`.
        truncation_mode: as in :func:`tokenize_pair`.

    Raises:
        RowError: the prompt has no tokens or may not be cut, or the chat template refuses it.
        InputError: as in :func:`tokenize_pair`.
    """
    if not isinstance(prompt, str) and not encoder.uses_template(prompt) and not split_prefix(prompt)[1]:
        response = response.removeprefix(" ")  # a policy writes the transcript's space itself

    def encode(prompt: Prompt) -> Encoded:
        encoded = encoder.encode(prompt, [response])
        return encoded if finished else encoded._replace(completions=[ids[:-1] for ids in encoded.completions])

    prompt_ids, (ids,), changes = fit_length(
        prompt,
        encode,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        bos_token_id=encoder.tokenizer.bos_token_id,
        header=lambda: encoder.header(prompt),
    )
    return TokenizedExample(prompt_ids, ids, changes)


def transcript(messages: Sequence[Message]) -> str:
    r"""A conversation as plain text, in the form of Anthropic's hh-rlhf; a system turn stands without a name.

    >>> transcript([{"role": "user", "content": "2 + 2?"}])
    '\n\nHuman: 2 + 2?\n\nAssistant:'
    """
    names = {
        "user": "\n\nHuman: ",
        "assistant": "\n\nAssistant: ",
        "tool": "\n\nTool: ",
        "function": "\n\nTool: ",
    }
    text = "".join(names.get(turn["role"], "\n\n" if i else "") + turn["content"] for i, turn in enumerate(messages))
    return text if messages[-1].get("prefix") else text + _OPENING


def _tokenize(
    prompt: Prompt,
    responses: list[Answer],
    encoder: TextEncoder,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode,
) -> Fitted:
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

    fitted = fit_length(
        prompt,
        encode,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        bos_token_id=encoder.tokenizer.bos_token_id,
        header=lambda: encoder.header(prompt),
    )
    if encoder.has_special(prompt):
        fitted.changes.append(SPECIAL_IN_PROMPT)
    if Change.INNER_TERMINATOR not in fitted.changes and any(
        special_in(text.rstrip()[:-1], encoder.tokenizer) for text in texts
    ):
        fitted.changes.append(SPECIAL_IN_RESPONSE)
    return fitted
