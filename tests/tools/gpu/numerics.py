"""Compares a GPU with a CPU: log-probs and gradients in every layout, the head, and sampling with scoring."""

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_isdpo.data.collation import collate_completions, collate_pairs
from lit_isdpo.evaluation.statistics import sampled_kl
from lit_isdpo.objective.logprobs import Head, token_logps
from lit_isdpo.objective.metrics import token_kl
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference
from lit_isdpo.training.throughput import peak_memory_gib, reset_peak_memory
from lit_isdpo.types import PreferenceBatch
from tests.tools.benchmarks.workload import ModelSize
from tests.tools.gpu.shapes import TINY, drawn_model, drawn_pairs, logps_and_gradient
from tests.tools.gpu.sheet import Sheet

MODEL = ModelSize(hidden_size=512, intermediate_size=1408, num_layers=4, num_heads=8, num_kv_heads=4, vocabulary=32_000)
BF16, FP32 = torch.bfloat16, torch.float32
PER_TOKEN = {FP32: 1e-4, BF16: 0.2}
"""Nats per square root of tokens: fp32 sums in another order; three times what bfloat16 costs on a CPU."""


def run(sheet: Sheet) -> None:
    """Runs all three comparisons."""
    _layouts(sheet)
    _head(sheet)
    _sampling(sheet)


def _layouts(sheet: Sheet) -> None:
    """Compares each layout with plain rows in fp32 on the CPU, and a model with itself in each numerics."""
    size = MODEL if sheet.is_gpu else TINY
    short = drawn_pairs(6, (20, 100), (10, 40), size.vocabulary)
    long = drawn_pairs(6, (130, 220), (10, 40), size.vocabulary)  # attention treats such prompts apart
    layouts: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (short, {}),
        "shared": (short, {"layout": "shared"}),
        "split": (long, {"layout": "shared"}),
        "packed": (short, {"layout": "shared", "row_budget": 400}),
    }
    at_home = drawn_model(size, "cpu")
    expected = {name: logps_and_gradient(at_home, _batch(pairs, {}, "cpu")) for name, (pairs, _) in layouts.items()}
    for dtype in (FP32, BF16):
        model = LogProbModel(drawn_model(size, "cpu").model.to(sheet.device), compute_dtype=dtype)
        for name, (pairs, options) in layouts.items():
            batch = _batch(pairs, options, sheet.device)
            logps, gradient = (values.cpu() for values in logps_and_gradient(model, batch))
            wanted, wanted_gradient = expected[name]
            root = batch.tokens.completion_mask.sum(dim=1).cpu().sqrt()
            off = float(((logps - wanted).abs() / root).max())
            turned = float((gradient - wanted_gradient).norm() / wanted_gradient.norm())
            norm = float(gradient.norm() / wanted_gradient.norm())
            sheet.row(
                "Layouts, against plain rows in fp32 on the CPU",
                numerics=_name(dtype),
                layout=name,
                **{
                    "log-probs off by, nats": float((logps - wanted).abs().max()),
                    "per square root of tokens": off,
                    "gradient norm, ratio": norm,
                    "gradient off by, share": turned,
                },
            )
            sheet.check(f"{name} rows in {_name(dtype)}: log-probs", off, PER_TOKEN[dtype])
            sheet.check(f"{name} rows in {_name(dtype)}: gradient", turned, 1e-3 if dtype == FP32 else 0.1)
        with torch.no_grad():
            batch = _batch(short, {"layout": "shared"}, sheet.device)
            again = (model(batch.tokens).logps - model(batch.tokens).logps).abs().max()
        sheet.check(f"log-ratio of a model to itself in {_name(dtype)}, nats", float(again), 0.0)


def _batch(pairs: Any, options: dict[str, Any], device: str) -> PreferenceBatch:
    batch = collate_pairs(pairs, range(len(pairs)), pad_token_id=0, **options)
    return batch._replace(tokens=batch.tokens.to(torch.device(device)))


