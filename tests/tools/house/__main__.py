"""Measures the size and the structure of the package, beside another revision of it.

    python -m tests.tools.house                  # this tree
    python -m tests.tools.house --base v1.0      # beside another revision, with the ratio

A line of code is one that holds more than a comment or a docstring. Files per step are those whose functions run from
the end of one optimizer step of ``configs/quickstart.yaml`` to the end of the next, without logging. A private part is
a name with a leading underscore that Lightning, PyTorch, transformers or jsonargparse defines and the package uses or
overrides.
"""

import argparse
import ast
import io
import os
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[3]
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    r"""Lines that hold more than a comment or a string on its own.

    >>> code_lines('"A docstring."\n# a comment\nx = 1\n')
    1
    """
    strings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in IGNORED:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - strings)


def assertions(source: str) -> int:
    r"""``assert`` statements, ``pytest.raises`` and ``pytest.warns``, and calls of functions named ``assert_...``.

    >>> assertions("assert x\nwith pytest.raises(ValueError):\n    f()\ntorch.testing.assert_close(a, b)")
    3
    """
    found = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found += name in ("raises", "warns") or name.startswith("assert_")
        found += isinstance(node, ast.Assert)
    return found


def run(script: str, tree: Path) -> list[str]:
    """The lines that a script of this folder prints about the package of a tree."""
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name(script)), str(tree)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed on {tree}:\n{done.stdout}{done.stderr}")
    return [line.removeprefix("found: ") for line in done.stdout.splitlines() if line.startswith("found: ")]


def measure(tree: Path, names: bool = False) -> dict[str, int]:
    """The measures of a tree; prints what is behind some of them."""
    sources = {file: file.read_text() for file in sorted((tree / "lit_isdpo").rglob("*.py"))}
    tests = [file.read_text() for file in sorted((tree / "tests").rglob("*.py"))]
    step, private = run("step.py", tree), run("structure.py", tree)
    levels = next(line for line in private if line.startswith("levels "))
    private = [line for line in private if line != levels]
    if names:
        print("files of a step:", *step, sep="\n  ")
        print("private parts:", *private, sep="\n  ")
    return {
        "lines of code": sum(map(code_lines, sources.values())),
        "lines": sum(source.count("\n") for source in sources.values()),
        "files": len(sources),
        "lines of the longest file": max(source.count("\n") for source in sources.values()),
        "levels of Lightning modules": int(levels.removeprefix("levels ")),
        "files per optimizer step": len(step),
        "private parts of libraries": len(private),
        "YAML files": sum(1 for _ in (tree / "configs").rglob("*.yaml")),
        "assertions in tests": sum(map(assertions, tests)),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.house", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="a revision to compare with")
    parser.add_argument("--names", action="store_true", help="list the files of a step and the private parts")
    arguments = parser.parse_args()
    now = measure(ROOT, arguments.names)
    if arguments.base is None:
        for name, value in now.items():
            print(f"{name:<30}{value:>8,}")
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, arguments.base], cwd=ROOT, check=True)
        try:
            base = measure(tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    print(f"{'':<30}{arguments.base[:10]:>12}{'now':>12}{'ratio':>8}")
    for name, value in now.items():
        print(f"{name:<30}{base[name]:>12,}{value:>12,}{value / base[name]:>8.2f}")


if __name__ == "__main__":
    main()
