"""A language model in parts (FSDP2): each rank holds its shard of every tensor, and gathers a layer to compute it.

Two ways lead the weights there. Where the safetensors of a folder name tensors as the model does, each rank reads its
own slices of them. Else (adapters, random weights, checkpoints that transformers converts) rank 0 loads the model as
one process would, with all that is tried out there, and the others are sent their shards tensor by tensor.

Weights are sharded in their own dtype. With a ``compute_dtype`` of bfloat16 the decoder layers are gathered in it,
which is what autocast makes of their matrices, at half the traffic (their norms' weights are rounded too, as they are
not under autocast), while embeddings, last norm and head are gathered as they are: log-probs need a head in fp32, and
so does the sum of an embedding's gradients. Gradients are reduced in fp32.
"""

import json
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lit_isdpo.policy.loading import PolicyConfig, decoder_layers, model_path
from lit_isdpo.policy.logprob_model import LogProbModel, check_model, load_logprob_model, outline_logprob_model
from lit_isdpo.types import InputError, Ranks, first_line


@dataclass(frozen=True)
class Sharding:
    """Among whom a model is divided.

    Args:
        mesh: one dimension: the ranks that share a model; two: copies of it, and the ranks that share each (HSDP).
        device: that this rank computes on.
        cpu_offload: whether shards, gradients and optimizer states stay in the memory of the host.
    """

    mesh: DeviceMesh
    device: torch.device
    cpu_offload: bool = False

    @classmethod
    def over(cls, size: int, shard_size: int | None, device: torch.device, *, cpu_offload: bool = False) -> "Sharding":
        """All of ``size`` ranks, of which ``shard_size`` share one copy of the weights; by default all do.

        Raises:
            InputError: the ranks cannot be divided so.
        """
        shard_size = shard_size or size
        if size % shard_size:
            raise InputError(f"trainer.strategy.shard_size: {shard_size} ranks do not divide {size}.")
        sizes = {"shard": size} if shard_size == size else {"replicate": size // shard_size, "shard": shard_size}
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return cls(mesh, device, cpu_offload)

    def load(self, config: PolicyConfig, *, option: str = "model.policy.path") -> LogProbModel:
        """This rank's part of the model that ``config`` names; every rank must call it.

        Args:
            config: the model and its numerics.
            option: that messages name.

        Raises:
            InputError: as ``load_logprob_model``, on all ranks.
        """
        model = outline_logprob_model(config, option=option)
        if config.init == "pretrained":
            with suppress(OSError):  # the model has none of its own
                path, revision = model_path(config), config.revision or "main"
                model.model.generation_config = GenerationConfig.from_pretrained(path, revision=revision)
        if not decoder_layers(model.model):
            raise InputError(
                f"{option}: {type(model.model).__name__} has no decoder layers that transformers names as such; use "
                "--trainer.strategy ddp."
            )
        buffers = _computed_buffers(model.model)
        folder = None if buffers is None else _folder_of_slices(config, model.model)
        folders = all_ranks().gather(folder)
        self.shard(model)
        if folder is not None and buffers is not None and None not in folders:
            self._allocate(model, buffers)
            all_ranks().on_all(lambda: _read_slices(model.model, folder, config, option))
        else:
            self._receive(model, config, option)
        model.model.tie_weights()
        for method in ("completion_states", "token_logits", "generate", "tried"):
            register_fsdp_forward_method(model, method)  # each begins with gathered weights, as the forward does
        model.tried(check_model)
        return model

    def shard(self, model: LogProbModel) -> None:
        """Divides a model on the meta device; what is not its own is never allocated."""
        is_narrower = model.compute_dtype.itemsize < model.model.dtype.itemsize
        gathered = model.compute_dtype if is_narrower else None
        # Inputs are not cast: between the layers there is fp32, as under autocast.
        numerics = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
        as_they_are = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        pin_memory = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pin_memory) if self.cpu_offload else OffloadPolicy()
        for layer in reversed(decoder_layers(model.model)):  # one inside another comes before it
            fully_shard(layer, mesh=self.mesh, mp_policy=numerics, offload_policy=offload)
        # By default the root would stay gathered after a forward, also after one that no backward follows; then its
        # parameters, for an optimizer say, would be the gathered ones.
        fully_shard(model, mesh=self.mesh, mp_policy=as_they_are, offload_policy=offload, reshard_after_forward=True)

    def _allocate(self, model: LogProbModel, buffers: dict[str, Tensor]) -> None:
        """Memory for the shards, and the buffers that no file has."""
        model.to_empty(device="cpu" if self.cpu_offload else self.device)
        model.model.tie_weights()
        for name, buffer in model.model.named_buffers(remove_duplicate=False):
            value = buffers.get(name, buffer).to(self.device)
            place, _, leaf = name.rpartition(".")
            setattr(model.model.get_submodule(place), leaf, value)
        model.computes_on = self.device

    def _receive(self, model: LogProbModel, config: PolicyConfig, option: str) -> None:
        """Rank 0 loads the whole model on its CPU, and sends it."""
        is_source = dist.get_rank() == 0
        loaded: LogProbModel | None = None

        def load() -> str | None:
            nonlocal loaded
            loaded = load_logprob_model(config, option=option) if is_source else None
            if loaded is not None and len([*loaded.model.parameters()]) != len([*model.model.parameters()]):
                raise InputError(
                    f"{option}: {config.path!r} has a head of its own, although its config.json ties the head to the "
                    "embeddings; set tie_word_embeddings to false there."
                )
            return None if loaded is None or loaded.adapter is None else loaded.adapter.base_fingerprint

        base_fingerprint = all_ranks().on_all(load)[0]
        if model.adapter is not None:
            model.adapter.base_fingerprint = base_fingerprint
        self._allocate(model, {})
        values = {} if loaded is None else dict(loaded.model.named_parameters()) | dict(loaded.model.named_buffers())
        with torch.no_grad():
            for name, tensor in [*model.model.named_parameters(), *model.model.named_buffers()]:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                if is_source:
                    value.copy_(values[name])
                if isinstance(tensor, DTensor):
                    tensor.to_local().copy_(distribute_tensor(value, self.mesh, tensor.placements).to_local())
                else:
                    dist.broadcast(value, 0)
                    tensor.copy_(value)


