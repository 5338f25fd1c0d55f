"""What 20 optimizer steps log, through the command line and the real Trainer: stored, and compared with what is stored.

``python -m tests.training.trajectories`` writes ``trajectories/*.json`` anew, after a change that is meant to change
values; it prints how far the new values are from the stored ones. Model and pairs are the same bits on every machine:
the lab's shipped posts reference, and pairs written by Python's own generator. Methods are files of ``configs/`` over
the quickstart.
"""

import contextlib
import io
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_isdpo.cli import main
from tests.conftest import write_pairs
from tests.runs import newest_run, read_metrics

FOLDER = Path(__file__).with_name("trajectories")
METHODS = {
    **{
        name: [f"--config=configs/model/{name}.yaml"]
        for name in ("is_dpo", "dpo", "ipo", "slic", "chi_po", "rpo_strong")
    },
    "is_dpo_lora": ["--config=configs/policy/lora.yaml", "--model.optimizer.lr=1e-3"],
}
KEYS = ("loss", "grad_norm", "weights/mean", "weights/ess", "logratios/chosen", "logratios/rejected")
NUM_STEPS = 20


def trajectory(method: str) -> dict[str, list[float]]:
    """Each key's value at each step."""
    with tempfile.TemporaryDirectory() as root:
        pairs = Path(root) / "pairs.jsonl"
        write_pairs(pairs, 168)
        options = {
            "data.train": pairs,
            "data.val_size": 8,
            "data.batch_size": 16,
            "data.micro_batch_size": 8,
            "trainer.max_epochs": -1,
            "trainer.max_steps": NUM_STEPS,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": root,
            "probe.num_prompts": 0,
            "checkpoint.monitor": "null",
        }
        method_options = ["--config=configs/quickstart.yaml", *METHODS[method]]
        main(["fit", *method_options, *(f"--{key}={value}" for key, value in options.items())])
        logged = read_metrics(newest_run(Path(root)))
    return {key: [logged[f"train/{key}"][step] for step in sorted(logged[f"train/{key}"])] for key in KEYS}


def stored(method: str) -> dict[str, list[float]]:
    """The trajectory as it was written."""
    found = json.loads((FOLDER / f"{method}.json").read_text())
    return {key: found[key] for key in KEYS}


def distance(values: dict[str, list[float]], others: dict[str, list[float]]) -> dict[str, float]:
    """Of each key the largest difference of a step, as a share of the key's largest value."""
    return {
        key: max(abs(a - b) for a, b in zip(values[key], others[key], strict=True)) / max(map(abs, others[key]))
        for key in KEYS
    }


def environment() -> dict[str, Any]:
    """What made the values."""
    return {
        **{package: version(package) for package in ("torch", "transformers", "lightning", "peft")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    for method in sys.argv[1:] or METHODS:
        with contextlib.redirect_stdout(io.StringIO()):
            values = trajectory(method)
        file = FOLDER / f"{method}.json"
        if file.is_file():
            print(method, {key: f"{share:.1e}" for key, share in distance(values, stored(method)).items()}, flush=True)
        file.parent.mkdir(exist_ok=True)
        lines = [f'"environment": {json.dumps(environment())}', *(f"{json.dumps(k)}: {v}" for k, v in values.items())]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
