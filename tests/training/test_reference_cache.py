"""A reference that is asked once: the same fit, nothing computed twice, nothing stale, and no second model."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

from lit_isdpo.cli import main
from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.evaluation import reference_logps
from lit_isdpo.evaluation.store import write_table
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ReferenceConfig
from lit_isdpo.training.preference import PreferenceModule
from tests.ranks import DDP, run_on_ranks
from tests.runs import newest_run, read_metrics

STEPS = ["--trainer.max_steps=4", "--data.batch_size=8", "--data.micro_batch_size=4"]
CACHE = ["--model.reference.cache=true"]


def fit(options: list[str], root: Path) -> Path:
    main(["fit", *options, *STEPS, f"--trainer.default_root_dir={root}"])
    return newest_run(root)


def assert_same_fit(run: Path, other: Path, *, tolerance: float) -> None:
    logged, expected = read_metrics(run), read_metrics(other)
    # At the start all margins are 0, and ties count half; where sums are rounded otherwise, chance decides them. What
    # is sampled depends on the number of ranks.
    left_out = ("train/rewards/accuracies", "val/rewards/accuracies", "val/kl", "val/response", "val/finished")
    keys = [key for key in expected if key.startswith(("train/", "val/")) and not key.startswith(left_out)]
    assert "train/loss" in keys
    for key in keys:
        values = list(logged[key].values())
        assert values == pytest.approx(list(expected[key].values()), abs=tolerance, rel=tolerance), key


def files(root: Path) -> list[Path]:
    return sorted(root.glob("reference_logps/*/*.parquet"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were computed, call by call."""
    counts: list[int] = []
    plain = reference_logps.ReferenceLogps._compute

    def counting(self: Any, rows: Any, keys: Any, todo: list[int], *others: Any) -> None:
        counts.append(len(todo))
        plain(self, rows, keys, todo, *others)

    monkeypatch.setattr(reference_logps.ReferenceLogps, "_compute", counting)
    return counts


def test_a_cached_fit_is_the_live_one_and_computes_nothing_twice(
    tiny: list[str], tmp_path: Path, computed: list[int]
) -> None:
    live = fit(tiny, tmp_path / "live")
    cached = fit([*tiny, *CACHE], tmp_path / "cached")
    assert_same_fit(cached, live, tolerance=1e-4)
    assert len(computed) == 2, "training rows and validation rows"
    fit([*tiny, *CACHE, "--model.loss.beta=0.3"], tmp_path / "cached")
    assert len(computed) == 2, "another beta, the same log-probs"