def all_ranks() -> Ranks:
    """The process group's."""
    size = dist.get_world_size()

    def gather(own: Any) -> list[Any]:
        parts = [own] * size
        dist.all_gather_object(parts, own)
        return parts

    return Ranks(dist.get_rank(), size, gather)


def read_tensors(tensors: dict[str, Any], reader: StorageReader) -> None:
    """Fills tensors by name, in place, or what of them is on this rank.

    Each rank plans its own reads, so that one which fails leaves nobody waiting.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load_tensors(tensors, storage_reader=reader, no_dist=True)


@torch.no_grad()
def _computed_buffers(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The buffers that no file has, RoPE's frequencies above all, as the model computes them.

    ``None`` where it does not: what was in the memory before is then still there.
    """
    stored = model.state_dict().keys()
    names = [name for name, _ in model.named_buffers(remove_duplicate=False) if name not in stored]
    outcomes = []
    for filling in (0, 1):
        for name in names:
            place, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(place), leaf, torch.full_like(model.get_buffer(name), filling, device="cpu"))
        for place in {name.rpartition(".")[0] for name in names}:
            model._init_weights(model.get_submodule(place))
        outcomes.append({name: model.get_buffer(name) for name in names})
    first, second = outcomes
    return first if all(torch.equal(value, second[name]) for name, value in first.items()) else None


def _folder_of_slices(config: PolicyConfig, model: PreTrainedModel) -> Path | None:
    """The folder whose safetensors hold every tensor of the model by its name, if there is one."""
    if config.init == "random" or config.peft is not None or getattr(model.config, "quantization_config", None):
        return None
    path = model_path(config)
    folder = Path(path)
    try:
        if not folder.is_dir():
            patterns = ["model*.safetensors*", "*.json"]
            folder = Path(snapshot_download(path, revision=config.revision, allow_patterns=patterns))
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = {SAFE_WEIGHTS_NAME}
        if not (folder / SAFE_WEIGHTS_NAME).is_file() and index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        if files != {file.name for file in folder.glob("*.safetensors")}:
            return None  # others lie beside the model's own, and all would be read
        stored: set[str] = set()
        for file in files:
            with safe_open(folder / file, framework="pt") as tensors:
                stored |= set(tensors.keys())
    except Exception:  # whatever it is, the other way meets it again, and says so
        return None
    times = Counter[int]()  # that a tensor is stored; tied ones have several names
    for name, tensor in model.state_dict(keep_vars=True).items():
        times[id(tensor)] += name in stored
    return folder if set(times.values()) == {1} else None  # one that is stored twice may not be tied: rank 0 looks


def _read_slices(model: PreTrainedModel, folder: Path, config: PolicyConfig, option: str) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    try:
        read_tensors({name: tensor for name, tensor in model.state_dict().items() if name in stored}, reader)
    except Exception as error:  # torch wraps whatever its parts raise
        raise InputError(f"{option}: the weights in {config.path!r} could not be read: {first_line(error)}") from error
