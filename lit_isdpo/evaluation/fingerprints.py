"""Names for what was sampled from and how: equal content has an equal name, on every machine and in every run."""

import json
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lit_isdpo.policy.logprob_model import LogProbModel, whole
from lit_isdpo.policy.reward_model import ScoreModel

# Of a configuration file: where the model came from, and how it is loaded and initialised.
_NO_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_NO_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}


def digest(content: Any) -> str:
    """16 hexadecimal digits of anything that JSON can hold.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, default=_plain)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def weights_fingerprint(model: LogProbModel | ScoreModel, *, with_adapter: bool = True) -> str:
    """Names a model as it computes: every value of its weights, its architecture, and the dtype that it computes in.

    A base whose adapter is switched off has the name of the same model without an adapter.

    Args:
        model: the model.
        with_adapter: false names the base alone.
    """
    config = model.model.config.to_diff_dict()
    about: dict[str, Any] = {
        "config": {key: value for key, value in config.items() if key not in _NO_ARCHITECTURE},
        "compute_dtype": str(model.compute_dtype),
    }
    if model.adapter is not None and with_adapter:
        adapter = model.adapter.config.to_dict()
        about["adapter"] = {key: value for key, value in adapter.items() if key not in _NO_ADAPTER}
    value = blake2b(digest(about).encode(), digest_size=8)
    for name, tensor in sorted(_tensors(model, with_adapter=with_adapter)):
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        value.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return value.hexdigest()


def _tensors(model: LogProbModel | ScoreModel, *, with_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors; of a base alone, under the names that they have without PEFT's layers around them."""
    for name, tensor in model.model.state_dict().items():
        if model.adapter is None or with_adapter:
            yield name, tensor
        elif name not in model.adapter.names:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
