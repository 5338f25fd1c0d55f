"""Compiled layers: the same fit to rounding, the same names, and no compilation for sampling."""

from pathlib import Path
from shutil import which

import pytest
import torch

from lit_isdpo.cli import main
from tests.runs import read_metrics


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_fit_is_the_plain_fit(tiny: list[str], tmp_path: Path) -> None:
    logs, weights = [], []
    for compiled in ("false", "true"):
        root = tmp_path / compiled
        options = [f"--model.policy.compile={compiled}", "--trainer.max_steps=3", f"--trainer.default_root_dir={root}"]
        main(["fit", *tiny, *options])
        logs.append(read_metrics(root / "version_0"))
        checkpoint = torch.load(root / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(checkpoint["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-5), name
    for key in ("train/loss", "train/logratios/chosen", "val/kl/rao_blackwell"):
        assert logs[1][key] == pytest.approx(logs[0][key], abs=1e-4), key


def test_without_a_compiler(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_isdpo.policy.loading.which", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(
            [
                "fit",
                *tiny,
                "--model.policy.compile=true",
                "--trainer.max_steps=1",
                f"--trainer.default_root_dir={tmp_path}",
            ]
        )
    assert end.value.code == 2
    assert "needs a C++ compiler" in capsys.readouterr().err
