"""The measuring command, on trees whose measures are known."""

from pathlib import Path

import pytest
import torch

from tests.tools.house import structure
from tests.tools.house.__main__ import ROOT, assertions, code_lines, measure

OWN = '''"""A module."""
from torch._thing import part


class Own:
    """A class."""

    def _own(self) -> int:
        """A method."""
        return self._own() + self.theirs._theirs  # a comment
'''


def test_lines_of_code_leave_out_docstrings_comments_and_blanks() -> None:
    assert code_lines(OWN) == 4


def test_a_string_that_is_used_counts() -> None:
    assert code_lines('x = """one\ntwo"""\n') == 2


def test_assertions_of_every_kind_count() -> None:
    text = "def test():\n    assert x\n    torch.testing.assert_close(a, b)\n    with pytest.raises(E):\n        f()\n"
    assert assertions(text) == 3


def test_private_names_of_others_are_found_and_own_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    assert list(structure.used(tmp_path)) == ["own.py imports torch._thing", "own.py uses _theirs"]


def test_an_override_of_a_private_method_is_found() -> None:
    class Ours(torch.nn.Linear):
        def _get_name(self) -> str:
            return "ours"

        def _new(self) -> None: ...

    assert [line.rpartition(" ")[2] for line in structure.overridden({Ours})] == ["_get_name"]


@pytest.mark.slow
def test_this_tree_is_measured() -> None:
    measures = measure(ROOT)
    assert measures["files"] == len(list((ROOT / "lit_isdpo").rglob("*.py")))
    assert 0 < measures["files per optimizer step"] < measures["files"]
