"""The benchmark runs, and all of its contenders take the same steps; TRL's where it is installed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tools.benchmarks.__main__ import CONTENDERS

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}


@pytest.mark.slow
def test_all_contenders_take_the_same_steps(tmp_path: Path) -> None:
    contenders = [who for who in CONTENDERS if "TRL" not in who or find_spec("trl")]
    options = [f"--model.{key}={value}" for key, value in TINY.items()] + ["--model.vocabulary=4096"]
    options += ["--shapes=[hh]", f"--contenders={json.dumps(contenders)}", "--batch_size=4", "--micro_batch_sizes=[2]"]
    options += ["--steps=3", "--repeats=1", f"--output={tmp_path}"]
    subprocess.run(
        [sys.executable, "-m", "tests.tools.benchmarks", *options], check=True, capture_output=True, timeout=600
    )
    runs = json.loads((tmp_path / "results.json").read_text())["workloads"]["hh"]["runs"]
    losses = {who: by_micro["2"][0]["losses"] for who, by_micro in runs.items()}
    assert list(losses) == contenders
    first = losses[contenders[0]]
    assert len(first) == 3
    assert abs(first[2] - first[0]) > 1e-4  # something is learned
    for who, values in losses.items():
        assert values == pytest.approx(first, abs=1e-4), who
    for by_micro in runs.values():
        assert by_micro["2"][0]["beyond_mib"] > 0
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {who} |" in report for who in contenders)
