"""The rewards that come with the package: the gold rewards of the lab, and reward models."""

import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.data.encoding import load_tokenizer, terminator_ids
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.tokenization import ChatTemplate, Limits, TextEncoder, TruncationMode, tokenize_response
from lit_isdpo.evaluation.store import weights_fingerprint
from lit_isdpo.lab.folder import ENVIRONMENTS, PREFIX, environment_of
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reward_model import (
    ScoreModel,
    choose_pad_token_id,
    load_sequence_classifier,
    pad_token_id,
    read_score_config,
)
from lit_isdpo.policy.vocabulary import check_rows, first_without_row
from lit_isdpo.types import InputError, Prompt, Reward, TokenizedExample, check_least


class LabReward(Reward):
    """The gold reward of a task of the lab.

    Args:
        task: ``lab:posts``, ``lab:verbosity`` or ``lab:length``.

    Raises:
        InputError: the lab has no such task; when called: a prompt is not one of the task's.
    """

    def __init__(self, task: str) -> None:
        name = task.removeprefix(PREFIX)
        if name not in ENVIRONMENTS:
            known = ", ".join(f"{PREFIX}{name}" for name in ENVIRONMENTS)
            raise InputError(f"reward.task: the lab has no task {task!r}; it has {known}.")
        self._environment = ENVIRONMENTS[name]

    @classmethod
    def for_folder(cls, folder: Path) -> "LabReward | None":
        """The gold reward that belongs to a data folder, or ``None`` if it is not one of the lab's."""
        name = environment_of(folder)
        return None if name is None else cls(name)

    @property
    def identity(self) -> str:
        """The task and the format of its files, which changes with the reward."""
        return self._environment.identity

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        """Scores responses to the task's own prompts, which are text."""
        return self._environment(prompts, responses, finished)


class RewardModel(Reward):
    """A Hugging Face sequence-classification model with one label, given what its own tokenizer makes of the text.

    Prompt and response are encoded as in training: a conversation by the tokenizer's chat template, or as a plain
    transcript where it has none, the response up to the token that ends it, and without that one where it was cut.

    Args:
        path: folder or hub id; ``lit-isdpo export`` makes such a folder of a run of ``RewardModule``.
        revision: branch, tag or commit of a hub id.
        batch_size: responses of a forward.
        max_length: of a prompt and its response together, in tokens; longer responses are cut. Default: 1024, or the
            model's positions where they are fewer.
        max_prompt_length: of a prompt, in tokens. Default: half of ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept.
        chat_template: auto uses the tokenizer's chat template for conversations where there is one, always for string
            prompts too, never writes plain transcripts.
        dtype: of the weights and of the decoder's matrix products; the head's is fp32.
        device: ``cuda`` or ``cpu``. Default: the GPU where there is one.
        attn_implementation: transformers' name of the attention kernel.
        trust_remote_code: run Python code that comes with the model.
        rope_length: of a model with LongRoPE, the input length in tokens whose rotary frequencies all inputs get; the
            ``data.max_length`` that the reward model was trained with. Default: ``max_length``.

    Raises:
        InputError: no such model, a language model without a head for scores, several labels, no padding id, a
            tokenizer with more tokens than the model has rows, or an argument out of range.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        truncation_mode: TruncationMode = "keep_end",
        chat_template: ChatTemplate = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: Literal["cuda", "cpu"] | None = None,
        attn_implementation: str = "sdpa",
        trust_remote_code: bool = False,
        rope_length: int | None = None,
    ) -> None:
        self.path, self.dtype = path, dtype
        source = PolicyConfig(
            path=path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        config = read_score_config(source, option="reward.path")
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if max_length is None:
            max_length = min(1024, positions or 1024)
        if max_prompt_length is None:
            max_prompt_length = max_length // 2
        if rope_length is None:
            rope_length = max_length
        check_least("reward.batch_size", batch_size, 1)
        check_least("reward.max_length", max_length, 2)
        check_least("reward.rope_length", rope_length, 1)
        if not 1 <= max_prompt_length < max_length:
            raise InputError(
                f"reward.max_prompt_length must be at least 1 and less than reward.max_length, which is {max_length}, "
                f"not {max_prompt_length}."
            )
        self.batch_size = batch_size
        self.limits = Limits(max_length, max_prompt_length, truncation_mode)
        self.chat_template = chat_template
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("reward.device: there is no GPU here; use cpu.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
        check_rows(source, config, self.tokenizer, option="reward.path")
        self.source = replace(source, rope_length=rope_length)
        self.encoder = TextEncoder(
            self.tokenizer, chat_template, first_without_row=first_without_row(config, self.tokenizer)
        )
        if chat_template == "always" and not self.tokenizer.chat_template:
            raise InputError(f"reward.chat_template is 'always', but the tokenizer of {path!r} has no chat template.")
        if positions is not None and max_length > positions:
            raise InputError(f"reward.max_length: {max_length} tokens are more than the model's {positions}.")
        pad = pad_token_id(config)
        if pad is None:  # the model reads the last token, so that only a token that ends nothing will do
            pad = choose_pad_token_id([self.tokenizer.pad_token_id], terminator_ids(self.tokenizer))
        if pad is None:
            raise InputError(
                f"reward.path: {self.path!r} has no padding id, so the token that it would read a score at is not "
                "known in a batch; set pad_token_id in its config.json."
            )
        self.pad_token_id = pad

    @cached_property
    def model(self) -> ScoreModel:
        """The weights, loaded when they are first needed."""
        model = load_sequence_classifier(self.source, option="reward.path")
        model.config.get_text_config().pad_token_id = self.pad_token_id
        return ScoreModel(model).requires_grad_(False).to(self.device)

    @cached_property
    def identity(self) -> str:
        """Path, and a fingerprint of the weights and of all that decides what they read."""
        reads = [*astuple(self.limits), self.chat_template, self.pad_token_id, self.tokenizer.chat_template, self.dtype]
        content = f"{weights_fingerprint(self.model)} {json.dumps(reads)}"
        return f"{self.path} {blake2b(content.encode(), digest_size=8).hexdigest()}"

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        """Scores responses, those of like length together, so that little of a batch is padding."""
        rows = [self._encode(*row) for row in zip(prompts, responses, finished, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].prompt_ids) + len(rows[row].completion_ids))
        scores = torch.empty(len(rows))
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            tokens = collate_completions(
                [rows[row].prompt_ids for row in some],
                [rows[row].completion_ids for row in some],
                pad_token_id=self.pad_token_id,
            )
            with torch.no_grad():
                scores[some] = self.model(tokens.to(self.device)).cpu()
        if not scores.isfinite().all():
            raise InputError(f"reward.path: {self.path!r} gives scores that are NaN or infinite; try dtype float32.")
        return [float(score) for score in scores]

    def _encode(self, prompt: Prompt, response: str, finished: bool) -> TokenizedExample:
        try:
            return tokenize_response(prompt, response, self.encoder, self.limits, finished=finished)
        except RowError as error:
            raise InputError(f"reward.path: {self.path!r} cannot score a response: {error.reason.value}.") from error
