"""Reward models: a language model's decoder with one number on top, read at a response's last token.

They are Hugging Face's sequence-classification models with one label, and their own forward is what is called, so that
a folder scores the same here and elsewhere. That forward finds the last token by ``config.pad_token_id``: it takes the
last one that is another, whatever the mask says. Rows are therefore padded with exactly that id, and an id that ends
responses makes a poor one: the score is then read before it.
"""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_isdpo.policy.attention import autocast
from lit_isdpo.policy.loading import PolicyConfig, as_one_function, load_causal_lm, load_model, read_config
from lit_isdpo.types import InputError, TokenBatch

HEAD = "score"  # what transformers calls the head of every decoder


class ScoreModel(nn.Module):
    """Wraps a sequence-classification model with one label; ``forward`` goes from token ids to scores.

    Args:
        model: its configuration has a padding id.
        compute_dtype: autocast dtype of the decoder.
    """

    adapter = None  # reward models are trained whole

    def __init__(self, model: PreTrainedModel, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert pad_token_id(model.config) is not None
        self.model = model
        self.compute_dtype = compute_dtype
        # Decoders keep a cache that nobody reads; encoders do not know the word.
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        if isinstance(head := getattr(model, HEAD, None), nn.Linear):
            head.register_forward_hook(_in_fp32)

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Scores ``(R,)`` in fp32, one a row of the plain layout."""
        mask = tokens.attention_mask
        input_ids = tokens.input_ids.masked_fill(~mask, pad_token_id(self.model.config))
        with autocast(input_ids.device, self.compute_dtype):
            logits: Tensor = self.model(input_ids=input_ids, attention_mask=mask, **self._options).logits
        return logits.float().squeeze(dim=1)


def pad_token_id(config: PretrainedConfig) -> Any:
    """The id by which a sequence-classification model tells padding, or ``None``."""
    return config.get_text_config().pad_token_id


def load_score_model(source: PolicyConfig, *, option: str = "model.policy.path") -> PreTrainedModel:
    """Loads what ``source`` names, on the CPU, without dropout; a language model gets a new head.

    The head's weights are drawn from N(0, 1 / (hidden size + 1)) (arXiv 2009.01325, appendix B.1).

    Raises:
        InputError: no such model, or one that no reward model can be made of.
    """
    if is_score_model(read_config(source, option=option)):
        return load_sequence_classifier(source, option=option)
    language_model = load_causal_lm(source, option=option)
    config = language_model.config
    config.num_labels = 1
    try:
        with torch.device("meta"):  # its weights are replaced, all of them
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(
            f"{option}: transformers has no sequence-classification model of type {config.model_type!r}."
        ) from error
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise InputError(f"{option}: {type(model).__name__} has no linear head named {HEAD!r}, which is not supported.")
    hidden_size = config.get_text_config().hidden_size
    setattr(model, model.base_model_prefix, language_model.base_model)
    head = nn.Linear(hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    setattr(model, HEAD, head)
    if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise InputError(f"{option}: {type(model).__name__} has more than a decoder and a head ({left[0]}).")
    model.eval()
    return model


def outline_score_model(source: PolicyConfig) -> PreTrainedModel:
    """What ``load_score_model`` makes, without its weights: every tensor is on the meta device."""
    option = "model.policy.path"
    config = as_one_function(read_config(source, option=option), source)
    config.num_labels = 1
    source = replace(source, init="random", attn_implementation="sdpa")
    with torch.device("meta"):
        return load_model(
            AutoModelForSequenceClassification, source, config, kind="reward model", option=option, dtype="float32"
        )


def is_score_model(config: PretrainedConfig) -> bool:
    """Whether a folder says that it holds a sequence-classification model."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def read_score_config(source: PolicyConfig, *, option: str) -> PretrainedConfig:
    """Reads the configuration of a model that scores.

    Raises:
        InputError: no such model, a language model without a head for scores, or one with several labels.
    """
    config = read_config(source, option=option)
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in (config.architectures or []):
        raise InputError(
            f"{option}: {source.path!r} is a causal language model without a head for scores; train a reward model "
            "from it with configs/reward.yaml, or name one."
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not source.trust_remote_code:
        raise InputError(
            f"{option}: {source.path!r} is a {config.model_type!r} model, which AutoModelForSequenceClassification "
            "cannot load."
        )
    if config.num_labels != 1:
        raise InputError(f"{option}: {source.path!r} gives {config.num_labels} numbers; a reward model gives one.")
    return config


def load_sequence_classifier(source: PolicyConfig, *, option: str) -> PreTrainedModel:
    """Loads a model that scores, on the CPU, with its head, without dropout.

    Raises:
        InputError: as ``read_score_config``, and if weights are missing or do not fit.
    """
    config = as_one_function(read_score_config(source, option=option), source)
    return load_model(AutoModelForSequenceClassification, source, config, kind="reward model", option=option)


def choose_pad_token_id(candidates: Sequence[int | None], terminators: Collection[int]) -> int | None:
    """The first candidate that ends no response, or ``None``.

    >>> choose_pad_token_id([None, 2, 0], terminators={2})
    0
    """
    return next((token for token in candidates if token is not None and token not in terminators), None)


def _in_fp32(head: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The head's output once more in fp32: bfloat16's 8 bits would blur the difference of two rewards."""
    with torch.autocast(output.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return linear(arguments[0].float(), head.weight.float(), bias)
