"""Side by side with TRL: ``python -m tests.tools.benchmarks --output runs/benchmark``, needs the extra ``bench``.

Every measurement is a process of its own; the contenders take turns, so that a machine that slows down slows all of
them down. What is compared are medians over repeats.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from time import time
from typing import Any

import torch
from jsonargparse import auto_cli

from lit_isdpo.training.throughput import matmul_rate
from tests.tools.benchmarks.contenders import RESULT
from tests.tools.benchmarks.workload import SHAPES, ModelSize, flops_per_pair, make_workload

CONTENDERS: dict[str, dict[str, Any]] = {
    "TRL": {"side": "trl", "cache": False},
    "TRL, cached reference": {"side": "trl", "cache": True},
    "ours, plain rows": {"side": "ours", "sharing": False, "cache": False},
    "ours": {"side": "ours", "sharing": True, "cache": False},
    "ours, cached reference": {"side": "ours", "sharing": True, "cache": True},
}


def benchmark(
    output: str = "runs/benchmark",
    shapes: list[str] = list(SHAPES),  # noqa: B006 (auto_cli wants the default as it is)
    data: list[str] = [],  # noqa: B006
    contenders: list[str] = list(CONTENDERS),  # noqa: B006
    model: ModelSize = ModelSize(),  # noqa: B008 (frozen)
    device: str = "cpu",
    batch_size: int = 8,
    micro_batch_sizes: list[int] = [1, 8],  # noqa: B006
    steps: int = 4,
    repeats: int = 3,
    gradient_checkpointing: bool = False,
    trl_attention: str = "sdpa",
    options: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Measures, and writes ``report.md`` and ``results.json`` into a folder.

    Args:
        output: the folder.
        shapes: of tldr, hh, ultrafeedback.
        data: files of preference pairs, besides the shapes.
        contenders: whom to measure.
        model: size of the model.
        device: cpu or cuda.
        batch_size: pairs of an optimizer step.
        micro_batch_sizes: each contender runs once with each of them, and is repeated at its best.
        steps: optimizer steps, the first of which is not timed.
        repeats: measurements of each contender at its best.
        gradient_checkpointing: for all.
        trl_attention: TRL's attention kernel.
        options: more flags of ours, without dashes.
    """
    folder = Path(output)
    results: dict[str, Any] = {"machine": machine(device), "workloads": {}}
    rate = matmul_rate(torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
    results["machine"]["matmul_gflops"] = rate / 1e9
    for name in [*shapes, *data]:
        source = SHAPES[name] if name in SHAPES else Path(name)
        place = folder / "workloads" / title(name).replace("/", "_")
        workload = make_workload(place, source, model, num_pairs=batch_size * steps, batch_size=batch_size)
        common: dict[str, Any] = {
            "sharing": False,
            "workload": workload._asdict(),
            "device": device,
            "weights": "float32" if device == "cpu" else model.dtype,
            "batch_size": batch_size,
            "steps": steps,
            "threads": torch.get_num_threads(),
            "gradient_checkpointing": gradient_checkpointing,
            "trl_attention": trl_attention,
            "options": options,
        }
        runs: dict[str, dict[int, list[Any]]] = {who: {} for who in contenders}

        for micro, who in product(micro_batch_sizes, contenders):
            _run(runs, common, who, micro, name)
        best = {who: fastest(by_micro, batch_size) for who, by_micro in runs.items()}
        for _, who in product(range(repeats - 1), contenders):
            _run(runs, common, who, best[who], name)
        for who, micro in best.items():
            job = common | CONTENDERS[who] | {"micro_batch_size": micro, "steps": 2}
            memory = measure(job, memory=True)
            runs[who][micro][0] |= {key: value for key, value in memory.items() if key.endswith("_mib")}
        results["workloads"][name] = {
            "runs": runs,
            "floor_pairs_per_second": {
                cached: rate / flops_per_pair(workload, 3 if cached else 4) for cached in (False, True)
            },
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        (folder / "report.md").write_text(report(results, batch_size))
    print((folder / "report.md").read_text())


def _run(runs: dict[str, dict[int, list[Any]]], common: dict[str, Any], who: str, micro: int, name: str) -> None:
    result = measure(common | CONTENDERS[who] | {"micro_batch_size": micro})
    runs[who].setdefault(micro, []).append(result)
    rate = pairs_per_second([result], common["batch_size"])
    print(f"{name}, {who}, micro-batches of {micro}: {rate:.3f} pairs/s", flush=True)


def pairs_per_second(runs: list[Any], batch_size: int) -> float:
    """Median over runs of the median over steps."""
    return median(batch_size / median(run["seconds"]) for run in runs)


def fastest(by_micro: dict[int, list[Any]], batch_size: int) -> int:
    """The micro-batch size with the highest rate."""
    return max(by_micro, key=lambda micro: pairs_per_second(by_micro[micro], batch_size))


def measure(job: dict[str, Any], memory: bool = False, cache: Path | None = None) -> dict[str, Any]:
    """Runs a job in a process of its own, for its times or for its memory."""
    command = [sys.executable, "-m", "tests.tools.benchmarks.contenders", json.dumps(job)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    if memory:  # large blocks are given back to the system at once, which takes time, and shows what is in use
        environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    if cache is not None:  # of tokens, for both sides
        environment["HF_DATASETS_CACHE"] = str(cache)
    started = time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            result = dict(json.loads(line.removeprefix(RESULT)))
            return result | {"seconds_to_first_step": result["first_step_at"] - started}
    raise SystemExit(f"{job['side']} failed:\n{done.stderr[-3000:]}")


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} cores"
    )
    return {
        "device": name,
        "load_average": os.getloadavg()[0],
        **{
            package: version(package) for package in ("torch", "lightning", "transformers", "trl") if find_spec(package)
        },
    }


def title(name: str) -> str:
    """A shape's name, or a file's with its folder.

    >>> title("tldr"), title("data/hh_harmless/train.jsonl.gz")
    ('tldr', 'hh_harmless/train')
    """
    path = Path(name)
    return name if name in SHAPES else f"{path.resolve().parent.name}/{path.name.split('.')[0]}"


def report(results: dict[str, Any], batch_size: int) -> str:
    """Markdown tables; each contender at its best micro-batch size, and memory at the one that it was fastest with."""
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [
        f"# Pairs a second, side by side\n\n{about}. Medians; of the cached runs the caching itself is not timed.\n"
    ]
    for name, workload in results["workloads"].items():
        best = {}
        for who, by_micro in workload["runs"].items():
            micro = fastest(by_micro, batch_size)
            best[who] = (pairs_per_second(by_micro[micro], batch_size), micro, by_micro[micro])
        trl = {who: rate for who, (rate, _, _) in best.items() if who.startswith("TRL")}
        losses = next(iter(best.values()))[2][0]["losses"]
        lines.append(f"\n## {title(name)}\n")
        lines.append(
            "| | micro-batch | pairs/s | x TRL | x TRL cached | share of the floor | peak MiB | beyond weights and "
            "optimizer, MiB | largest difference of a step's loss |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        )
        for who, (rate, micro, runs) in best.items():
            floor = workload["floor_pairs_per_second"]["cached" in who]
            cells = [who, str(micro), f"{rate:.3f}"]
            cells += [f"{rate / trl[key]:.2f}" if key in trl else "" for key in ("TRL", "TRL, cached reference")]
            cells += [f"{rate / floor:.0%}", f"{runs[0]['peak_mib']:.0f}"]
            cells += [f"{runs[0]['beyond_mib']:.0f}"]
            cells += [f"{max(abs(a - b) for a, b in zip(runs[0]['losses'], losses, strict=True)):.1e}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
