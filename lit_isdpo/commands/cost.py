"""What a program would take, told without computing or allocating anything: memory, FLOPs, traffic between ranks."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Self
from weakref import finalize

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lit_isdpo.policy.sharding import own_part

aten, c10d = torch.ops.aten, torch.ops.c10d
ACTIVATIONS, GATHERED = "activations", "gathered weights"


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores, and values by scores; every query head is computed, however few key heads they share."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores once more, their gradient, and those of queries, keys and values."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


_FLOPS = flop_registry | {  # PyTorch's counts do not know the CPU's attention
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# Bytes that a rank sends to the others of its group, in units of the larger of the tensors; for groups that are large.
_TRAFFIC = {
    c10d._allgather_base_.default: 1,
    c10d._reduce_scatter_base_.default: 1,
    c10d.allreduce_.default: 2,
}


class CostRecorder(TorchDispatchMode):
    """Follows the bytes of all storages that are made and freed inside the context, by kind, and counts FLOPs.

    PyTorch's own ``FlopCounterMode`` beside it would keep alive what gradient checkpointing frees.

    It is entered inside a ``FakeTensorMode``, whose tensors have storages without memory. What a kernel allocates for
    itself is not seen. Where a program asks for values, of which there are none, it is told what makes it go on: a
    number is 1, a truth is false, and where a mask picks elements, it picks all.

    Attributes:
        peak: bytes by kind at the moment of the largest sum since ``reset_peak``.
        flops: of all matrix products and attention so far.
        traffic: bytes that this rank has sent to others so far, in collectives of model and gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self.traffic = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        """Watches storages that FSDP empties and fills again, too, which are no operations."""
        recorder, resize = self, self._resize

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            recorder._has_size(storage)

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves them alone."""
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def reset_peak(self) -> None:
        """Forgets what was before."""
        self.peak = Counter(self._live)

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are; by default they are ``activations``."""
        for tensor in tensors:
            storage = own_part(tensor).untyped_storage()
            self._see(storage)
            self._is(storage._cdata, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to this rank's part comes here after that
        if func is torch.ops.prim.device.default:  # asked for more often than all else
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            tensor, (mask,) = args[:2]
            result = tensor.new_empty((mask.numel(), *tensor.shape[mask.ndim :]))
        else:
            result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        if func in _TRAFFIC:
            largest = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.traffic += _TRAFFIC[func] * largest
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._kinds:
            return
        self._kinds[key], self._sizes[key] = ACTIVATIONS, 0
        finalize(storage, self._free, key)
        self._has_size(storage)

    def _has_size(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._kinds:
            return
        if size == 0 < self._sizes[key]:  # it may be filled again: FSDP's
            self._is(key, GATHERED)
        self._live[self._kinds[key]] += size - self._sizes[key]
        self._sizes[key] = size
        if self._live.total() > self.peak.total():
            self.peak = Counter(self._live)

    def _is(self, key: int, kind: str) -> None:
        self._live[self._kinds[key]] -= self._sizes[key]
        self._live[kind] += self._sizes[key]
        self._kinds[key] = kind

    def _free(self, key: int) -> None:
        self._live[self._kinds.pop(key)] -= self._sizes.pop(key)
