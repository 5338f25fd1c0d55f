"""What a fit will need, before anything is loaded: memory of a rank at its peak, and floating-point operations.

The module's own forward, backward and optimizer step run on PyTorch's fake tensors, which have shapes and no memory. So
whatever the config changes (an adapter, checkpointing, another optimizer) is in the numbers.
"""

from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self
from weakref import finalize

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.policy.loading import DTYPES
from lit_isdpo.policy.logprob_model import own_part
from lit_isdpo.policy.reference import CachedReference, ResidentReference
from lit_isdpo.policy.sharding import Sharding
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.strategy import FSDP2Strategy
from lit_isdpo.training.throughput import GIB, matmul_rate
from lit_isdpo.types import InputError, TokenizedExample, TokenizedPair

Lengths = Literal["data", "limits"]
PARAMETERS, REFERENCE, OPTIMIZER, GRADIENTS = "parameters", "reference", "optimizer state", "gradients"
BUCKETS, GATHERED, ACTIVATIONS = "gradient buckets of DDP", "gathered weights", "activations"
KINDS = (PARAMETERS, REFERENCE, OPTIMIZER, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS)  # of memory
OFFLOADED = KINDS[:4]
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
        self._look = masking_utils.find_packed_sequence_indices

    def without_values(self, batch: Any) -> Any:
        """A batch of the same shapes."""
        return apply_to_collection(batch, Tensor, self._fake.from_tensor)

    def __enter__(self) -> Self:
        """Patches two functions as well.

        FSDP empties storages and fills them again, which is no operation. Transformers looks in position ids for
        several sequences in a row, and would mask them; here a row without a mask holds one.
        """

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._has_size(storage)

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops watching."""
        super().__exit__(*error)
        self._fake.__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        masking_utils.find_packed_sequence_indices = self._look

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
            of_query, of_value = (3, 2) if "backward" in func.name() else (1, 1)
            width = of_query * query.shape[-1] + of_value * value.shape[-1]
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


@dataclass(frozen=True)
class Plan:
    """What one rank needs.

    Attributes:
        memory: bytes by kind at the peak of an optimizer step, from the second one on.
        traffic: bytes that the rank sends to others in an optimizer step, where the model is sharded; else 0.
        forward_flops: of a micro-batch, a live reference's included.
        backward_flops: of a micro-batch, recomputation included.
        micro_batches: of an optimizer step on this rank.
        rows: pairs or demonstrations of a micro-batch.
        positions: of its longest row of tokens, and how many such rows there are.
        offloaded: whether ``OFFLOADED`` kinds of memory are the host's.
    """

    memory: Counter[str]
    traffic: int
    forward_flops: int
    backward_flops: int
    micro_batches: int
    rows: int
    positions: tuple[int, int]
    offloaded: bool = False

    @property
    def flops_per_step(self) -> int:
        """Of an optimizer step on this rank; the optimizer's own are not counted."""
        return self.micro_batches * (self.forward_flops + self.backward_flops)


def make_plan(
    module: LanguageModule, datamodule: TextDataModule, trainer: Trainer, *, devices: int = 1, lengths: Lengths = "data"
) -> Plan:
    """Runs an optimizer step without values.

    Args:
        module: nothing of it is loaded yet.
        datamodule: nothing of it is read yet.
        trainer: both are attached to it, and gradients are clipped as it says.
        devices: ranks of data parallelism.
        lengths: ``data``: the micro-batch has the longest training rows; ``limits``: prompts of
            ``data.max_prompt_length`` tokens with responses up to ``data.max_length``, and no data is read.

    Raises:
        InputError: whatever is wrong with the model or the data.
    """
    trainer.strategy.connect(module)
    module.trainer = trainer
    module.hand_over(datamodule)
    rows, micro_batches = datamodule.split_batch(devices)
    sharded = trainer.strategy if isinstance(trainer.strategy, FSDP2Strategy) else None
    with _pretended_ranks(devices) if sharded else nullcontext():
        module.configure_outline()
        if sharded:
            sharding = Sharding.over(devices, sharded.shard_size, torch.device("cpu"))
            for model in _models(module):
                sharding.shard(model)
        recorder = CostRecorder()
        batch = recorder.without_values(_longest_batch(module, datamodule, rows, lengths))
        with recorder:
            forward, backward, traffic = _record_step(module, batch, recorder, micro_batches, trainer)
    memory = Counter({kind: size for kind, size in recorder.peak.items() if size})
    if devices > 1 and not sharded:
        memory[BUCKETS] = sum(p.nbytes for p in module.network.parameters() if p.requires_grad)  # there from the start
    num_rows, length = batch.tokens.input_ids.shape
    offloaded = sharded is not None and sharded.cpu_offload
    return Plan(memory, traffic, forward, backward, micro_batches, rows, (length, num_rows), offloaded)


@contextmanager
def _pretended_ranks(size: int) -> Generator[None]:
    """Makes this process rank 0 of ``size`` ranks, of which the others are not there."""
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _models(module: LanguageModule) -> list[Any]:
    """What is in memory: the trained model, and a reference that is another."""
    reference = module.reference
    return [module.network, *([reference.model] if isinstance(reference, ResidentReference) else [])]


