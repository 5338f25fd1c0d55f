"""The house's rules: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_isdpo"
FLOORS = [
    ["types"],
    ["objective"],
    ["data", "policy"],
    ["lab"],
    ["evaluation"],
    ["training"],
    ["study"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {
    "objective": {"lightning", "transformers", "datasets", "logging"},
    "data/formats": {"torch", "transformers"},
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
