"""Mutants of the objective: ``python -m tests.tools.mutation [losses weights ...] [--every 10]``, a second a mutant.

Each mutant is one small mistake in a formula: a sign, an operator, a bound, a number, a comparison, chosen for
rejected, a call left out (``x.detach()`` becomes ``x``), a keyword left out. A mutant that tests/objective passes with
survives; the command lists those, and fails if one is not in ``equivalent.txt``, or one there is no survivor any more.

Not mutmut: it leaves decorated functions alone, so properties and the backward pass of the log-probs, and constants
outside of functions. Not cosmic-ray: it edits the files in place and starts an interpreter a mutant. Here each mutant
is a fork of one process that has imported everything but the objective.
"""

import ast
import copy
import gc
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOM, TESTS = Path("lit_isdpo/objective"), Path("tests/objective")
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
TIMEOUT = 120  # seconds of a mutant
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARED = {
    **{ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt,), ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt,)},
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)},
    **{ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)},
}
NAMES = [("chosen", "rejected"), ("ref_", "mu_"), ("max", "min")]
MODULES = {"torch", "math", "ctx", "super", "cls"}


class Mutant(NamedTuple):
    """A module with one mistake; ``name`` is ``file: scope: line before -> line after``, without line numbers."""

    module: str
    name: str
    source: str


def swapped(name: str) -> list[str]:
    """The name with one word of a pair for the other."""
    pairs = [pair for words in NAMES for pair in (words, words[::-1])]
    return [name.replace(old, new) for old, new in pairs if old in name]


