"""A Hugging Face causal language model in, with the settings that preference training needs."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from shutil import which
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from lit_isdpo.names import named_path
from lit_isdpo.policy.adapters import CONFIG_NAME, parse_adapter
from lit_isdpo.policy.attention import SDPA, kernel_of, set_kernel
from lit_isdpo.types import NEEDS_CODE, InputError, check_least

BAD_CONFIG = (OSError, ValueError, StrictDataclassError)  # what transformers raises
LOADING_ERRORS = (*BAD_CONFIG, ImportError, RuntimeError, SafetensorError, UnpicklingError)
NOISE = ("dropout", "pdrop", "layerdrop", "drop_path", "jitter")  # in the names of rates
ORIGINAL_LENGTH = "original_max_position_embeddings"  # where LongRoPE changes its frequencies, in tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which model is trained, and in which numerics.

    Args:
        path: folder or hub id of a Hugging Face causal language model, or ``lab:posts`` for the embedded one.
        revision: branch, tag or commit of a hub id.
        init: ``pretrained`` loads the weights; ``random`` draws them anew from the architecture in ``path``.
        dtype: of the weights in memory. ``float32`` weights are what small learning rates need: at 1e-6 a step
            vanishes in bfloat16's 8 bits.
        compute_dtype: of the matrix products in the decoder (autocast). The head, the log-probs and the loss are fp32
            always. There is no float16: its range is too small for log-ratios.
        attn_implementation: transformers' name of the attention kernel: ``sdpa`` anywhere; ``flex_attention`` on a GPU,
            where it skips what no token of a row with several responses sees.
        gradient_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
        compile: compile the decoder layers at the start of a fit, each in place and for any length (torch.compile).
            It takes half a minute and a C++ compiler on a CPU.
        chunk_size: completion tokens whose logits exist at a time.
        trust_remote_code: run Python code that comes with the model.
        rope_length: only of use to models with LongRoPE (Phi-3 and Phi-4), which have rotary frequencies for short
            inputs and others for long ones. All inputs get those for this many tokens. Default: ``data.max_length``.
        peft: trains an adapter in place of the model's own weights, which may then be bfloat16: the options of PEFT's
            configuration, ``{peft_type: LORA, r: 16, lora_alpha: 32, target_modules: all-linear}`` say.
    """

    path: str = "lab:posts"
    revision: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    chunk_size: int = 2048
    trust_remote_code: bool = False
    rope_length: int | None = None
    peft: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_least("model.policy.chunk_size", self.chunk_size, 1)
        check_least("model.policy.rope_length", self.rope_length, 1)
        if self.peft is not None:
            parse_adapter(self.peft)
            if self.init == "random":
                raise InputError("model.policy.peft: an adapter needs a trained model, so init cannot be random.")


def model_path(source: PolicyConfig) -> str:
    """The folder or hub id that is read: that of a registered name, such as ``lab:posts``, is made if it is missing."""
    return named_path(source.path, "reference")


