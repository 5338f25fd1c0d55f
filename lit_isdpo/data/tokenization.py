r"""Text in, token ids out: one prompt for both responses, and exact boundaries between prompt and response.

What is encoded, for a conversation with one turn and the response "4":

    a string prompt      "2 + 2 ="  (with the tokenizer's BOS)               " 4" + EOS
    a chat template      "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"   "4<|im_end|>"
    without a template   "\n\nHuman: 2 + 2?\n\nAssistant:"  (with BOS)        " 4" + EOS

A prompt that is too long loses its first messages, else its beginning (or its end), see ``truncation``; a response that
is too long loses its end, EOS included, so that the model does not learn to stop where the data was merely cut.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_isdpo.data.encoding import encode_chat, encode_inside, encode_prompt, render_chat, with_eos
from lit_isdpo.data.readers import Reason, RowError
from lit_isdpo.data.truncation import Change, Fitted, TruncationMode, fit_length
from lit_isdpo.types import (
    NEEDS_CODE,
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
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
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
    if not tokenizer.chat_template:
        return [eos]
    try:
        _, (ids,) = encode_chat([Message(role="user", content="a")], ["b"], tokenizer)
    except RowError:
        return [eos]
    return list(dict.fromkeys([eos, ids[-1]]))


def tokenize_pair(
    example: PreferenceExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
    chat_template: ChatTemplate = "auto",
) -> TokenizedPair:
    """Encodes a pair. Both responses follow the same prompt ids.

    Args:
        example: the pair as text.
        tokenizer: with an EOS token.
        max_length: of the prompt and a response together, in tokens.
        max_prompt_length: in tokens, at least 1 and less than ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept, or ``drop``.
        chat_template: ``auto`` uses the tokenizer's template for message lists, ``always`` for strings too (as one user
            turn), ``never`` writes conversations as a plain transcript.

    Raises:
        RowError: the prompt has no tokens or may not be cut, a response is empty, the responses are the same, or they
            were cut although they have behavior log-probs, which are those of the whole response.
        InputError: the template does not render a prompt as the beginning of prompt and response.
    """
    if example.chosen == example.rejected:
        raise RowError(Reason.IDENTICAL)
    prompt_ids, (chosen_ids, rejected_ids), changes = _tokenize(
        example.prompt,
        [example.chosen, example.rejected],
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        chat_template=chat_template,
    )
    if chosen_ids == rejected_ids:
        raise RowError(Reason.IDENTICAL_TOKENS)
    if example.chosen_behavior_logps is not None and not {Change.INNER_TERMINATOR}.issuperset(changes):
        raise RowError(Reason.CUT_BEHAVIOR)
    return TokenizedPair(
        prompt_ids,
        chosen_ids,
        rejected_ids,
        example.chosen_behavior_logps,
        example.rejected_behavior_logps,
        example.weight,
        example.margin,
        changes,
    )


def tokenize_example(
    example: SFTExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
    chat_template: ChatTemplate = "auto",
) -> TokenizedExample:
    """Encodes a demonstration; arguments and errors as in :func:`tokenize_pair`."""
    prompt_ids, (completion_ids,), changes = _tokenize(
        example.prompt,
        [example.completion],
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        chat_template=chat_template,
    )
    return TokenizedExample(prompt_ids, completion_ids, changes)


def tokenize_response(
    prompt: Prompt,
    response: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    finished: bool,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
    chat_template: ChatTemplate = "auto",
) -> TokenizedExample:
    """Encodes a response that was sampled, as :func:`tokenize_example` would; it may also be empty.

    Args:
        prompt: as the data has it.
        response: text, special tokens left out.
        tokenizer: with an EOS token.
        finished: false where the token limit cut the response, which then gets no EOS.
        max_length: as in :func:`tokenize_pair`, like all that follow.
        max_prompt_length: likewise.
        truncation_mode: likewise.
        chat_template: likewise.

    Raises:
        RowError: the prompt has no tokens or may not be cut, or the chat template refuses it.
        InputError: as in :func:`tokenize_pair`.
    """
    if not isinstance(prompt, str) and _templated(prompt, tokenizer, chat_template) is None:
        response = response.removeprefix(" ")  # a policy writes the transcript's space itself

    def encode(prompt: Prompt) -> tuple[list[int], list[list[int]]]:
        prompt_ids, (ids,) = _encode_parts(prompt, [response], tokenizer, chat_template)
        return prompt_ids, [ids if finished else ids[:-1]]

    prompt_ids, (ids,), changes = fit_length(
        prompt,
        encode,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        bos_token_id=tokenizer.bos_token_id,
        header=partial(_header, prompt, tokenizer, chat_template),
    )
    return TokenizedExample(prompt_ids, ids, changes)


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = "auto") -> str:
    """The text of a prompt as the model gets it, up to where the response begins; BOS is not in it, but for templates.

    Raises:
        RowError: the chat template refuses the conversation.
    """
    messages = _templated(prompt, tokenizer, chat_template)
    if messages is not None:
        return render_chat(messages, tokenizer, add_generation_prompt=True)
    return prompt if isinstance(prompt, str) else transcript(prompt)


def transcript(messages: Sequence[Message]) -> str:
    r"""A conversation as plain text, in the form of Anthropic's hh-rlhf; a system turn stands without a name.

    >>> transcript([{"role": "user", "content": "2 + 2?"}])
    '\n\nHuman: 2 + 2?\n\nAssistant:'
    """
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "tool": "\n\nTool: "}
    text = "".join(names.get(turn["role"], "\n\n" if i else "") + turn["content"] for i, turn in enumerate(messages))
    return text + _OPENING


def _tokenize(
    prompt: Prompt,
    responses: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode,
    chat_template: ChatTemplate,
) -> Fitted:
    """Encodes a prompt with its responses, and makes them fit."""
    if not all(response.strip() for response in responses):
        raise RowError(Reason.EMPTY_RESPONSE)

    def encode(prompt: Prompt) -> tuple[list[int], list[list[int]]]:
        prompt_ids, completions = _encode_parts(prompt, responses, tokenizer, chat_template)
        if any(len(ids) == 1 for ids in completions):  # the terminator alone
            raise RowError(Reason.EMPTY_RESPONSE)
        return prompt_ids, completions

    return fit_length(
        prompt,
        encode,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        bos_token_id=tokenizer.bos_token_id,
        header=partial(_header, prompt, tokenizer, chat_template),
    )


def _encode_parts(
    prompt: Prompt, responses: list[str], tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate
) -> tuple[list[int], list[list[int]]]:
    """Encodes a prompt, and each response up to the token that ends it."""
    messages = _templated(prompt, tokenizer, chat_template)
    if messages is not None:
        prompt_ids, completions = encode_chat(messages, responses, tokenizer)
    else:
        # A transcript's turns begin with a space; a string's own spaces are the user's.
        space = "" if isinstance(prompt, str) else " "
        prompt_ids = encode_prompt(render_prompt(prompt, tokenizer, "never"), tokenizer)
        completions = [with_eos(encode_inside(space + response, tokenizer), tokenizer) for response in responses]
    if not prompt_ids:
        raise RowError(Reason.EMPTY_PROMPT)
    return prompt_ids, completions


def _header(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> list[int]:
    """The ids with which a prompt opens the assistant's turn; a plain text has none."""
    messages = _templated(prompt, tokenizer, chat_template)
    if messages is None:
        return [] if isinstance(prompt, str) else encode_inside(_OPENING, tokenizer)
    opened = render_chat(messages, tokenizer, add_generation_prompt=True)
    before = render_chat(messages, tokenizer, add_generation_prompt=False)
    return encode_inside(opened[len(before) :], tokenizer) if opened.startswith(before) else []


def _templated(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, mode: ChatTemplate) -> list[Message] | None:
    """The messages to render with the chat template, or ``None`` where it is not to be used."""
    if mode == "always" and not tokenizer.chat_template:
        raise InputError(
            f"data.chat_template is 'always', but the tokenizer of {tokenizer.name_or_path!r} has no chat template"
        )
    if isinstance(prompt, str):
        return [Message(role="user", content=prompt)] if mode == "always" else None
    return None if mode == "never" or not tokenizer.chat_template else prompt
