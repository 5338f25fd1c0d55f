"""A fit on a task that can be enumerated logs exact values beside the sampled ones."""

from pathlib import Path

import pytest

from lit_isdpo.cli import main
from lit_isdpo.lab import folder as lab
from lit_isdpo.lab.designs import Design
from lit_isdpo.lab.environments import Enumerable
from tests.runs import read_metrics

KEYS = (
    *("kl", "gold_reward", "feature", "response_length", "finished_fraction"),
    *("support_mass", "expected_weight", "expected_weight_true_mu", "ess"),
)


@pytest.fixture
def options(toy: Design, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    environment = Enumerable(lambda: toy)
    monkeypatch.setattr(environment, "num_pairs", {"train": 64, "validation": 16, "test": 16}, raising=False)
    monkeypatch.setitem(lab.ENVIRONMENTS, "toy", environment)
    return [
        "--data.train=lab:toy",
        "--data.batch_size=16",
        "--data.max_length=64",
        "--model.policy.path=lab:toy",
        "--model.loss.beta=0.01",
        "--model.weighting=UniformWeighting",
        "--model.optimizer=torch.optim.Adam",
        "--model.optimizer.lr=1e-2",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
        "--probe.max_new_tokens=4",
        f"--trainer.default_root_dir={tmp_path}",
    ]


def test_a_fit_logs_exact_values_at_every_probe(options: list[str], tmp_path: Path) -> None:
    main(["fit", *options, "--trainer.max_epochs=2", "--checkpoint.monitor=val/exact/gold_reward"])
    values = read_metrics(tmp_path / "version_0")
    assert {f"val/exact/{key}" for key in KEYS} <= set(values)
    for key in KEYS:
        assert list(values[f"val/exact/{key}"]) == [0, 4, 8]
    assert values["val/exact/kl"][0] == pytest.approx(0, abs=1e-9)
    assert values["val/exact/kl"][8] > values["val/exact/kl"][4] > 1e-4
    assert values["val/exact/expected_weight"][0] == pytest.approx(1)
    assert list((tmp_path / "version_0" / "checkpoints").glob("best-*"))


def test_another_vocabulary_has_no_exact_values_and_says_so(
    options: list[str], model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["validate", *options, f"--model.policy.path={model_dir}", "--data.max_length=256"])
    assert "no exact values" in caplog.text
    values = read_metrics(tmp_path / "version_0")
    assert "val/gold_reward" in values
    assert not any(key.startswith("val/exact") for key in values)
