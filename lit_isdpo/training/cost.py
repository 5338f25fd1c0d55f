"""What a program would take, told without computing or allocating anything: memory, and floating-point operations."""

from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
ACTIVATIONS = "activations"


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_FLOPS = flop_registry | {  # PyTorch's counts do not know the CPU's attention
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class CostRecorder(TorchDispatchMode):
    """Follows the bytes of all storages that are made and freed inside the context, by kind, and counts FLOPs.

    PyTorch's own ``FlopCounterMode`` beside it would keep alive what gradient checkpointing frees.

    It is entered inside a ``FakeTensorMode``, whose tensors have storages without memory. What a kernel allocates for
    itself is not seen. Where a program asks for values, of which there are none, it is told what makes it go on: a
    number is 1, a truth is false.

    Args:
        num_true: for the boolean tensors that others are indexed with: how many of their elements are true.

    Attributes:
        peak: bytes by kind at the moment of the largest sum since ``reset_peak``.
        flops: of all matrix products and attention so far.
    """

    def __init__(self, num_true: Iterable[tuple[Tensor, int]] = ()) -> None:
        super().__init__()
        self._num_true = list(num_true)
        self._kinds: dict[int, str] = {}
        self._live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0

    def reset_peak(self) -> None:
        """Forgets what was before."""
        self.peak = Counter(self._live)

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are; by default they are ``activations``."""
        for tensor in tensors:
            self._see(tensor)
            storage = tensor.untyped_storage()
            self._live[self._kinds[storage._cdata]] -= storage.nbytes()
            self._live[kind] += storage.nbytes()
            self._kinds[storage._cdata] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for more often than all else
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            tensor, (mask,) = args[:2]
            result = tensor.new_empty((self._count(mask), *tensor.shape[mask.ndim :]))
        else:
            result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _count(self, mask: Tensor) -> int:
        return next((number for known, number in self._num_true if known is mask), mask.numel())

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        self._kinds[key] = ACTIVATIONS
        self._live[ACTIVATIONS] += storage.nbytes()
        finalize(storage, self._free, key, storage.nbytes())
        if self._live.total() > self.peak.total():
            self.peak = Counter(self._live)

    def _free(self, key: int, num_bytes: int) -> None:
        self._live[self._kinds.pop(key)] -= num_bytes
