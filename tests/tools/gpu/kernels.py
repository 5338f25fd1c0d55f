"""Compares special kernels with plain ones: FlexAttention on packed rows, compiled layers, fused AdamW."""

import copy
import shutil
from collections.abc import Callable
from random import Random
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.policy.loading import compile_layers
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import PreferenceBatch, TokenizedPair
from tests.tools.benchmarks.workload import ModelSize
from tests.tools.gpu.shapes import TINY, drawn_model, drawn_pairs, logps_and_gradient
from tests.tools.gpu.sheet import Sheet

MODEL = ModelSize(
    hidden_size=1024, intermediate_size=2816, num_layers=6, num_heads=16, num_kv_heads=8, vocabulary=32_000
)
BATCHES = 6  # of rows of different lengths, which must not be compiled anew each


def run(sheet: Sheet) -> None:
    """A CPU has only the forward of FlexAttention, and needs a C++ compiler for it."""
    _fused_adamw(sheet)
    if not sheet.is_gpu and shutil.which("g++") is None:
        sheet.skip("FlexAttention and compiled layers", "on a CPU they need a C++ compiler")
        return
    _flex(sheet)
    _compiled(sheet)


def _packed(sheet: Sheet, vocabulary: int) -> list[PreferenceBatch]:
    """Draws batches of packed rows, each batch with other lengths."""
    number, budget = (24, 4096) if sheet.is_gpu else (4, 256)
    random, batches = Random(1), []
    lengths = ((100, 500), (20, 200)) if sheet.is_gpu else ((5, 40), (3, 20))
    pairs = drawn_pairs(number * BATCHES, *lengths, vocabulary)
    for first in range(0, len(pairs), number):
        some: list[TokenizedPair] = pairs[first : first + number - random.randrange(3)]
        batch = collate_pairs(some, range(len(some)), pad_token_id=0, layout="shared", row_budget=budget)
        batches.append(batch._replace(tokens=batch.tokens.to(torch.device(sheet.device))))
    return batches


def _flex(sheet: Sheet) -> None:
    """Compares log-probs and gradients with sdpa's. Policy and reference take turns, as in training."""
    size = MODEL if sheet.is_gpu else TINY
    compute = torch.bfloat16 if sheet.is_gpu else torch.float32
    policy = drawn_model(size, sheet.device, compute_dtype=compute)
    reference = drawn_model(size, sheet.device, compute_dtype=compute)
    policy.train()
    reference.eval().requires_grad_(False)
    batches = _packed(sheet, size.vocabulary)
    with_backward = sheet.is_gpu
    if not with_backward:
        sheet.skip("backward of FlexAttention", "there is none on a CPU")
        sheet.skip("FlexAttention on rows of other lengths", "on a CPU torch's kernels do not always compile")
        batches = batches[:1]
    expected = [_values(policy, batch, with_backward) for batch in batches]
    by_sdpa = _milliseconds(sheet, lambda: _values(policy, batches[0], with_backward))
    for model in (policy, reference):
        model.model.set_attn_implementation("flex_attention")
    counters.clear()
    seconds = []
    for batch, (logps, gradient) in zip(batches, expected, strict=True):
        start = perf_counter()
        with torch.no_grad():
            ratio = float((reference(batch.tokens).logps - policy(batch.tokens).logps).abs().max())
        own, own_gradient = _values(policy, batch, with_backward)
        seconds.append(perf_counter() - start)
        root = batch.tokens.completion_mask.sum(dim=1).sqrt()
        sheet.check(
            f"FlexAttention, batch {len(seconds)}: log-probs against sdpa, nats per square root of tokens",
            float(((own - logps).abs() / root).max()),
            0.2 if sheet.is_gpu else 1e-3,
        )
        sheet.check(f"FlexAttention, batch {len(seconds)}: policy against reference, nats", ratio, 0.1)
        if with_backward:
            off = float((own_gradient - gradient).norm() / gradient.norm())
            sheet.check(f"FlexAttention, batch {len(seconds)}: gradient against sdpa, share", off, 0.1)
    by_flex = _milliseconds(sheet, lambda: _values(policy, batches[0], with_backward))
    positions = "x".join(map(str, batches[0].tokens.input_ids.shape))
    sheet.row(
        "Packed rows",
        positions=positions,
        **{
            "sdpa, ms": by_sdpa,
            "FlexAttention, ms": by_flex,
            "first batch, s": seconds[0],
            "later batches, s": sum(seconds[1:]),
            "graphs compiled": counters["stats"]["unique_graphs"],
        },
    )