def _record_step(
    module: LanguageModule, batch: Any, recorder: CostRecorder, micro_batches: int, trainer: Trainer
) -> tuple[int, int, int]:
    """An optimizer step whose optimizer has its state. FLOPs of a forward and of a backward, and traffic in bytes."""
    for kind, model in zip((PARAMETERS, REFERENCE), _models(module), strict=False):
        model.to_empty(device="cpu")
        model.model.tie_weights()
        recorder.mark(kind, [*model.parameters(), *model.buffers()])
    if isinstance(module.reference, CachedReference):
        module.reference.to(torch.device("cpu"))
    trained = [p for p in module.network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.mark(GRADIENTS, [p.grad]))
    # Of this rank's parts; DTensors would try each operation out on whole tensors first.
    parts = [own_part(parameter).detach() for parameter in trained]
    optimizer = module.make_optimizer(parts)
    for part in parts:
        part.grad = torch.zeros_like(part)
    optimizer.step()
    optimizer.zero_grad()
    values = [value for state in optimizer.state.values() for value in state.values()]
    recorder.mark(OPTIMIZER, [value for value in values if isinstance(value, Tensor)])
    if is_sharded := isinstance(module.network, FSDPModule):
        module.micro_batch_loss(batch).backward()  # the first time, what is gathered is allocated
        module.network.zero_grad()
    recorder.reset_peak()
    strategy: Any = trainer.strategy
    forward = backward = traffic = 0
    for is_last in [False, True][-micro_batches:]:  # from the second on, there are gradients in the forward
        before, sent_before = recorder.flops, recorder.traffic
        with strategy.block_backward_sync() if is_sharded and not is_last else nullcontext():
            loss = module.micro_batch_loss(batch)
            forward = recorder.flops - before
            loss.backward()
        backward = recorder.flops - before - forward
        sent = recorder.traffic - sent_before
        traffic += sent if is_last else sent * (micro_batches - 1)
        del loss
    for part, parameter in zip(parts, trained, strict=True):
        part.grad = None if parameter.grad is None else own_part(parameter.grad)
    torch.nn.utils.clip_grad_norm_(parts, trainer.gradient_clip_val or torch.inf)
    optimizer.step()
    return forward, backward, traffic


def _longest_batch(module: LanguageModule, datamodule: TextDataModule, rows: int, lengths: Lengths) -> Any:
    collate = datamodule.collate("shared" if module.shares_prompts else "plain")
    if lengths == "limits":
        prompt = [0] * datamodule.max_prompt_length
        response = [0] * (datamodule.max_length - datamodule.max_prompt_length)
        is_pair = datamodule.row_type.item is TokenizedPair
        item = TokenizedPair(prompt, response, response) if is_pair else TokenizedExample(prompt, response)
        return collate([(0, item)] * rows)
    datamodule.splits.load("train")
    table = datamodule.splits.rows["train"]
    if len(table) < rows:
        raise InputError(f"data.batch_size: a micro-batch has {rows} rows, and data.train only {len(table)}.")
    return collate(table.__getitems__(table.lengths().argsort(descending=True, stable=True)[:rows].tolist()))


def print_plan(plan: Plan, module: LanguageModule, *, devices: int, lengths: Lengths) -> None:
    """A table, and what this machine makes of it."""
    table = Table("memory of a rank at its peak", "GiB", title="Plan", title_justify="left")
    for kind in KINDS:
        if plan.memory[kind]:
            table.add_row(kind, f"{plan.memory[kind] / GIB:,.3f}")
    table.add_section()
    table.add_row("all", f"{plan.memory.total() / GIB:,.3f}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, DTYPES[module.source.compute_dtype])
    length, num_rows = plan.positions
    rows = "the longest training rows" if lengths == "data" else "rows as long as the limits of data allow"
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    lines = [
        f"Each of {devices} rank(s) makes {plan.micro_batches} micro-batch(es) of {plan.rows} row(s) per step, "
        f"here with {rows}: {num_rows} x {length} positions.",
        f"A step of a rank takes {plan.flops_per_step / 1e12:,.4g} TFLOP ({plan.forward_flops / 1e12:,.4g} forward and "
        f"{plan.backward_flops / 1e12:,.4g} backward per micro-batch). At this machine's {rate / 1e12:,.3g} TFLOP/s of "
        f"{module.source.compute_dtype} matrix products that is at least {plan.flops_per_step / rate:,.3g} s.",
        "Not counted: the libraries' own memory, validation and sampling. Attention is taken to be fused.",
    ]
    if plan.traffic:
        lines.append(f"Each rank sends {plan.traffic / GIB:,.4g} GiB to other ranks in a step.")
    if plan.offloaded:
        lines.append(f"The host's memory holds {', '.join(OFFLOADED)} (cpu_offload).")
    if module.samples:
        lines.append("Sampled responses are taken to be as long as they may be; their reward is not counted.")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        of_gpu = sum(size for kind, size in plan.memory.items() if not (plan.offloaded and kind in OFFLOADED))
        lines.append(f"It {'fits' if of_gpu < 0.95 * total else 'does not fit'} into this GPU's {total / GIB:.1f} GiB.")
    console.print("\n".join(lines), markup=False)
