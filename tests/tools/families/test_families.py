"""The survey of families writes what it finds."""

import subprocess
import sys
from pathlib import Path


def test_it_tells_families_apart(tmp_path: Path) -> None:
    families = "[llama, bart, bloom, bert, deepseek_v3, xlnet]"
    command = [sys.executable, "-m", "tests.tools.families", "--output", str(tmp_path), "--families", families]
    subprocess.run(command, check=True, capture_output=True)
    text = (tmp_path / "families.md").read_text()
    assert "4 families work, 1 are refused" in text
    assert "| llama | sdpa | yes | as it is |" in text
    assert "| deepseek_v3 | sdpa | yes | as it is |" in text
    assert "| bart | sdpa | no: the tokens of a row depend on more than their mask | equally long prompts |" in text
    assert "| bloom | eager | no: " in text
    assert "- bert: BertLMHeadModel " in text
    assert text.endswith("\n\nxlnet\n")