def test_no_second_model_is_held_in_training(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: weakref.WeakSet[LogProbModel] = weakref.WeakSet()
    held: list[int] = []
    make, step = LogProbModel.__init__, PreferenceModule.training_step

    def made(self: LogProbModel, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        models.add(self)

    def counting(self: PreferenceModule, batch: Any, batch_idx: int) -> Any:
        gc.collect()
        held.append(len(models))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LogProbModel, "__init__", made)
    monkeypatch.setattr(PreferenceModule, "training_step", counting)
    fit([*tiny, *CACHE], tmp_path)
    assert set(held) == {1}


def test_what_was_interrupted_goes_on(tiny: list[str], tmp_path: Path, computed: list[int]) -> None:
    whole = fit([*tiny, *CACHE], tmp_path)
    rows = list(computed)
    table = pq.read_table(files(tmp_path)[0])
    write_table(files(tmp_path)[0], table.slice(0, 3))  # a kill left three rows of it
    files(tmp_path)[1].write_bytes(b"half a file")
    again = fit([*tiny, *CACHE], tmp_path)
    assert sum(computed[2:]) == sum(rows) - 3
    assert_same_fit(again, whole, tolerance=1e-4)


def test_other_weights_have_other_files(tiny: list[str], model_dir: str, tmp_path: Path, computed: list[int]) -> None:
    other = shutil.copytree(model_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    root = tmp_path / "runs"
    fit([*tiny, *CACHE], root)
    fit([*tiny, *CACHE, f"--model.reference.path={other}"], root)
    assert len(computed) == 4
    assert len({file.parent for file in files(root)}) == 2


def test_values_that_are_not_the_references_are_found(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit([*tiny, *CACHE], tmp_path)
    for file in files(tmp_path):
        table = pq.read_table(file)
        wrong = pa.array([value - 1.0 for value in table.column("chosen_logps").to_pylist()], type=pa.float32())
        write_table(file, table.set_column(1, "chosen_logps", wrong))
    with pytest.raises(SystemExit):
        fit([*tiny, *CACHE], tmp_path)
    assert "delete that folder" in capsys.readouterr().err


def test_a_resumed_fit_reads_the_untrained_references_values(
    tiny: list[str], tmp_path: Path, computed: list[int]
) -> None:
    whole = fit([*tiny, *CACHE], tmp_path / "whole")
    root = tmp_path / "parts"
    main(["fit", *tiny, *CACHE, *STEPS, "--trainer.max_steps=2", f"--trainer.default_root_dir={root}"])
    shutil.rmtree(root / "reference_logps")  # what is built now must not be of the weights in the checkpoint
    last = root / "version_0" / "checkpoints" / "last.ckpt"
    main(["fit", *tiny, *CACHE, *STEPS, f"--trainer.default_root_dir={root}", f"--ckpt_path={last}"])
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, root / "version_1")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 4
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name


def test_one_module_is_fitted_and_tested(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    """Its second run has rows that the first had not, and its policy is not the reference any more."""
    config = ReferenceConfig(cache=True, cache_dir=str(tmp_path / "cache"))

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2)

    module = PreferenceModule(PolicyConfig(path=model_dir), reference=config, optimizer=optimizer)
    lengths = {"max_length": 64, "max_prompt_length": 48}
    data = PreferenceDataModule(train=pairs_file, test=pairs_file, val_size=8, batch_size=8, **lengths)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_steps=4, use_distributed_sampler=False, **quiet)
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    assert abs(tested["test/logratios/chosen"]) > 1e-3
    live = PreferenceModule(PolicyConfig(path=model_dir), optimizer=optimizer)
    live_trainer = Trainer(accelerator="cpu", max_steps=4, use_distributed_sampler=False, **quiet)
    live_trainer.fit(live, data)
    (expected,) = live_trainer.test(live, data, verbose=False)
    assert tested["test/logratios/chosen"] == pytest.approx(expected["test/logratios/chosen"], abs=1e-4)


@pytest.mark.slow
def test_two_ranks_share_the_work(tiny: list[str], tmp_path: Path) -> None:
    one = fit([*tiny, *CACHE], tmp_path / "one")
    run_on_ranks([["fit", *tiny, *CACHE, *STEPS, f"--trainer.default_root_dir={tmp_path / 'two'}", *DDP]])
    assert_same_fit(tmp_path / "two" / "version_0", one, tolerance=1e-4)
    assert {file.name[0] for file in files(tmp_path / "two")} == {"0", "1"}


def test_precompute_is_all_that_a_later_fit_and_test_need(tiny: list[str], tmp_path: Path, computed: list[int]) -> None:
    root = [f"--trainer.default_root_dir={tmp_path}"]
    main(["precompute", *tiny, *STEPS, *root])
    splits = len(computed)
    assert splits >= 2
    assert not list(tmp_path.glob("version_*/checkpoints")), "nothing was trained"
    fit([*tiny, *CACHE], tmp_path)
    main(["validate", *tiny, *CACHE, *root])
    assert len(computed) == splits


def test_precompute_needs_a_reference(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "precompute",
                *tiny,
                "--model.reference=null",
                "--model.loss=SimPOLoss",
                "--model.weighting=UniformWeighting",
            ]
        )
    assert "there is no reference" in capsys.readouterr().err
