"""The README's commands, run as they stand from a folder that has nothing but the configs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
OURS = [command for command in COMMANDS if command.startswith("python -m lit_isdpo")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs, and a data file of the README's name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    row = {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " A chair."}
    rows = [{**row, "prompt": f"Name fruit {number}."} for number in range(100)]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(command: str, folder: Path) -> str:
    arguments = [sys.executable, *command.split()[1:]]
    result = subprocess.run(
        arguments, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def test_the_first_screen_has_the_two_commands() -> None:
    assert COMMANDS[0] == "pip install -e . && python -m lit_isdpo fit --config configs/quickstart.yaml"
    assert COMMANDS[1] == 'pip install -e ".[test]" && pytest'


def test_every_command_is_of_a_known_kind() -> None:
    known = ("python -m lit_isdpo ", "pip install -e ", "tensorboard --logdir ", "torchrun ", "sbatch configs/cluster/")
    assert all(command.startswith(known) for command in COMMANDS), COMMANDS


@pytest.mark.slow
def test_the_commands_in_their_order(folder: Path) -> None:
    """The quickstart whole; of all else a few steps, batches or prompts."""
    output = run(COMMANDS[0].split(" && ")[1], folder)
    for text in (
        "Validation, before and after training",
        "gold reward",
        "sample 2",
        "tensorboard --logdir runs/quickstart",
    ):
        assert text in output
    for command in OURS:
        if "Qwen" in command:  # a model on the hub; the same config runs in the tests of the configs
            continue
        if " fit " in command:
            steps = "--trainer.max_steps 2" if "--ckpt_path" not in command else "--trainer.max_epochs 9"
            command += f" {steps} --trainer.limit_val_batches 1 --probe.num_prompts 8"
        if " test " in command:
            command += " --evaluation.num_prompts 16"
        if " predict " in command:
            command += " --trainer.limit_predict_batches 4"
        if " study " in command:  # one run of two steps instead of 24 whole ones
            command += ' --seeds=[0] --grid=null --methods={"DPO":"configs/model/dpo.yaml"}'
            command += ' --options={"trainer.max_steps":2,"trainer.limit_val_batches":1}'
        run(command, folder)
    assert (folder / "my_policy" / "model.safetensors").exists()
    assert (folder / "my_reward_model" / "model.safetensors").exists()
    assert (folder / "runs" / "study_quick" / "report.md").exists()
