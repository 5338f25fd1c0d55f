"""Two ranks with a part of the model each are one process: values, checkpoints, resume, export."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.training.checkpoint_files import StoredCheckpoint
from lit_isdpo.training.models import WEIGHTS_PREFIX
from lit_isdpo.training.strategy import FSDP2Strategy
from tests.kept import KEPT, keeping
from tests.ranks import DDP, run_on_ranks
from tests.runs import newest_run, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # dcp_to_torch_save's
NUM_STEPS = 6  # of 4 to an epoch
SHARDED = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]
EXACT = ("state_dict", "optimizer_0")  # of a sharded checkpoint
TRAINED = ("train/loss", "train/grad_norm", "train/weights/mean", "train/logratios/chosen", "train/rewards/margins")


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def kept(variant: Path) -> Path:
    return variant / "straight" / "version_0" / "checkpoints" / KEPT


def tensors(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A sharded checkpoint's tensors, as one dictionary."""
    file = tmp_path / "whole.pt"
    dcp_to_torch_save(folder, file)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def weights(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Of the exported policy."""
    folder = tmp_path / f"exported_{run.parent.name}_{run.name}"
    main(["export", f"--ckpt_path={last(run)}", f"--output_dir={folder}"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def assert_same_values(run: Path, other: Path) -> None:
    """What was logged of each optimizer step, and of validations."""
    values, expected = read_metrics(run), read_metrics(other)
    for key in TRAINED + tuple(key.replace("train", "val") for key in TRAINED if "grad" not in key):
        assert values[key] == pytest.approx(expected[key], abs=1e-5), key


def assert_identical(some: Any, other: Any, name: str = "") -> None:
    """To the bit, whatever is in a checkpoint."""
    if isinstance(other, torch.Tensor):
        torch.testing.assert_close(some, other, atol=0, rtol=0, msg=name)
    elif isinstance(other, dict):
        assert some.keys() == other.keys(), name
        for key, value in other.items():
            assert_identical(some[key], value, f"{name}.{key}")
    elif isinstance(other, list | tuple):
        assert len(some) == len(other), name
        for number, value in enumerate(other):
            assert_identical(some[number], value, f"{name}[{number}]")
    else:
        assert some == other, name


def assert_close(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, value in some.items():
        torch.testing.assert_close(value, others[name], atol=1e-5, rtol=0, msg=name)


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    some = ["--model.schedule.warmup_steps=5", "--data.micro_batch_size=2", "--trainer.gradient_clip_val=1.0"]
    return [*tiny, *some, "--model.optimizer.weight_decay=0"]  # one group of parameters


@pytest.fixture(scope="module")
def root(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks: an unbroken fit, one that stopped at step 3, and how it went on."""
    root = tmp_path_factory.mktemp("sharded")
    fit = ["fit", *options, *SHARDED, "--probe.num_prompts=2"]
    run_on_ranks(
        [
            [*fit, f"--trainer.max_steps={NUM_STEPS}", f"--trainer.default_root_dir={root / 'straight'}"],
            [*fit, "--trainer.max_steps=3", f"--trainer.default_root_dir={root / 'stopped'}"],
            [
                *fit,
                f"--trainer.max_steps={NUM_STEPS}",
                f"--trainer.default_root_dir={root / 'resumed'}",
                f"--ckpt_path={last(root / 'stopped' / 'version_0')}",
            ],
        ]
    )
    return root


def test_two_sharded_ranks_are_one_process(root: Path, options: list[str], tmp_path: Path) -> None:
    """The same global batch in other shares; the first step is exactly at the reference."""
    sharded = newest_run(root / "straight")
    main(["fit", *options, f"--trainer.max_steps={NUM_STEPS}", f"--trainer.default_root_dir={tmp_path / 'one'}"])
    one = newest_run(tmp_path / "one")
    assert_same_values(sharded, one)
    assert read_metrics(sharded)["train/logratios/chosen"][0] == 0
    assert_close(weights(sharded, tmp_path), weights(one, tmp_path))


def test_two_sharded_ranks_resume_bit_for_bit(root: Path, tmp_path: Path) -> None:
    straight, resumed = newest_run(root / "straight"), newest_run(root / "resumed")
    ours, expected = tensors(last(resumed), tmp_path), tensors(last(straight), tmp_path)
    for key in EXACT:
        assert_identical(ours[key], expected[key], key)
    values, unbroken = read_metrics(resumed), read_metrics(straight)
    for key in unbroken:
        if key.startswith("train/"):
            assert values[key] == {step: value for step, value in unbroken[key].items() if step >= 3}, key
    assert all(name.startswith(WEIGHTS_PREFIX) for name in expected["state_dict"]), "the policy alone"


LORA = "{peft_type: LORA, r: 4, lora_alpha: 8, target_modules: all-linear}"
STRATEGY = f"--trainer.strategy={FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"
COPIES = [STRATEGY, "--trainer.strategy.shard_size=1", "--trainer.devices=2"]
ONE_FILE = [STRATEGY, "--trainer.strategy.save_distributed_checkpoint=false", "--trainer.devices=2"]
DECAY = "--model.optimizer.weight_decay=0.1"
VARIANTS: dict[str, list[str]] = {
    "untied": [*SHARDED, "--model.policy.path=UNTIED", "--data.num_workers=2"],
    "lora": [*SHARDED, f"--model.policy.peft={LORA}"],
    "lora on bfloat16": [
        *SHARDED,
        f"--model.policy.peft={LORA}",
        "--model.policy.dtype=bfloat16",
        "--model.policy.compute_dtype=bfloat16",
    ],
    "cached": [*SHARDED, "--model.reference.cache=true", "--data.length_window=2", "--checkpoint.monitor=val/loss"],
    "bfloat16": [*SHARDED, "--model.policy.compute_dtype=bfloat16", "--model.policy.gradient_checkpointing=true"],
    "copies": [*COPIES, "--data.micro_batch_size=1"],
    "offloaded": [STRATEGY, "--trainer.strategy.cpu_offload=true", "--trainer.devices=2"],
    "one file": ONE_FILE,
    "decayed": [*SHARDED, DECAY],
    "decayed in one file": [*ONE_FILE, DECAY],
    "ddp": DDP,
}
RESUMED_SLOWER = {"untied": SHARDED, "one file": ONE_FILE, "ddp": DDP}
EPOCH_1 = 5  # where the fits of the variants are cut


def end_of(run: Path, tmp_path: Path) -> dict[str, Any]:
    """Tensors of the last checkpoint, of either kind."""
    if last(run).is_dir():
        whole = tensors(last(run), tmp_path)
        return {key: whole[key] for key in EXACT}
    state = torch.load(last(run), weights_only=True)
    return {key: state[key] for key in ("state_dict", "optimizer_states")}


@pytest.fixture(scope="module")
def untied_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(model_dir, tie_word_embeddings=False)
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def variants(
    options: list[str], root: Path, untied_dir: str, pairs_file: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of each variant an unbroken fit, and how one went on that was killed in epoch 1; and changes of the ranks."""
    variants = tmp_path_factory.mktemp("variants")
    commands, quiet = [], [*options, "--probe.num_prompts=0"]
    for name, given in VARIANTS.items():
        more = [option.replace("UNTIED", untied_dir) for option in given]
        fit = ["fit", *quiet, *more, f"--trainer.max_steps={NUM_STEPS}", "--trainer.default_root_dir"]
        commands.append([*fit, variants / name / "straight", *keeping(EPOCH_1)])
        commands.append([*fit, variants / name / "resumed", f"--ckpt_path={kept(variants / name)}"])
    for name in RESUMED_SLOWER:
        more = [option.replace("UNTIED", untied_dir) for option in VARIANTS[name]]
        slower = [DECAY, "--model.optimizer.lr=1e-9", f"--ckpt_path={kept(variants / name)}"]
        target = f"--trainer.default_root_dir={variants / name / 'slower'}"
        commands.append(["fit", *quiet, *more, *slower, f"--trainer.max_steps={NUM_STEPS}", target])
    plain, decayed, one_rank = variants / "plain", variants / "decayed plain", variants / "one rank"
    main(["fit", *quiet, "--trainer.max_steps=3", f"--trainer.default_root_dir={plain / 'stopped'}"])
    main(["fit", *quiet, DECAY, "--trainer.max_steps=3", f"--trainer.default_root_dir={decayed / 'stopped'}"])
    on = ["--trainer.strategy=fsdp2", "--trainer.devices=1"]
    run_on_ranks(
        [
            ["fit", *quiet, *on, "--trainer.max_steps=3", f"--trainer.default_root_dir={one_rank / 'stopped'}"],
            [
                *("fit", *quiet, *on, f"--trainer.max_steps={NUM_STEPS}"),
                f"--ckpt_path={last(root / 'stopped' / 'version_0')}",
                f"--trainer.default_root_dir={variants / 'two to one'}",
            ],
        ],
        size=1,
    )
    for name, start in (("one to two", one_rank), ("plain to two", plain)):
        ckpt_path = f"--ckpt_path={last(start / 'stopped' / 'version_0')}"
        target = f"--trainer.default_root_dir={variants / name}"
        commands.append(["fit", *quiet, *SHARDED, f"--trainer.max_steps={NUM_STEPS}", ckpt_path, target])
    ckpt_path = f"--ckpt_path={last(decayed / 'stopped' / 'version_0')}"
    target = f"--trainer.default_root_dir={variants / 'decayed plain to two'}"
    commands.append(["fit", *quiet, DECAY, *SHARDED, f"--trainer.max_steps={NUM_STEPS}", ckpt_path, target])
    evaluate = [*quiet, *SHARDED, f"--ckpt_path={last(root / 'straight' / 'version_0')}"]
    commands.append(["validate", *evaluate, f"--trainer.default_root_dir={variants / 'validate'}"])
    no_samples = ["--evaluation.num_prompts=0", f"--data.test={pairs_file}"]
    commands.append(["test", *evaluate, *no_samples, f"--trainer.default_root_dir={variants / 'test'}"])
    sft = ["--model=SFTModule", "--data=SFTDataModule", *quiet, *SHARDED]
    commands.append(["fit", *sft, "--trainer.max_steps=2", f"--trainer.default_root_dir={variants / 'sft'}"])
    run_on_ranks(commands, timeout=600)
    return variants


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_bit_for_bit(name: str, variants: Path, tmp_path: Path) -> None:
    straight, resumed = (newest_run(variants / name / part) for part in ("straight", "resumed"))
    ours, expected = end_of(resumed, tmp_path), end_of(straight, tmp_path)
    assert_identical(ours, expected)
    values, unbroken = read_metrics(resumed), read_metrics(straight)
    for key in TRAINED:
        assert values[key] == {step: value for step, value in unbroken[key].items() if step >= EPOCH_1}, key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("ddp", "cached")])
def test_every_variant_is_one_process(
    name: str, variants: Path, options: list[str], untied_dir: str, tmp_path: Path
) -> None:
    own = [option.replace("UNTIED", untied_dir) for option in VARIANTS[name] if not option.startswith("--trainer")]
    steps = [f"--trainer.max_steps={NUM_STEPS}", "--probe.num_prompts=0"]
    main(["fit", *options, *own, *steps, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    sharded, one = newest_run(variants / name / "straight"), newest_run(tmp_path / "one")
    if "bfloat16" in name:  # where sums are rounded otherwise, at 8 bits
        values, expected = (list(read_metrics(run)["train/loss"].values()) for run in (sharded, one))
        assert values == pytest.approx(expected, abs=2e-3)
        assert read_metrics(sharded)["train/logratios/chosen"][0] == 0
        return
    assert_same_values(sharded, one)
    assert_close(weights(sharded, tmp_path), weights(one, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two to one", "one to two", "plain to two"])
def test_a_checkpoint_goes_on_with_other_ranks(name: str, variants: Path, root: Path, tmp_path: Path) -> None:
    resumed, straight = newest_run(variants / name), newest_run(root / "straight")
    values, unbroken = read_metrics(resumed), read_metrics(straight)
    for key in TRAINED:
        expected = {step: value for step, value in unbroken[key].items() if step >= 3}
        assert values[key] == pytest.approx(expected, abs=1e-5), key
    assert_close(weights(resumed, tmp_path), weights(straight, tmp_path))


@pytest.mark.slow
def test_a_checkpoint_with_groups_goes_on_with_ranks(variants: Path, tmp_path: Path) -> None:
    """One process had two groups of parameters, which a file numbers; so have two ranks, which have names."""
    run, straight = newest_run(variants / "decayed plain to two"), newest_run(variants / "decayed" / "straight")
    assert_close(weights(run, tmp_path), weights(straight, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED_SLOWER)
def test_ranks_that_go_on_follow_their_config(name: str, variants: Path, tmp_path: Path) -> None:
    """Another learning rate, and weight decay, by which there are two groups instead of one."""
    run = newest_run(variants / name / "slower")
    assert read_metrics(run)["train/lr"] == pytest.approx({EPOCH_1: 1e-9})
    before = StoredCheckpoint(kept(variants / name)).read(WEIGHTS_PREFIX)
    assert_close(StoredCheckpoint(last(run)).read(WEIGHTS_PREFIX), before)


@pytest.mark.slow
def test_one_file_goes_on_without_ranks(variants: Path, options: list[str], tmp_path: Path) -> None:
    straight = newest_run(variants / "one file" / "straight")
    steps = [f"--trainer.max_steps={NUM_STEPS}", "--probe.num_prompts=0", f"--ckpt_path={kept(variants / 'one file')}"]
    main(["fit", *options, *steps, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    assert_close(weights(newest_run(tmp_path / "one"), tmp_path), weights(straight, tmp_path))


@pytest.mark.slow
def test_checkpoints_hold_what_they_should(variants: Path, tmp_path: Path) -> None:
    adapter = end_of(newest_run(variants / "lora" / "straight"), tmp_path)["state_dict"]
    assert adapter
    assert all("lora_" in name for name in adapter)
    whole = torch.load(last(newest_run(variants / "one file" / "straight")), weights_only=True)
    assert all(name.startswith(WEIGHTS_PREFIX) for name in whole["state_dict"])
    main(
        [
            "export",
            f"--ckpt_path={last(newest_run(variants / 'lora' / 'straight'))}",
            "--as_adapter=true",
            f"--output_dir={tmp_path / 'adapter'}",
        ]
    )
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    best = sorted(newest_run(variants / "cached" / "straight").glob("checkpoints/best-*.ckpt"))
    assert len(best) == 1
    assert StoredCheckpoint(best[0]).under(WEIGHTS_PREFIX)
    folder = last(newest_run(variants / "lora" / "straight"))
    assert folder.is_symlink()
    assert [path.name[:6] for path in folder.parent.glob("last-*")] == ["last-6"]


@pytest.mark.slow
def test_validation_is_one_process(variants: Path, options: list[str], root: Path, tmp_path: Path) -> None:
    """What the fit logged at its end, the verb finds again."""
    validated, fitted = read_metrics(newest_run(variants / "validate")), read_metrics(newest_run(root / "straight"))
    assert [*validated["val/loss"].values()] == pytest.approx([fitted["val/loss"][NUM_STEPS]], abs=1e-6)
    assert read_metrics(newest_run(variants / "test"))["test/loss"]


@pytest.mark.slow
def test_demonstrations_are_learned_in_parts_too(variants: Path, options: list[str], tmp_path: Path) -> None:
    sft = ["--model=SFTModule", "--data=SFTDataModule", *options, "--probe.num_prompts=0"]
    main(["fit", *sft, "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}"])
    values, expected = (read_metrics(newest_run(root))["train/loss"] for root in (variants / "sft", tmp_path))
    assert values == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_one_rank_that_must_leave_stops_all(options: list[str], tmp_path: Path) -> None:
    """As a scheduler does that asks the first process alone: all ranks save at one step, and exit to be requeued."""
    command = [sys.executable, "-m", "lit_isdpo", "fit", *options, "--trainer.devices=2", "--probe.num_prompts=0"]
    command += ["--trainer.strategy=fsdp2", "--trainer.max_epochs=1000", f"--trainer.default_root_dir={tmp_path}"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT
        )
        metrics, deadline = tmp_path / "version_0" / "metrics.csv", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, (tmp_path / "output").read_text()
    assert "Traceback" not in (tmp_path / "output").read_text()
    run = newest_run(tmp_path)
    stopped = StoredCheckpoint(last(run)).extras["global_step"]
    more = [f"--trainer.max_steps={stopped + 1}", *SHARDED]
    target = [f"--ckpt_path={last(run)}", f"--trainer.default_root_dir={tmp_path / 'resumed'}"]
    printed = run_on_ranks([["fit", *options, *more, "--probe.num_prompts=0", *target]])
    assert f"trainer.max_steps: -1 -> {stopped + 1}" in printed
    assert StoredCheckpoint(last(newest_run(tmp_path / "resumed"))).extras["global_step"] == stopped + 1