def _head(sheet: Sheet) -> None:
    """Compares the chunked head with autograd through all logits at once."""
    tokens, width, vocabulary, chunk = (2048, 2048, 152_000, 512) if sheet.is_gpu else (64, 32, 1_520, 16)
    device = torch.device(sheet.device)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator)
    weight = torch.randn(vocabulary, width, device=device, generator=generator) / math.sqrt(width)
    targets = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    slope = torch.randn(tokens, device=device, generator=generator)
    for dtype in (FP32, BF16):
        factors = [hidden.to(dtype).to(FP32), weight.to(dtype).to(FP32)]

        def chunked(inputs: list[Tensor], dtype: torch.dtype = dtype) -> Tensor:
            return token_logps(inputs[0], targets, Head(inputs[1], dtype=dtype), chunk_size=chunk)[0]

        def whole(inputs: list[Tensor]) -> Tensor:
            return linear(*inputs).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]

        ours, theirs = (_head_values(way, factors, slope, device) for way in (chunked, whole))
        for name, at_most in (("log-probs", 1e-5), ("by hidden states", 1e-4), ("by weights", 1e-4)):
            one, other = ours[name], theirs[name]
            off = float((one - other).norm() / other.norm())
            # The gradient of the logits is rounded to bfloat16 before its products.
            sheet.check(f"head of {vocabulary:,} in {_name(dtype)}: {name}", off, at_most if dtype == FP32 else 5e-3)
        for way, values in (("in chunks", ours), ("autograd, fp32", theirs)):
            cells = {"ms": 1e3 * values["seconds"]}
            if sheet.is_gpu:
                cells["GiB beyond inputs"] = values["beyond"]
            sheet.row(f"Head, {tokens:,} tokens x {vocabulary:,}", numerics=_name(dtype), way=way, **cells)
        del ours, theirs, factors
    if not sheet.is_gpu:
        sheet.skip("memory of the head", "the CPU's is that of the whole process")


def _head_values(
    way: Callable[[list[Tensor]], Tensor], factors: list[Tensor], slope: Tensor, device: torch.device
) -> dict[str, Any]:
    """Values and gradients, with time and memory of the second of two rounds."""
    for _ in range(2):
        inputs = [factor.clone().requires_grad_() for factor in factors]
        reset_peak_memory(device)
        before, start = peak_memory_gib(device), _now(device)
        logps = way(inputs)
        gradients = torch.autograd.grad((logps * slope).sum(), inputs)
        values = {"seconds": _now(device) - start, "beyond": peak_memory_gib(device) - before}
    return values | {"log-probs": logps.detach(), "by hidden states": gradients[0], "by weights": gradients[1]}


def _sampling(sheet: Sheet) -> None:
    """Compares the logits that tokens are drawn from with those of the trainer and the probe for the same tokens."""
    size = MODEL if sheet.is_gpu else TINY
    number, length = (32, 32) if sheet.is_gpu else (4, 8)
    prompts = [pair.prompt_ids for pair in drawn_pairs(number, (5, 40), (1, 1), size.vocabulary)]
    for dtype, compute in ((FP32, FP32), (FP32, BF16), (BF16, BF16), (BF16, FP32)):
        policy = drawn_model(size, sheet.device, dtype=dtype, compute_dtype=compute)
        drawn_from: list[Tensor] = []

        def generate(policy: LogProbModel = policy, drawn_from: list[Tensor] = drawn_from, **arguments: Any) -> Tensor:
            output = policy.model.generate(**arguments, output_logits=True, return_dict_in_generate=True)
            drawn_from.append(torch.stack(output.logits, dim=1))
            sequences: Tensor = output.sequences
            return sequences

        assert policy.how_to_sample.is_padded
        policy.generate = generate  # type: ignore[method-assign, assignment]
        by_length = sorted(prompts, key=len)  # in the order in which they share the batch
        vocabulary = Vocabulary(str, [1], 0)
        drawn = sample(policy, by_length, Sampling(max_new_tokens=length, batch_size=number), vocabulary)
        responses = [response for (response,) in drawn]
        tokens = collate_completions(by_length, [response.token_ids for response in responses], pad_token_id=0)
        tokens = tokens.to(torch.device(sheet.device))
        with torch.no_grad():
            width = tokens.completion_mask.shape[1]
            sampler = drawn_from[0][:, :width][tokens.completion_mask].float().log_softmax(dim=1)
            of_sampler = sampler.gather(1, tokens.at_completions(tokens.completion_ids)[:, None])[:, 0]
            of_trainer = tokens.at_completions(policy(tokens).per_token_logps)
            probe = policy.token_logits(policy.completion_states(tokens)).log_softmax(dim=1)
            of_probe = probe.gather(1, tokens.at_completions(tokens.completion_ids)[:, None])[:, 0]
            k1 = sampled_kl(policy, ResidentReference(policy), by_length, responses, pad_token_id=0, batch_size=number)
        off = (of_trainer - of_sampler).abs()
        numerics = f"weights {_name(dtype)}, compute {_name(compute)}"
        sheet.row(
            "Sampling against scoring, nats per token",
            numerics=numerics,
            **{
                "trainer, mean": float(off.mean()),
                "trainer, largest": float(off.max()),
                "KL of sampler to probe": float(token_kl(sampler, probe).mean()),
                "probe against trainer": float((of_probe - of_trainer).abs().max()),
            },
        )
        both = dtype == compute == FP32
        sheet.check(f"sampling against scoring, {numerics}: mean", float(off.mean()), 1e-5 if both else 0.05)
        sheet.check(f"KL of the probe of a policy to itself, {numerics}", float(k1.abs().max()), 0.0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _name(dtype: torch.dtype) -> str:
    return "fp32" if dtype == FP32 else "bf16"
