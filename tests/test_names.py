"""Names such as ``lab:posts`` outside of the command line: folders are made where a path is read, and not before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_isdpo.data.datamodule import SFTDataModule
from lit_isdpo.lab.folder import environment_of
from lit_isdpo.names import named_path
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.reference import ReferenceConfig
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.reward import RewardModule
from lit_isdpo.types import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where names are made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "lab"


def test_a_model_of_the_lab_is_made_when_it_is_loaded(folder: Path) -> None:
    config = PolicyConfig(path="lab:verbosity")
    assert not folder.exists()
    model = load_causal_lm(config)
    assert model.config.vocab_size == 7
    (made,) = folder.iterdir()
    assert made.name.startswith("verbosity-0-")
    assert [part.name for part in made.iterdir()] == ["reference"]
    assert config.path == "lab:verbosity", "what is saved keeps the name"


def test_modules_load_the_labs_models_by_default(folder: Path) -> None:
    module = PreferenceModule()
    assert module.source.path == "lab:posts"
    assert len(module.tokenizer) == module.architecture.vocab_size
    assert [made.name.partition("-")[0] for made in folder.iterdir()] == ["posts"]
    PreferenceModule(
        policy=PolicyConfig(path="lab:posts/init", init="random"), reference=ReferenceConfig(path="lab:posts")
    )
    RewardModule()


def test_data_and_tokenizers_of_the_lab_are_read(folder: Path) -> None:
    source = {"path": "lab:posts/sft", "first": 60}
    data = SFTDataModule(train=source, val=source, tokenizer="lab:posts", batch_size=4)
    assert not folder.exists()
    data.setup("fit")
    assert [(counts.kept, counts.dropped) for counts in data.splits.counts["train"]] == [(60, {})]
    (made,) = data.splits.folders("train")
    assert environment_of(made) == "posts"
    assert data.hparams["train"][0]["path"] == "lab:posts/sft"


def test_an_unknown_name_is_the_labs_to_refuse(folder: Path) -> None:
    for read in (lambda path: load_causal_lm(PolicyConfig(path=path)), lambda path: named_path(path, "pairs")):
        with pytest.raises(InputError, match="the lab has no 'lab:poets'; it has lab:posts/pairs"):
            read("lab:poets")
    assert not folder.exists()


@pytest.mark.parametrize("path", ["lab", "labs:posts", "owner/model", "C:/models/lab", "./lab:posts"])
def test_other_paths_are_taken_as_they_are(path: str) -> None:
    assert named_path(path, "reference") == path


def test_importing_makes_nothing_and_loads_nothing_heavy(tmp_path: Path) -> None:
    script = "import json, sys, lit_isdpo, lit_isdpo.names as names; print(json.dumps([*names.NAMES, *sys.modules]))"
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {script}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    name, *modules = json.loads(found.stdout)
    assert name == "lab"
    assert {"torch", "transformers", "numpy", "lightning"}.isdisjoint(modules)
    assert not [*tmp_path.iterdir()]
