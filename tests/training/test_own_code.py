"""A model with Python code of its own: the code goes with the run, and with what is exported of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.training.run_folder import code_files, copy_code
from tests.conftest import write_model

CLASSES = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    "AutoModel": "modeling_own_base.OwnModel",
    "AutoModelForSequenceClassification": "modeling_scores.OwnForScores",  # there is no such file
}
CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM

from .numbers_own import SCALE

class OwnForCausalLM(LlamaForCausalLM):
    scale = SCALE
""",
    "modeling_own_base.py": """
from transformers import LlamaModel

from .numbers_own import SCALE

class OwnModel(LlamaModel):
    scale = SCALE
""",
    "numbers_own.py": """
from .more_numbers_own import ONE

SCALE = 41 + ONE
""",
    "more_numbers_own.py": "ONE = 1\n",
    "tokenization_own.py": """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    scale = 42
""",
}
LOAD = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
total = sum(p.detach().double().sum().item() for p in model.parameters())
print(type(base).__name__, type(model).__name__, model.scale, type(tokenizer).__name__, total)
"""


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What transformers copies of the code, and Python knows of it, is of one test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    others = [place for place in sys.path if not (Path(place) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", others)  # another test's copies would be found first
    forget_modules()
    yield
    forget_modules()


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(params=["architecture", "class"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with an architecture, model and tokenizer of its own, or with another class for a known architecture."""
    folder = tmp_path / "own"
    write_model(folder)
    classes = dict(CLASSES)
    if request.param == "class":
        del classes["AutoConfig"]
        change(folder / "config.json", auto_map=classes)
    else:
        change(folder / "config.json", auto_map=classes, model_type="own")
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )
    for name, text in CODE.items():
        (folder / name).write_text(text)
    if request.param == "architecture":
        with (folder / "modeling_own.py").open("a") as code:
            code.write("\nfrom .configuration_own import OwnConfig\n\nOwnForCausalLM.config_class = OwnConfig\n")
        with (folder / "modeling_own_base.py").open("a") as code:
            code.write("\nfrom .configuration_own import OwnConfig\n\nOwnModel.config_class = OwnConfig\n")
    return folder


@pytest.fixture
def run(own: Path, tiny: list[str], tmp_path: Path) -> Path:
    """A fit of it, and the folder is gone."""
    arguments = [f"--model.policy.path={own}", "--model.policy.trust_remote_code=true", "--trainer.max_steps=2"]
    main(["fit", *tiny[1:], *arguments, f"--trainer.default_root_dir={tmp_path / 'runs'}"])
    shutil.rmtree(own)
    return tmp_path / "runs" / "version_0"


def export(run: Path, output: Path, *arguments: str) -> None:
    main(["export", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--output_dir={output}", *arguments])


def test_an_exported_model_has_its_code(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "exported", "--trust_remote_code=true")
    policy = load_policy(run / "checkpoints" / "last.ckpt", trust_remote_code=True)
    shutil.move(tmp_path / "exported", tmp_path / "moved")
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "modules")
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "moved"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "fresh")},
    )
    *names, total = loaded.stdout.split()
    assert names == ["OwnModel", "OwnForCausalLM", "42", "OwnTokenizer"]
    expected = sum(p.detach().double().sum().item() for p in policy.parameters())
    assert float(total) == pytest.approx(expected, abs=1e-9)


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> str:
    """What an export says that ends with a sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        export(run, run.parent / "exported", *arguments)
    assert end.value.code == 2
    assert not (run.parent / "exported").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_an_export_runs_code_where_the_user_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, run)
    assert said.startswith("error: trust_remote_code: the model of the run")
    assert "set trust_remote_code to true if you trust it" in said


def test_an_older_run_lacks_the_code_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {file: file.read_text() for file in (run / "model").glob("*.py")}
    for file in kept:
        file.unlink()
    said = refusal(capsys, run, "--trust_remote_code=true")
    assert "run_dir: " in said
    assert "_own.py, the Python code of its model, which older versions did not keep; copy it there" in said
    for file, text in kept.items():
        if "numbers" not in file.name:
            file.write_text(text)
    said = refusal(capsys, run, "--trust_remote_code=true")
    assert "run_dir: " in said
    assert "numbers_own" in said
    for file, text in kept.items():
        file.write_text(text)
    export(run, run.parent / "exported", "--trust_remote_code=true")


def test_code_of_the_hub_stays_there(own: Path, tmp_path: Path) -> None:
    change(own / "config.json", auto_map={"AutoModelForCausalLM": "owner/repo--modeling_own.OwnForCausalLM"})
    assert code_files(own) == ["tokenization_own.py"]
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(own / "config.json", folder)
    copy_code(PolicyConfig(path=str(own)), folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_no_file_outside_of_the_folder_is_named(own: Path, tmp_path: Path) -> None:
    classes = {"AutoConfig": "../configuration_own.OwnConfig", "AutoModel": f"{tmp_path}/modeling_own.OwnForCausalLM"}
    change(own / "config.json", auto_map=classes)
    (own / "tokenizer_config.json").write_text("[")
    assert code_files(own) == []


def test_a_fit_that_runs_no_code_keeps_none(own: Path, tiny: list[str], tmp_path: Path) -> None:
    """The architecture is known, and its own class left aside; it is exported as it was trained."""
    (own / "tokenizer_config.json").unlink()
    AutoTokenizer.from_pretrained(tiny[0].partition("=")[2]).save_pretrained(own)
    change(own / "config.json", model_type="llama")
    arguments = [f"--model.policy.path={own}", "--trainer.max_steps=1"]
    main(["fit", *tiny[1:], *arguments, f"--trainer.default_root_dir={tmp_path / 'runs'}"])
    run = tmp_path / "runs" / "version_0"
    assert not [*(run / "model").glob("*.py")]
    export(run, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=False)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.isfinite(p).all() for p in model.parameters())
