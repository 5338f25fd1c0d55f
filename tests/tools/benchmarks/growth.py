"""How cost grows with data and length of rows: ``python -m tests.tools.benchmarks.growth --output DIR``."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from tests.tools.benchmarks.__main__ import CONTENDERS, machine, measure, pairs_per_second
from tests.tools.benchmarks.workload import SHAPES, ModelSize, Shape, make_workload

SMALL = ModelSize(hidden_size=64, intermediate_size=176, num_layers=2, num_heads=2, num_kv_heads=1, vocabulary=8192)
SIDES = ("TRL", "ours")


def growth(
    output: str = "runs/benchmark_growth",
    num_pairs: list[int] = [1_000, 10_000, 100_000],  # noqa: B006 (auto_cli wants the default as it is)
    lengths: list[int] = [256, 1024, 4096],  # noqa: B006
    model: ModelSize = ModelSize(hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, num_kv_heads=2),  # noqa: B008 (frozen)
) -> None:
    """Measures, and writes ``report.md`` and ``results.json`` into a folder.

    Args:
        output: the folder.
        num_pairs: HH-shaped pairs of a tiny model; what is measured is the way to the first step.
        lengths: tokens of a prompt and a response, of which the response has a fifth; what is measured are steps.
        model: for ``lengths``.
    """
    folder = Path(output)
    results: dict[str, Any] = {"machine": machine("cpu"), "pairs": {}, "lengths": {}}
    for number in num_pairs:
        place = folder / f"pairs_{number}"
        workload = make_workload(place, SHAPES["hh"], SMALL, num_pairs=number, batch_size=8)
        results["pairs"][number] = rows = {}
        for who in SIDES:
            cache = place / "cache" / who
            shutil.rmtree(cache, ignore_errors=True)
            for start in ("first", "second"):
                result = measure(_job(who, workload, batch_size=8, micro_batch_size=1, steps=1), cache=cache)
                rows[f"{who}, {start} start"] = {key: result[key] for key in ("seconds_to_first_step", "peak_mib")}
                print(number, who, start, result["seconds_to_first_step"])
    for length in lengths:
        shape = Shape(length - length // 5, length // 5)
        workload = make_workload(folder / f"length_{length}", shape, model, num_pairs=8, batch_size=2)
        results["lengths"][length] = rows = {}
        for who in SIDES:
            job = _job(who, workload, batch_size=2, micro_batch_size=1, steps=4)
            result = measure(job)
            memory = measure(job | {"steps": 2}, memory=True)
            rows[who] = {"pairs_per_second": pairs_per_second([result], 2), "beyond_mib": memory["beyond_mib"]}
            print(length, who, rows[who])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "report.md").write_text(_report(results))
    print((folder / "report.md").read_text())


def _job(who: str, workload: Any, **sizes: int) -> dict[str, Any]:
    common = {
        "sharing": False,
        "workload": workload._asdict(),
        "device": "cpu",
        "weights": "float32",
        "threads": torch.get_num_threads(),
        "gradient_checkpointing": False,
        "trl_attention": "sdpa",
        "options": {},
    }
    return common | CONTENDERS[who] | sizes


def _report(results: dict[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [f"# How cost grows\n\n{about}.\n\n## From process start to the first step taken, a tiny model\n"]
    starts = list(next(iter(results["pairs"].values())))
    lines += ["| pairs | " + " | ".join(f"{start}: s, peak MiB" for start in starts) + " |", "|--:" * 5 + "|"]
    for number, rows in results["pairs"].items():
        cells = [f"{rows[start]['seconds_to_first_step']:.1f}, {rows[start]['peak_mib']:.0f}" for start in starts]
        lines.append(f"| {number:,} | " + " | ".join(cells) + " |")
    lines += ["\n## Steps, by the tokens of a prompt and a response\n"]
    lines += ["| tokens | " + " | ".join(f"{who}: pairs/s, MiB beyond weights and optimizer" for who in SIDES) + " |"]
    lines += ["|--:|--:|--:|"]
    for length, rows in results["lengths"].items():
        cells = [f"{rows[who]['pairs_per_second']:.2f}, {rows[who]['beyond_mib']:.0f}" for who in SIDES]
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    auto_cli(growth, as_positional=False)
