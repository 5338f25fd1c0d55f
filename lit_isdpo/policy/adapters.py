"""Adapters by PEFT: a few trained tensors inside a frozen model, and the switch that turns them off.

PEFT has dozens of methods and several times as many options. Some of them break what preference training stands on:
that the policy starts at the reference, that switching the adapter off gives the reference back, that a forward is a
function of its input, and that a checkpoint holds all there is to the adapter. So these four are tried out on each
adapter when it is made, and only what such a trial cannot show is refused by name.

PEFT's own wrapper puts the layers in, and not transformers' ``add_adapter``: that one cannot merge, knows no method
whose layers share tensors, and does not switch ``modules_to_save`` on again. The wrapper itself is kept out of the way:
the model stays the Hugging Face model that it was.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_isdpo.types import InputError, first_line

if TYPE_CHECKING:  # an extra, imported where an adapter is asked for
    from peft import PeftConfig, PeftModel

OPTION = "model.policy.peft"
CONFIG_NAME = "adapter_config.json"  # PEFT's name for it

UNSUPPORTED_TYPES = {
    "ADALORA": "its ranks follow a schedule that the training loop would have to drive",
    "POLY": "it needs a task's number with every row",
    "XLORA": "it mixes adapters that are trained already",
    "SHADOW": "it changes what the layers hand on",
    "ADAPTION_PROMPT": "it changes the attention's input",
}
UNSUPPORTED_OPTIONS = {
    "base_model_name_or_path": "the model is named by model.policy.path",
    "revision": "the revision is named by model.policy.revision",
    "inference_mode": "nothing would be trained",
    "alora_invocation_tokens": "where it begins is found by PEFT's own forward, which is not called",
    "megatron_config": "it is for models of Megatron, whose module it imports by name",
    "use_qalora": "it is for quantised models",
    "runtime_config": "it is for offloaded models",
    **dict.fromkeys(
        ("arrow_config", "corda_config", "eva_config", "loftq_config", "lora_ga_config"),
        "it needs a preparation that is not made",
    ),
}
DATA_DRIVEN_INITS = ("eva", "lora_ga", "corda", "loftq")  # without PEFT's preparation some fall back to a random one
SAMPLES_PER_TENSOR = 64


def parse_adapter(options: Mapping[str, Any]) -> "PeftConfig":
    """Makes PEFT's configuration from a mapping such as ``{peft_type: LORA, r: 16, target_modules: all-linear}``.

    Raises:
        InputError: PEFT is not installed, has no such type or option, or the adapter cannot serve preference training.
    """
    try:
        from peft import PromptLearningConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise InputError(f'{OPTION}: PEFT is not installed; pip install "lit_isdpo[peft]".') from error
    classes = {peft_type.value: config_class for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = {key: value for key, value in options.items() if key != "peft_type"}
    name = str(options.get("peft_type", "")).upper()
    if name not in classes:
        raise InputError(
            f"{OPTION}: peft_type must be one that PEFT knows, LORA say, not {options.get('peft_type')!r}."
        )
    if name in UNSUPPORTED_TYPES:
        raise InputError(f"{OPTION}: {name} is not supported: {UNSUPPORTED_TYPES[name]}.")
    if issubclass(classes[name], PromptLearningConfig):
        raise InputError(f"{OPTION}: {name} learns a prompt, which would shift the tokens; adapt layers, as LORA does.")
    if unknown := sorted(given.keys() - {field.name for field in fields(classes[name])}):
        raise InputError(f"{OPTION}: {name} has no option {unknown[0]!r} (peft.{classes[name].__name__} lists them).")
    for key in sorted(given.keys() & UNSUPPORTED_OPTIONS.keys()):
        if given[key]:
            raise InputError(f"{OPTION}: {key} is not supported: {UNSUPPORTED_OPTIONS[key]}.")
    if (init := given.get("init_lora_weights")) in DATA_DRIVEN_INITS:
        raise InputError(f"{OPTION}: init_lora_weights {init!r} needs a preparation that is not made; use true.")
    if given.setdefault("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise InputError(f"{OPTION}: task_type must be CAUSAL_LM, not {given['task_type']!r}.")
    try:
        config = classes[name](**given)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"{OPTION}: {name}: {first_line(error)}") from error
    dropouts = [key for key, value in config.to_dict().items() if "dropout" in key and value]
    if dropouts:
        raise InputError(f"{OPTION}: {dropouts[0]} must be 0, or policy and reference would differ by its noise.")
    if getattr(config, "bias", "none") != "none":
        raise InputError(f"{OPTION}: bias must be 'none': biases that are trained are not switched off.")
    return config


class Adapter:
    """The adapter inside one model. It is no ``nn.Module``: its tensors are the model's own.

    Args:
        model: a model without adapters, on the CPU; its layers are replaced in place and its own tensors frozen.
            On the meta device there is nothing to try out, and no fingerprint.
        config: as ``parse_adapter`` makes it.
        revision: of the model, for the adapter's file.

    Attributes:
        names: the model's state entries that are the adapter's: trained tensors, and what these are multiplied with.
        base_fingerprint: tells one base from another; of a few values a tensor.

    Raises:
        InputError: PEFT cannot put the adapter into this model, or the adapter cannot serve preference training.
    """

    def __init__(self, model: PreTrainedModel, config: "PeftConfig", *, revision: str | None = None) -> None:
        from peft import get_peft_model

        before = None if model.device.type == "meta" else _logits(model)
        base = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        self.base_fingerprint = "" if before is None else fingerprint(model)
        config.revision = revision
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's to mend
                self._peft_model: PeftModel = get_peft_model(model, config)
            self.model = model
            base_path = Path(str(self.config.base_model_name_or_path))
            if base_path.is_dir():  # an adapter's file is read from other folders than the run's
                self.config.base_model_name_or_path = str(base_path.resolve())
            if (model.get_input_embeddings(), model.get_output_embeddings()) != ends:
                raise InputError(
                    f"{OPTION}: adapters on the embeddings or the head are not supported; leave "
                    "them out of target_modules, modules_to_save and the like ('all-linear' does)."
                )
            state = model.state_dict(keep_vars=True)
            self.names = frozenset(name for name, tensor in state.items() if id(tensor) not in base)
            if before is not None:
                self._check(before)
        except InputError:
            raise
        except Exception as error:  # PEFT raises whatever its parts raise
            raise InputError(f"{OPTION}: {_type(config)}: {first_line(error)}") from error

    @property
    def config(self) -> "PeftConfig":
        """PEFT's configuration, with the modules that were found."""
        return self._peft_model.peft_config["default"]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model is its base in here, and has its adapter again afterwards, whatever happens."""
        # PeftModel.disable_adapter would take stock of every module first.
        tuner: Any = self._peft_model.base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()

    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors, under the model's names."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in self.names}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over all of the adapter's tensors.

        Raises:
            ValueError: a tensor is missing, is too many, or has another shape.
        """
        check_same_tensors(self.state(), state)
        self.model.load_state_dict(state, strict=False)

    def merge(self) -> PreTrainedModel:
        """Adds the adapter to the base's weights and returns the plain model; there is no adapter any more.

        Raises:
            InputError: PEFT cannot merge adapters of this kind.
        """
        try:
            merged: PreTrainedModel = self._peft_model.merge_and_unload()
        except Exception as error:  # PEFT raises whatever its parts raise
            raise InputError(
                f"{_type(self.config)} adapters like this cannot be merged, so export it with --as_adapter true: "
                f"{first_line(error)}"
            ) from error
        return merged

    def unload(self) -> PreTrainedModel:
        """Takes the adapter out and returns the plain base; there is no adapter any more."""
        tuner: Any = self._peft_model.base_model
        base: PreTrainedModel = tuner.unload()
        return base

    def save(self, folder: Path) -> None:
        """Writes PEFT's two files, which ``PeftModel.from_pretrained`` reads."""
        self._peft_model.save_pretrained(str(folder), save_embedding_layers=False)  # else it would ask the hub

    @torch.no_grad()
    def _check(self, before: Tensor) -> None:
        """Tries out what preference training stands on, with the adapter as it starts and with noise added to it.

        Raises:
            InputError: names what is wrong.
        """
        from peft import get_peft_model_state_dict

        kind = f"{OPTION}: this {_type(self.config)} adapter"
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trained:
            raise InputError(f"{kind} has nothing to train.")
        if any(parameter.dtype != torch.float32 for parameter in trained.values()):
            raise InputError(f"{kind} trains bfloat16 weights, in which small steps vanish; use dtype float32.")
        own = {tensor.data_ptr() for tensor in self.state().values()}
        if any(value.data_ptr() not in own for value in get_peft_model_state_dict(self._peft_model).values()):
            raise InputError(f"{kind} keeps a state that a checkpoint would lack.")
        # fp32 leaves the rounding of a product with the identity, bfloat16 that of a norm.
        tolerance = (1e-5 if self.model.dtype == torch.float32 else 1e-2) * float(before.abs().max())
        if not torch.allclose(_logits(self.model), before, atol=tolerance, rtol=0):
            raise InputError(
                f"{kind} changes the model before it is trained; choose an initialisation that does not "
                "(init_lora_weights: true, init_weights: true or the like)."
            )
        saved = {name: parameter.detach().clone() for name, parameter in trained.items()}
        generator = torch.Generator().manual_seed(0)
        for parameter in trained.values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
        self.model.train()
        if not torch.equal(_logits(self.model), _logits(self.model)):
            raise InputError(f"{kind} draws noise in its forward, so policy and reference could not be compared.")
        self.model.eval()
        with self.switched_off():
            if not torch.equal(_logits(self.model), before):
                raise InputError(
                    f"{kind} cannot be switched off: it rewrites the base's own weights or trains them, so the "
                    "reference would not be the model that was loaded."
                )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def check_same_tensors(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: names a tensor.
    """
    if missing := sorted(own.keys() - other.keys()):
        raise ValueError(f"{missing[0]} is missing")
    if unknown := sorted(other.keys() - own.keys()):
        raise ValueError(f"{unknown[0]} is unknown here")
    for name, tensor in own.items():
        if tensor.shape != other[name].shape:
            raise ValueError(f"{name} is {tuple(other[name].shape)} and not {tuple(tensor.shape)}")


def fingerprint(model: PreTrainedModel) -> str:
    """A quick check whether a base is another one, which checkpoints hold; results are named by every value.

    It is a hash of a few values of each tensor, in fp32, so that weights widened from bfloat16 are the same weights.
    """
    digest = blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        values = tensor.detach().flatten()
        some = values[:: max(1, values.numel() // SAMPLES_PER_TENSOR)].float().cpu()
        digest.update(f"{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    input_ids = torch.arange(4, device=model.device)[None]
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _type(config: "PeftConfig") -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