def alternatives(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in a node's place; ``None`` for a statement that is left out."""

    def changed(**fields: Any) -> ast.AST:
        other = copy.copy(node)
        for field, value in fields.items():
            setattr(other, field, value)
        return other

    match node:
        case ast.BinOp(left, op, right):
            if type(op) in BINARY:
                yield changed(op=BINARY[type(op)]())
            yield left
            yield right
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Compare(ops=[op]):
            yield from (changed(ops=[other()]) for other in COMPARED[type(op)])
        case ast.Compare(ops=[first, second]):
            yield from (changed(ops=[other(), second]) for other in COMPARED[type(first)])
            yield from (changed(ops=[first, other()]) for other in COMPARED[type(second)])
        case ast.BoolOp(op, values):
            yield changed(op=ast.And() if isinstance(op, ast.Or) else ast.Or())
            yield from values
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
            if value > 0:
                yield ast.Constant(value / 2 if isinstance(value, float) else value - 1)
        case ast.Constant(str(value)):
            yield ast.Constant(value + "_")
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse
        case ast.If(test=test):
            yield changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.AugAssign(op=op):
            yield None
            if type(op) in BINARY:
                yield changed(op=BINARY[type(op)]())
        case ast.Expr(ast.Call()):
            yield None
        case ast.Call(func, arguments, keywords):
            yield from (changed(keywords=[*keywords[:i], *keywords[i + 1 :]]) for i in range(len(keywords)))
            if isinstance(func, ast.Attribute) and not (isinstance(func.value, ast.Name) and func.value.id in MODULES):
                yield func.value
            elif len(arguments) == 1:
                yield arguments[0]
        case ast.Subscript(value=value):
            yield value
        case ast.Attribute(attr=name) if isinstance(node.ctx, ast.Load):
            yield from (changed(attr=other) for other in swapped(name))
        case ast.Name(id=name) if isinstance(node.ctx, ast.Load):
            yield from (changed(id=other) for other in swapped(name))
        case ast.keyword(arg=str(name)):
            yield from (changed(arg=other) for other in swapped(name))


def sites(node: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[ast.AST, str, int | None, tuple[str, ...]]]:
    """Every place ``(parent, field, index, scope)`` of a formula: no docstring, annotation or message."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope = (*scope, node.name)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "type_comment", "msg"):
            continue
        children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not isinstance(child, ast.AST) or docstring:
                continue
            if isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            yield node, field, index, scope
            yield from sites(child, scope)


def mutants(file: Path) -> Iterator[Mutant]:
    """All of a file's, in its order."""
    module = ".".join(file.with_suffix("").parts)
    tree = ast.parse(file.read_text())
    before = ast.unparse(tree).splitlines()
    seen = {ast.unparse(tree)}
    for parent, field, index, scope in sites(tree):
        values = getattr(parent, field)
        original = values if index is None else values[index]

        def put(value: Any, parent: ast.AST = parent, field: str = field, index: int | None = index) -> None:
            if index is None:
                setattr(parent, field, value)
            else:
                getattr(parent, field)[index] = value

        for alternative in alternatives(original):
            put(ast.Pass() if alternative is None else alternative)
            source = ast.unparse(ast.fix_missing_locations(tree))
            put(original)
            if source not in seen:
                seen.add(source)
                old, new = next(pair for pair in zip(before, source.splitlines(), strict=True) if pair[0] != pair[1])
                yield Mutant(module, f"{file.stem}: {'.'.join(scope)}: {old.strip()} -> {new.strip()}", source)


class MutantImporter(MetaPathFinder, Loader):
    """Imports a mutant in its module's place."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == self.mutant.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, f"<{self.mutant.name}>", "exec"), module.__dict__)


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass with a mutant, its module's own first; where the objective has not been imported yet."""
    assert not any(name.startswith("lit_isdpo.objective") for name in sys.modules)
    sys.meta_path.insert(0, MutantImporter(mutant))
    own = [TESTS / f"test_{mutant.module.split('.')[-1]}.py", TESTS / "test_numpy_parity.py", TESTS]
    options = ["-x", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "--tb=no"]
    return pytest.main([*options, *map(str, own)]) == 0


def survivors(mutants: list[Mutant], jobs: int) -> list[Mutant]:
    """Those that the tests do not notice; each runs in a fork, and one that hangs is killed."""
    running: dict[int, Mutant] = {}
    found = []

    def collect() -> None:
        pid, status = os.wait()
        mutant = running.pop(pid)
        if status == 0:
            found.append(mutant)
            print(mutant.name, flush=True)

    for mutant in mutants:
        if len(running) == jobs:
            collect()
        pid = os.fork()
        if pid == 0:
            signal.alarm(TIMEOUT)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            os._exit(0 if survives(mutant) else 1)
        running[pid] = mutant
    while running:
        collect()
    return found


def main(names: list[str], every: int, jobs: int) -> int:
    """Prints the survivors among every so manieth mutant; the exit status."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # quicker, and each start would warn of what it finds imported
    for heavy in ("torch", "torchmetrics", "transformers.models.llama.modeling_llama", "jsonargparse", "accelerate"):
        import_module(heavy)
    gc.freeze()  # so that forks share memory
    unchanged = Mutant("lit_isdpo.objective.losses", "(the code as it is)", (ROOM / "losses.py").read_text())
    print("Survivors:", flush=True)
    if not survivors([unchanged], jobs):
        raise SystemExit("The tests fail without a mutant.")
    files = [ROOM / f"{name}.py" for name in names] or sorted(ROOM.glob("*.py"))
    made = [mutant for file in files for mutant in mutants(file)][::every]
    alive = {mutant.name for mutant in survivors(made, jobs)}
    known = {line for line in EQUIVALENT.read_text().splitlines() if line and not line.startswith("#")}
    in_files = {line for line in known if line.split(":")[0] in {file.stem for file in files}}
    expected = in_files if every == 1 else in_files & {mutant.name for mutant in made}
    print(f"{len(made)} mutants, {len(alive)} survivors, of which {len(alive & known)} are known as equivalent.")
    for title, wrong in (("Not in equivalent.txt", alive - known), ("In equivalent.txt, yet none", expected - alive)):
        for name in sorted(wrong):
            print(f"{title}: {name}")
    return int(alive != expected)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("names", nargs="*", help="modules of the objective; all by default")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    sys.exit(main(**vars(parser.parse_args())))
