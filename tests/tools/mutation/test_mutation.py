"""The mutation tester makes the mistakes that it says it makes, and the objective's tests find a sample of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.mutation.__main__ import mutants

SOURCE = '''"""A docstring."""


def cap(chosen: float, epsilon: float = 1.0) -> float:
    """Another."""
    if epsilon < 0:
        raise ValueError("no mutant")
    return -chosen.clamp(max=2 * epsilon)
'''


def test_every_small_mistake_once(tmp_path: Path) -> None:
    file = tmp_path / "cap.py"
    file.write_text(SOURCE)
    header = "def cap(chosen: float, epsilon: float={})->"
    made = {mutant.name.split(" -> ")[-1].strip() for mutant in mutants(file)}
    assert {
        "return chosen.clamp(max=2 * epsilon)",
        "return -chosen.clamp()",
        "return -chosen",
        "return -rejected.clamp(max=2 * epsilon)",
        "return -chosen.clamp(min=2 * epsilon)",
        "return -chosen.clamp(max=2 / epsilon)",
        "return -chosen.clamp(max=2)",
        "return -chosen.clamp(max=epsilon)",
        "return -chosen.clamp(max=3 * epsilon)",
        "return -chosen.clamp(max=1 * epsilon)",
        "if epsilon <= 0:",
        "if epsilon > 0:",
        "if epsilon < 1:",
        "if not epsilon < 0:",
    } == {name for name in made if not name.startswith(("float:", header))}
    assert not any("ValueError" in name or "docstring" in name for name in made)
    assert sum("epsilon: float=" in mutant.source and "=1.0" not in mutant.source for mutant in mutants(file)) == 2


@pytest.mark.slow
def test_a_sample_of_the_mutants_of_losses_and_weights_is_killed() -> None:
    command = [sys.executable, "-m", "tests.tools.mutation", "losses", "weights", "--every", "50", "--jobs", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
