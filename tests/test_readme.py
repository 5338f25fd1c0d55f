"""The README's commands, run as they stand from a folder that has nothing but the configs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from lit_isdpo.data.formats import FORMATS
from lit_isdpo.data.outcomes import Change, Reason
from lit_isdpo.training.checkpoint_files import StoredCheckpoint
from tests.processes import start

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
OURS = [command for command in COMMANDS if command.startswith("python -m lit_isdpo")]
DATA_PAGE = (ROOT / "configs" / "data" / "DATA.md").read_text()
QUICKSTART = COMMANDS[0].split(" && ")[1]
SHORTER = {  # a few steps, batches or prompts
    "fit": " --trainer.max_steps STEPS --trainer.limit_val_batches 1 --probe.num_prompts 8",
    "validate": " --trainer.limit_val_batches 1 --probe.num_prompts 8",
    "test": " --trainer.limit_test_batches 1 --evaluation.num_prompts 16 --evaluation.kl_prompts 16",
    "predict": " --trainer.limit_predict_batches 4",
    # one run of two steps instead of 24 whole ones
    "study": """ --seeds=[0] --grid=null --methods='{"DPO":"configs/model/dpo.yaml"}' """
    """--options='{"trainer.max_steps":2,"trainer.limit_val_batches":1}' """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs, and a data file of the README's name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    row = {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " A chair."}
    rows = [{**row, "prompt": f"Name fruit {number}."} for number in range(100)]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    (folder / "my_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    Dataset.from_list(rows).to_parquet(folder / "my_pairs.parquet")
    return folder


def run(command: str, folder: Path) -> str:
    """What a command printed, which ended well."""
    command, _, target = command.partition(" > ")
    _, _, module, *arguments = shlex.split(command)
    output, environment = folder / "output.txt", {"OMP_NUM_THREADS": "1"}
    if command == QUICKSTART or "--trainer.devices" in command:  # the former as users run it; the others start ranks
        own = [sys.executable, "-m", module, *arguments]
        with output.open("w") as file:
            environment = os.environ | environment
            status = subprocess.run(own, cwd=folder, env=environment, stdout=file, stderr=file, check=False).returncode
    else:
        process = start(module, arguments, output, environment=environment, folder=folder)
        process.join()
        status = process.exitcode or 0
    printed = output.read_text()
    assert status == 0, f"{command}\n{printed}"
    assert "Traceback" not in printed, printed
    if target:
        (folder / target).write_text(printed)
    return printed


def test_the_first_screen_has_the_two_commands() -> None:
    assert COMMANDS[0] == "pip install -e . && python -m lit_isdpo fit --config configs/quickstart.yaml"
    assert COMMANDS[1] == 'pip install -e ".[test]" && pytest'


def test_every_command_is_of_a_known_kind() -> None:
    known = ("python -m lit_isdpo ", "pip install -e ", "tensorboard --logdir ", "torchrun ", "sbatch configs/cluster/")
    assert all(command.startswith(known) for command in COMMANDS), COMMANDS


@pytest.mark.slow
def test_the_commands_in_their_order(folder: Path) -> None:
    """The quickstart whole; of all else a few steps, batches or prompts."""
    output = run(QUICKSTART, folder)
    for text in (
        "Validation, before and after training",
        "gold reward",
        "sample 2",
        "tensorboard --logdir runs/quickstart",
    ):
        assert text in output
    last = StoredCheckpoint(folder / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt")
    for command in OURS:
        if "Qwen" in command:  # a model on the hub; the same config runs in the tests of the configs
            continue
        for verb, options in SHORTER.items():
            if f" {verb} " in command and "--show" not in command:
                steps = last.extras["global_step"] + 2 if "--ckpt_path" in command else 2
                command += options.replace("STEPS", str(steps))
        if "configs/reward.yaml" in command:  # drawing its eight sets takes a minute; test_reward.py does
            command += " --data.train lab:posts"
        run(command, folder)
    assert (folder / "my_policy" / "model.safetensors").exists()
    assert (folder / "my_reward_model" / "model.safetensors").exists()
    assert (folder / "runs" / "study_quick" / "report.md").exists()
    shown = yaml.safe_load((folder / "run.yaml").read_text())
    assert shown["model"]["init_args"]["loss"]["class_path"].endswith(".DPOLoss")
    assert shown["trainer"]["default_root_dir"].startswith("runs/paper/tldr/IS-DPO-beta=0.05-seed=1-")


@pytest.mark.slow
def test_the_commands_of_the_data_page(folder: Path) -> None:
    commands = re.findall(r"^python -m lit_isdpo .*", DATA_PAGE, flags=re.M)
    assert [("kept" in run(command, folder)) for command in commands] == [True, True]


def test_the_python_of_the_data_page(folder: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DATA_PAGE, flags=re.S)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code.replace('"Qwen/Qwen2.5-0.5B"', repr(model_dir)), names)
    names["data"].setup("validate")


def test_the_data_page_names_all_reasons_and_changes() -> None:
    notes = [reason.value for reason in Reason] + [change.value for change in Change]
    missing = [note for note in notes if f"`{note}" not in DATA_PAGE]
    assert missing == []
    assert [name for name in FORMATS if f"`{name}`" not in DATA_PAGE] == []
