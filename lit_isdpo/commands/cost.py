"""What a program would take, told without computing or allocating anything: memory, FLOPs, traffic between ranks."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Self
from weakref import finalize

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_isdpo.policy.logprob_model import own_part

ACTIVATIONS, GATHERED = "activations", "gathered weights"
SENT = {"allgather": 1, "reduce_scatter": 1, "allreduce": 2}
"""Bytes that a rank of a large group sends to the others, in units of the larger tensor, by words in a collective."""


class CostRecorder(TorchDispatchMode):
    """Follows the bytes of all storages that are made and freed inside the context, by kind, and counts FLOPs.

    Tensors have no values in here: they are PyTorch's fake tensors, with storages without memory. What a kernel
    allocates for itself is not seen. Where a program asks for values, it gets some that make it go on: a number is 1, a
    truth is false, and where a mask picks elements, it picks all. PyTorch's own ``FlopCounterMode`` would keep alive
    what gradient checkpointing frees, and does not know the attention of the CPU.

    Attributes:
        peak: bytes by kind at the moment of the largest sum since ``reset_peak``.
        flops: of all matrix products and attention so far.
        traffic: bytes that this rank has sent to others so far, in collectives of model and gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self.traffic = 0
        self._resize = torch.UntypedStorage.resize_

    def without_values(self, batch: Any) -> Any:
        """A batch of the same shapes."""
        return apply_to_collection(batch, Tensor, self._fake.from_tensor)

    def __enter__(self) -> Self:
        """Also watches storages that FSDP empties and fills again: that is no operation, so it has to be patched."""
        recorder, resize = self, self._resize

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            recorder._has_size(storage)

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops watching."""
        super().__exit__(*error)
        self._fake.__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def reset_peak(self) -> None:
        """Forgets what was before."""
        self.peak = Counter(self._live)

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are; by default they are ``activations``."""
        for tensor in tensors:
            storage = own_part(tensor).untyped_storage()
            self._see(storage)
            self._is(id(storage), kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to this rank's part comes here after that
        if func is torch.ops.prim.device.default:  # asked for more often than all else
            return args[0].fake_device
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        except DynamicOutputShapeException:
            if func is not torch.ops.aten.index.Tensor:
                raise
            tensor, (mask,) = args[:2]
            result = tensor.new_empty((mask.numel(), *tensor.shape[mask.ndim :]))
        self._count(func, args, kwargs or {}, result)
        apply_to_collection(result, Tensor, lambda tensor: self._see(tensor.untyped_storage()))
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        elif "scaled_dot_product" in func.name():  # a kernel that PyTorch does not count
            query, key, value = args[1:4] if "backward" in func.name() else args[:3]
            # Forward: scores, and values by scores. Backward: scores again, their gradient, and those of the three.
            width = query.shape[-1] + value.shape[-1]
            width = 3 * query.shape[-1] + 2 * value.shape[-1] if "backward" in func.name() else width
            self.flops += 2 * query.shape[:-1].numel() * key.shape[-2] * width  # all query heads, however few keys'
        elif func.namespace == "c10d":
            sent = sum(times for word, times in SENT.items() if word in func.name())
            sizes: list[int] = []
            apply_to_collection(args, Tensor, lambda tensor: sizes.append(tensor.nbytes))
            self.traffic += sent * max(sizes, default=0)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._kinds:
            return
        self._kinds[key], self._sizes[key] = ACTIVATIONS, 0
        finalize(storage, self._free, key)
        self._has_size(storage)

    def _has_size(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
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
