"""A run of an earlier version goes on, though classes have moved since: its config names them as they were."""

import importlib
from pathlib import Path

import pytest
import torch

from lit_isdpo.cli import main
from lit_isdpo.names import with_present_paths
from tests.conftest import write_pairs
from tests.runs import read_metrics

FORMER = Path(__file__).parent / "former_run"  # commit 4a8500b wrote it: two optimizer steps, RPO, and its class paths
LAST = f"--ckpt_path={FORMER / 'checkpoints' / 'last.ckpt'}"
CLASSES = (FORMER / "classes.txt").read_text().split()
LOSS_AT_STEP_4 = 2.979580879211426  # as that commit's own code went on


@pytest.fixture
def options(model_dir: str, tmp_path: Path) -> list[str]:
    """The former config, with the model and the pairs where they are now."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    own = [f"--model.policy.path={model_dir}", f"--data.train={pairs}", f"--trainer.default_root_dir={tmp_path}"]
    return [f"--config={FORMER / 'config.yaml'}", *own]


def test_a_former_run_goes_on_as_it_would_have(
    options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", *options, LAST, "--trainer.max_steps=4"])
    run = tmp_path / "version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert read_metrics(run)["val/loss"][4] == pytest.approx(LOSS_AT_STEP_4, abs=1e-6)
    assert "trainer.max_steps: 2 -> 4" in caplog.text
    assert "class_path" not in caplog.text, "the same class at another place is no change"
    saved = (run / "config.yaml").read_text()
    assert saved == with_present_paths(saved)
    assert "tests.kept.KeptCheckpoint" in saved


def test_a_former_run_is_validated(options: list[str], tmp_path: Path) -> None:
    main(["validate", *options, LAST])
    assert len(read_metrics(tmp_path / "version_0")["val/loss"]) == 1


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_the_other_verbs_read_its_config(verb: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, *options, "--print_config"])
    assert "RPOLoss" in capsys.readouterr().out


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.rpartition(".")[2])
def test_every_class_that_a_former_config_may_name_is_found(path: str) -> None:
    module, _, name = with_present_paths(path).rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_a_function_that_has_moved_is_no_change(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named by a module that imports it, too."""
    for former in ("lit_isdpo.training.language.adamw", "lit_isdpo.optimizers.adamw"):
        assert with_present_paths(f"optimizer: {former}") == "optimizer: lit_isdpo.training.optimization.adamw"
    options = [option for option in tiny if not option.startswith("--model.optimizer")]
    main(["fit", *options, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"])
    config = tmp_path / "version_0" / "config.yaml"
    assert "optimizer: lit_isdpo.training.optimization.adamw" in config.read_text()
    config.write_text(config.read_text().replace("training.optimization.adamw", "training.language.adamw"))
    last = config.parent / "checkpoints" / "last.ckpt"
    main(["fit", f"--config={config}", f"--ckpt_path={last}", "--trainer.max_steps=2"])
    assert "trainer.max_steps: 1 -> 2" in caplog.text
    assert "adamw" not in caplog.text


def test_flags_may_name_classes_so_too(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    loss = "--model.loss={class_path: lit_isdpo.losses.IPOLoss, init_args: {logratio: sum}}"
    for arguments in ([loss], ["--model.loss=lit_isdpo.losses.IPOLoss", "--model.loss.logratio=sum"]):
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *tiny, *arguments, "--print_config"])
        assert "class_path: lit_isdpo.objective.losses.IPOLoss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "class_path: torch.optim.AdamW",
        "class_path: my.lit_isdpo.losses.IPOLoss",
        "class_path: own_losses.IPOLoss",
        "class_path: lit_isdpo.losses.NoSuchLoss",
        "path: /runs/lit_isdpo.losses.IPOLoss/model",
        "path: lit_isdpo.old",
        "name: lit_isdpo.main",
        "output_dir: lit_isdpo.export",
        "module: lit_isdpo.training.language",
    ],
)
def test_what_is_no_class_of_this_package_stays(text: str) -> None:
    assert with_present_paths(text) == text