def as_one_function(config: PretrainedConfig, source: PolicyConfig) -> PretrainedConfig:
    """Has a model compute the same from the same tokens, whenever it is asked and whatever the batch, in place.

    With noise, policy and reference would differ at the first step already. So every rate of dropout or noise is set to
    0, in nested configurations too, and LongRoPE to one set of frequencies.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            as_one_function(value, source)
        elif isinstance(value, float) and any(word in name for word in NOISE):
            setattr(config, name, 0.0)
    if getattr(config, "rescale_every", 0):  # RWKV divides weights by 2 in place, whenever it leaves training
        config.rescale_every = 0
    if source.rope_length is not None:
        pin_rope(config, source.rope_length)
    return config


def read_config(source: PolicyConfig, *, option: str) -> PretrainedConfig:
    """Reads the configuration alone, as it is.

    Raises:
        InputError: no such model, an adapter in its place, or a folder whose weights are said to lie outside of it.
    """
    path = model_path(source)
    if (Path(path) / CONFIG_NAME).is_file():
        raise InputError(
            f"{option}: {source.path!r} holds a PEFT adapter and not a whole model; merge it first, by `lit-isdpo "
            "export` without --as_adapter or by PEFT's merge_and_unload, and name the folder of the merged model."
        )
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        for file in _files_of(Path(path) / name):
            if Path(file).name != file:
                raise InputError(f"{option}: {name} in {source.path!r} names a file outside of that folder: {file!r}.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except BAD_CONFIG as error:
        raise InputError(why_not_loaded(source, option, error)) from error
    return config


def load_config(source: PolicyConfig, *, option: str = "model.policy.path") -> PretrainedConfig:
    """Reads the architecture of a causal language model, and makes it one function.

    Raises:
        InputError: no such model, or not a causal language model.
    """
    config = read_config(source, option=option)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not source.trust_remote_code:
        raise InputError(
            f"{option}: {source.path!r} is a {config.model_type!r} model, which is not a causal language "
            "model; name one that AutoModelForCausalLM can load."
        )
    return as_one_function(config, source)


def load_causal_lm(policy: PolicyConfig, *, option: str = "model.policy.path") -> PreTrainedModel:
    """Loads a language model on the CPU, or lays it out, inside ``torch.device("meta")``.

    Raises:
        InputError: no such model, weights that do not fit the architecture, or an attention kernel that is not there.
    """
    config = load_config(policy, option=option)
    model = load_model(AutoModelForCausalLM, policy, config, kind="causal language model", option=option)
    # transformers does not tie head and embeddings if the file has both with different values, whatever the
    # configuration says; whoever builds the model from its configuration, as ``export`` does, would.
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(embeddings, "weight", None):
        model.config.tie_word_embeddings = False
    return model


def load_model(
    auto: Any, source: PolicyConfig, config: PretrainedConfig, *, kind: str, option: str, dtype: str | None = None
) -> PreTrainedModel:
    """Makes a model of one of transformers' auto classes, in evaluation mode.

    Args:
        auto: the class, such as ``AutoModelForCausalLM``.
        source: names the weights, or says that they are random.
        config: the architecture.
        kind: of model, for messages.
        option: names the model, for messages.
        dtype: of the weights. Default: that of ``source``.

    Raises:
        InputError: weights that do not fit the architecture, or an attention kernel that is not there.
    """
    options = {"dtype": DTYPES[dtype or source.dtype], "trust_remote_code": source.trust_remote_code}
    make: Any = partial(auto.from_config, config, **options)
    if source.init == "pretrained":
        options |= {"config": config, "revision": source.revision, "output_loading_info": True}
        make = partial(auto.from_pretrained, model_path(source), **options)
    try:
        model = with_attention(make, source.attn_implementation, option)
    except LOADING_ERRORS as error:
        raise InputError(why_not_loaded(source, option, error)) from error
    if source.init == "pretrained":
        model, report = model
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"{option}: {source.path!r} has no weights for {missing[0]} ({len(missing)} of the model's tensors are "
                f"missing): it is not a {kind}."
            )
    assert isinstance(model, PreTrainedModel)
    model.eval()
    if source.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def with_attention(load: Callable[..., Any], kernel: str, option: str) -> Any:
    """Calls ``load`` with an attention kernel; models without sdpa get their own attention instead.

    Args:
        load: takes transformers' ``attn_implementation``.
        kernel: its value.
        option: names the model, for messages.

    Raises:
        InputError: the model has no such kernel, or it is not installed.
    """
    try:
        return load(attn_implementation=kernel)
    except (ValueError, ImportError) as error:
        if not any(word in str(error).lower() for word in ("attention", "attn_implementation")):
            raise
        if kernel != "sdpa" or "scaled_dot_product_attention" not in str(error):
            reason = str(error).partition(". ")[0].rstrip(".")
            raise InputError(f"{option}: attn_implementation {kernel!r}: {reason}.") from error
    return load(attn_implementation="eager")


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Keeps each layer's input alone, in training mode."""
    # Newer releases of transformers 5 deprecate the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """What a model is a stack of, as far as transformers names it so."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer in place: names, parameters and checkpoints stay as they are.

    Raises:
        InputError: there is no compiler, or there are no layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise InputError(f"compile: {type(model).__name__} has no decoder layers that transformers names as such.")
    if model.device.type == "cpu" and not any(map(which, (os.environ.get("CXX", "g++"), "clang++", "c++"))):
        raise InputError("compile: on a CPU it needs a C++ compiler, and there is none in the PATH; leave it out.")
    for layer in layers:
        layer.compile(dynamic=True)  # rows differ in length from batch to batch
    if kernel_of(model.config) == SDPA:
        set_kernel(model.config, SDPA)  # not in parts: masks of several shapes would be compiled anew, or fail


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """A model in training or evaluation mode; each of its modules then has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def switch_length(config: PretrainedConfig) -> int | None:
    """The longest input, in tokens, that gets LongRoPE's short frequencies; ``None`` if a model has only one set.

    LongRoPE (arXiv 2402.13753) has two sets of frequencies. transformers takes the short ones for a batch whose longest
    row has up to ``original_max_position_embeddings`` tokens, and else the long ones for all rows. So the log-probs of
    a row would depend on the rows beside it, and those of a token on the text that follows. Here the longest sequence
    of the run decides, as the longest sequence of an engine does in vLLM.
    """
    return min((scaling[ORIGINAL_LENGTH] for scaling in _long_ropes(config)), default=None)


def pin_rope(config: PretrainedConfig, max_length: int) -> None:
    """Gives inputs of any length the frequencies for ``max_length`` tokens, in place.

    >>> from transformers import Phi3Config
    >>> rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
    >>> config = Phi3Config(rope_parameters=rope, original_max_position_embeddings=4096)
    >>> pin_rope(config, 8192)
    >>> config.rope_parameters["short_factor"][0]
    4.0
    """
    for scaling in _long_ropes(config):
        is_long = max_length > scaling[ORIGINAL_LENGTH]
        for what in ("factor", "mscale"):  # the second is Phi-MoE's
            if f"long_{what}" in scaling:
                chosen = scaling[f"{'long' if is_long else 'short'}_{what}"]
                scaling[f"long_{what}"] = scaling[f"short_{what}"] = chosen


def unpin_rope(config: PretrainedConfig, original: PretrainedConfig) -> None:
    """Undoes :func:`pin_rope`, in place. ``original`` is the configuration as it was read."""
    for pinned, scaling in zip(_long_ropes(config), _long_ropes(original), strict=True):
        pinned.update(scaling)


def _long_ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The options of each LongRoPE of a decoder; its kinds of layers may have one each."""
    options = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [part for part in (options, *options.values()) if isinstance(part, dict)]
    return [part for part in parts if part.get("rope_type") == "longrope" and ORIGINAL_LENGTH in part]


def why_not_loaded(source: PolicyConfig, option: str, error: Exception) -> str:
    """One sentence for what transformers raised."""
    path = Path(model_path(source))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1].strip() if isinstance(error, StrictDataclassError) else lines[0]
    if "trust_remote_code" in str(error):
        reason = NEEDS_CODE
    if "no file named" in str(error):
        reason = "it has a configuration and no weights."
    if isinstance(error, UnpicklingError):
        reason = "its weights are a pickle that holds more than tensors, which could run code; save it as safetensors."
    if path.is_dir():
        return f"{option}: the folder {source.path!r} holds no loadable Hugging Face model: {reason}"
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1:
        return f"{option}: no such folder: {source.path!r}."
    return (
        f"{option}: {source.path!r} is no folder here and could not be loaded from the Hugging Face hub (is the name "
        f"right, are you online, do you have access?): {reason}"
    )


def _files_of(index: Path) -> set[str]:
    """The files that weights lie in, as far as an index says so."""
    # Of what is no index transformers says what is wrong.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return set(map(str, json.loads(index.read_text())["weight_map"].values()))
    return set()