def _compiled(sheet: Sheet) -> None:
    """Compares compiled layers with eager ones, on rows of several lengths."""
    size = MODEL if sheet.is_gpu else TINY
    compute = torch.bfloat16 if sheet.is_gpu else torch.float32
    eager, compiled = (drawn_model(size, sheet.device, compute_dtype=compute).train() for _ in range(2))
    batches = _packed(sheet, size.vocabulary)
    compile_layers(compiled.model)
    torch._dynamo.reset()
    counters.clear()
    seconds = []
    for batch in batches:
        wanted, gradient = _values(eager, batch, True)
        start = perf_counter()
        own, own_gradient = _values(compiled, batch, True)
        seconds.append(perf_counter() - start)
        root = batch.tokens.completion_mask.sum(dim=1).sqrt()
        off = float(((own - wanted).abs() / root).max())
        turned = float((own_gradient - gradient).norm() / gradient.norm())
        sheet.check(f"compiled layers, batch {len(seconds)}: log-probs", off, 0.2 if sheet.is_gpu else 1e-3)
        sheet.check(f"compiled layers, batch {len(seconds)}: gradient", turned, 0.1 if sheet.is_gpu else 1e-3)
    sheet.row(
        "Compiled layers",
        **{
            "eager, ms": _milliseconds(sheet, lambda: _values(eager, batches[0], True)),
            "compiled, ms": _milliseconds(sheet, lambda: _values(compiled, batches[0], True)),
            "first batch, s": seconds[0],
            "later batches, s": sum(seconds[1:]),
            "graphs compiled": counters["stats"]["unique_graphs"],
        },
    )


def _fused_adamw(sheet: Sheet) -> None:
    """Compares three steps of fused AdamW with AdamW per tensor."""
    size = MODEL if sheet.is_gpu else TINY
    model = drawn_model(size, sheet.device)
    ends, milliseconds = {}, {}
    ways = {"fused": {"fused": True}, "foreach": {"foreach": True}, "one by one": {"foreach": False}}
    for name, options in ways.items():
        parameters = [copy.deepcopy(parameter) for parameter in model.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, **options)
        generator = torch.Generator(sheet.device).manual_seed(0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, device=sheet.device, generator=generator)
            optimizer.step()
        milliseconds[name] = _milliseconds(sheet, optimizer.step, repeats=3)
        ends[name] = [parameter.detach() for parameter in parameters]
    sheet.row("A step of AdamW, ms", **milliseconds)
    off = max(float((a - b).abs().max()) for a, b in zip(ends["fused"], ends["one by one"], strict=True))
    sheet.check("fused AdamW: weights after the same steps", off, 1e-5)


def _values(model: LogProbModel, batch: PreferenceBatch, with_backward: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient, or no gradient if the device has no backward."""
    if with_backward:
        return logps_and_gradient(model, batch)
    with torch.no_grad():
        return model(batch.tokens).logps, torch.empty(0)


def _milliseconds(sheet: Sheet, work: Callable[[], Any], repeats: int = 5) -> float:
    """The least time of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        if sheet.is_gpu:
            torch.cuda.synchronize()
        start = perf_counter()
        work()
        if sheet.is_gpu:
            torch.cuda.synchronize()
        best = min(best, 1e3 * (perf_counter() - start))
    return best
