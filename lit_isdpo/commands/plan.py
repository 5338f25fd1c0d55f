"""What a fit will need, before anything is loaded: memory of a rank at its peak, and floating-point operations.

The module's own forward, backward and optimizer step run on tensors without values: PyTorch's fake tensors, which have
shapes and no memory. So whatever the config changes (an adapter, checkpointing, another optimizer) is in the numbers
without being written down here once more.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import masking_utils

from lit_isdpo.commands.cost import ACTIVATIONS, GATHERED, CostRecorder
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
PARAMETERS, REFERENCE, OPTIMIZER, GRADIENTS, BUCKETS = (
    "parameters",
    "reference",
    "optimizer state",
    "gradients",
    "gradient buckets of DDP",
)
OFFLOADED = (PARAMETERS, REFERENCE, OPTIMIZER, GRADIENTS)


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
        datamodule: likewise.
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
    strategy = trainer.strategy
    with _pretended_ranks(devices) if isinstance(strategy, FSDP2Strategy) else nullcontext():
        module.configure_outline()
        if isinstance(strategy, FSDP2Strategy):
            sharding = Sharding.over(devices, strategy.shard_size, torch.device("cpu"))
            for model in _models(module):
                sharding.shard(model)
        batch = _longest_batch(module, datamodule, rows, lengths)
        recorder = CostRecorder()
        batch = recorder.without_values(batch)
        with recorder, _rows_of_one_sequence():
            forward, backward, traffic = _record_step(module, batch, recorder, micro_batches, trainer)
    memory = Counter({kind: size for kind, size in recorder.peak.items() if size})
    if devices > 1 and not isinstance(strategy, FSDP2Strategy):
        memory[BUCKETS] = sum(p.nbytes for p in module.network.parameters() if p.requires_grad)  # there from the start
    num_rows, length = batch.tokens.input_ids.shape
    offloaded = isinstance(strategy, FSDP2Strategy) and strategy.cpu_offload
    return Plan(memory, traffic, forward, backward, micro_batches, rows, (length, num_rows), offloaded)


@contextmanager
def _pretended_ranks(size: int) -> Generator[None]:
    """Makes this process rank 0 of ``size`` ranks, of which the others are not there."""
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _rows_of_one_sequence() -> Generator[None]:
    """Rows without a mask hold one sequence, which transformers cannot see without values: it would mask them."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _models(module: LanguageModule) -> list[Any]:
    """What is in memory: the trained model, and a reference that is another."""
    reference = module.reference
    return [module.network, *([reference.model] if isinstance(reference, ResidentReference) else [])]


def _record_step(
    module: LanguageModule, batch: Any, recorder: CostRecorder, micro_batches: int, trainer: Trainer
) -> tuple[int, int, int]:
    """An optimizer step whose optimizer has its state. FLOPs of a forward and of a backward, and traffic in bytes."""
    device = torch.device("cpu")
    for kind, model in zip((PARAMETERS, REFERENCE), _models(module), strict=False):
        model.to_empty(device=device)
        model.model.tie_weights()
        recorder.mark(kind, [*model.parameters(), *model.buffers()])
    if isinstance(module.reference, CachedReference):
        module.reference.to(device)
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
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    recorder.mark(OPTIMIZER, states)
    is_sharded = isinstance(module.network, FSDPModule)
    if is_sharded:
        module.micro_batch_loss(batch).backward()  # the first time, what is gathered is allocated
        module.network.zero_grad()
    recorder.reset_peak()
    strategy: Any = trainer.strategy
    forward = backward = traffic = 0
    for number in range(min(2, micro_batches)):  # from the second on, there are gradients in the forward
        is_last = number == min(2, micro_batches) - 1
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
    longest = table.lengths().argsort(descending=True, stable=True)[:rows]
    return collate(table.__getitems__(longest.tolist()))


def print_plan(plan: Plan, module: LanguageModule, *, devices: int, lengths: Lengths) -> None:
    """A table, and what this machine makes of it."""
    table = Table("memory of a rank at its peak", "GiB", title="Plan", title_justify="left")
    for kind in (PARAMETERS, REFERENCE, OPTIMIZER, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS):
        if plan.memory[kind]:
            table.add_row(kind, f"{plan.memory[kind] / GIB:,.3f}")
    table.add_section()
    table.add_row("all", f"{plan.memory.total() / GIB:,.3f}")
    dtype = DTYPES[module.source.compute_dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, dtype)
    length, num_rows = plan.positions
    source = "the longest training rows" if lengths == "data" else "rows as long as the limits of data allow"
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for line in (
        f"Of {devices} rank(s) each: {plan.micro_batches} micro-batch(es) of {plan.rows} row(s) an optimizer step, "
        f"here with {source}: {num_rows} x {length} positions.",
        f"{plan.flops_per_step / 1e12:,.4g} TFLOP an optimizer step and rank ({plan.forward_flops / 1e12:,.4g} forward "
        f"and {plan.backward_flops / 1e12:,.4g} backward a micro-batch); at this machine's {rate / 1e12:,.3g} TFLOP/s "
        f"of {module.source.compute_dtype} matrix products at least {plan.flops_per_step / rate:,.3g} s.",
        *([f"{plan.traffic / GIB:,.4g} GiB are sent to other ranks in that time, by each."] if plan.traffic else []),
        *([f"Of these {', '.join(OFFLOADED)} are in the host's memory (cpu_offload)."] if plan.offloaded else []),
        "Not counted: what libraries take for themselves, and validation and sampling. Attention is taken to be fused.",
        *(["Sampled responses are taken to be as long as they may be; their reward is not counted."] * module.samples),
    ):
        console.print(line, markup=False)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        of_gpu = sum(size for kind, size in plan.memory.items() if not (plan.offloaded and kind in OFFLOADED))
        verdict = "fits" if of_gpu < 0.95 * total else "does not fit"
        console.print(f"It {verdict} into this GPU's {total / GIB:.1f} GiB.", markup=False)
