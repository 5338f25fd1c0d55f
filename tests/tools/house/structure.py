"""Prints how deep the Lightning modules are, and the private parts of libraries that the package uses or overrides."""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule

import lit_isdpo

LIBRARIES = ("lightning", "torch", "transformers", "jsonargparse", "torchmetrics")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def modules() -> Iterator[object]:
    for found in pkgutil.walk_packages(lit_isdpo.__path__, "lit_isdpo."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def classes() -> set[type]:
    return {
        value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("lit_isdpo")
    }


def overridden(own: set[type]) -> Iterator[str]:
    """Private methods that a class of ours takes from a library's class and writes anew."""
    for cls in own:
        bases = [base for base in cls.__mro__[1:] if base.__module__.partition(".")[0] in LIBRARIES]
        for name, value in vars(cls).items():
            if is_private(name) and inspect.isroutine(value) and any(name in vars(base) for base in bases):
                yield f"{cls.__module__}.{cls.__name__} overrides {name}"


def used(package: Path) -> Iterator[str]:
    """Private names that are read or imported, and that the package does not define."""
    trees = {file: ast.parse(file.read_text()) for file in sorted(package.rglob("*.py"))}
    own = {"_exit", "_replace", "_fields", "_asdict", "_field_defaults", "_make"}  # public all the same
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    for file, tree in trees.items():
        for node in ast.walk(tree):
            place = f"{file.relative_to(package)}"
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                yield f"{place} uses {node.attr}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
                if names[-1].startswith("lit_isdpo"):
                    continue
                for name in names:
                    if any(map(is_private, name.split("."))):
                        yield f"{place} imports {name}"


def main() -> None:
    own = classes()
    chains = [[base for base in cls.__mro__ if base in own] for cls in own if issubclass(cls, LightningModule)]
    print("found: levels", max(map(len, chains)))
    for line in sorted({*overridden(own), *used(Path(sys.argv[1]) / "lit_isdpo")}):
        print("found:", line)


if __name__ == "__main__":
    main()
