"""The house's rules: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_isdpo"
FLOORS = [
    ["names", "types"],
    ["objective"],
    ["data", "policy"],
    ["lab"],
    ["evaluation"],
    ["training"],
    ["commands"],
    ["study"],
    ["cli"],
    ["__init__", "__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {
    "objective": {"lightning", "transformers", "datasets", "logging"},
    "data/formats": {"torch", "transformers"},
    "data/row_fields": {"torch", "transformers"},
    "data/examples": {"torch", "transformers"},
    "policy": {"lightning"},
    "lab": {"lightning"},
    "evaluation": {"lightning"},
    "study": {"lightning"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_room_imports_upward_or_a_stranger(file: Path) -> None:
    relative = file.relative_to(PACKAGE).with_suffix("")
    room = relative.parts[0]
    for module in imports(file):
        parts = module.split(".")
        if parts[0] == "lit_isdpo" and len(parts) > 1 and parts[1] != room:
            assert FLOOR[parts[1]] < FLOOR[room], f"{relative} imports {module}"
        for place, never in NEVER.items():
            if relative.is_relative_to(place):
                assert parts[0] not in never, f"{relative} imports {module}"


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.suffix in ("", ".py")}
    assert rooms - {"py"} <= set(FLOOR) | {"__main__"}


def test_supervised_training_needs_no_lab() -> None:
    """The package itself knows the lab's names, and none of its files."""
    script = "import sys, lit_isdpo.training.sft; print(*(name for name in sys.modules if 'lit_isdpo.lab.' in name))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == []


def test_no_two_files_have_one_name() -> None:
    names = [file.name for file in FILES if not file.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_files_stay_short() -> None:
    longer = {str(file.relative_to(PACKAGE)) for file in FILES if file.read_text().count("\n") > 350}
    assert not longer


def test_importing_the_package_changes_no_attention_of_others() -> None:
    """Nothing is registered in the process before a model of ours is loaded."""
    script = (
        "from transformers import AttentionInterface; before = dict(AttentionInterface().items());"
        "import lit_isdpo.cli, lit_isdpo.policy.attention; assert dict(AttentionInterface().items()) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_installed_distribution_takes_the_name_of_the_tests(tmp_path: Path) -> None:
    """Some ship a top-level ``tests``; ``python -m tests.tools.gpu`` must still find the tool."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    root = PACKAGE.parent
    script = f"import sys; sys.path.append({str(tmp_path)!r}); import tests; print(tests.__file__)"
    found = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == root / "tests" / "__init__.py"
