"""Two ranks that sample for themselves: other responses on each, and one policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import DDP, run_on_ranks
from tests.runs import newest_run, read_metrics
from tests.training.test_online import REWARD

STRATEGIES = {"ddp": DDP, "fsdp2": ["--trainer.strategy=fsdp2", "--trainer.devices=2"]}
METHODS = {
    "rloo": ["--model=OnlineModule", REWARD, "--model.objective.beta=0.1", "--model.rollout.max_new_tokens=24"],
    "hypo": [
        *("--model=PreferenceModule", "--model.weighting=UniformWeighting"),
        *("--model.on_policy_kl.weight=0.1", "--model.on_policy_kl.max_new_tokens=24"),
    ],
}
NUM_STEPS = 2


@pytest.fixture(scope="module")
def ending_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, which ends now and then, so that ranks are done at different times."""
    folder = tmp_path_factory.mktemp("ending")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.get_output_embeddings().weight[model.config.eos_token_id] *= 60
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tiny: list[str], ending_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each method under each strategy, and how one that stopped after its first step went on."""
    root = tmp_path_factory.mktemp("online_ranks")
    commands: list[list[Any]] = []
    for method, options in METHODS.items():
        for name, strategy in STRATEGIES.items():
            fit = [
                "fit",
                *options,
                *tiny,
                f"--model.policy.path={ending_dir}",
                "--probe.num_prompts=2",
                "--data.micro_batch_size=2",
                *strategy,
            ]
            straight, parts = root / method / name / "straight", root / method / name / "parts"
            steps = f"--trainer.max_steps={NUM_STEPS}"
            commands.append([straight, *fit, steps, f"--trainer.default_root_dir={straight}"])
            commands.append([parts / "stopped", *fit, "--trainer.max_steps=1", f"--trainer.default_root_dir={parts}"])
            last = parts / "version_0" / "checkpoints" / "last.ckpt"
            more = [steps, f"--ckpt_path={last}", f"--trainer.default_root_dir={parts}"]
            commands.append([parts / "resumed", *fit, *more])
    run_on_ranks(commands, module="tests.training.online_ranks", timeout=600)
    return root


def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


EACH = pytest.mark.parametrize(("method", "strategy"), [(m, s) for m in METHODS for s in STRATEGIES])


@pytest.mark.slow
@EACH
def test_ranks_sample_apart_and_end_alike(method: str, strategy: str, root: Path) -> None:
    """Two steps of two micro-batches of two prompts on each rank, two responses to each."""
    one, other = ranks(root / method / strategy / "straight")
    assert one["step"] == other["step"] == NUM_STEPS
    assert one["is_sharded"] == other["is_sharded"] == (strategy == "fsdp2")
    torch.testing.assert_close(one["weights"], other["weights"], atol=0, rtol=0)
    for rank in (one, other):
        assert [len(drawn) for drawn in rank["sampled"]] == [4] * 2 * NUM_STEPS
    for mine, theirs in zip(one["sampled"], other["sampled"], strict=True):
        assert not any(response in theirs for response in mine if len(response) > 2)
    lengths = [[max(map(len, drawn)) for drawn in rank["sampled"]] for rank in (one, other)]
    assert lengths[0] != lengths[1], "no rank waits for the other"
    for mine, theirs in zip(one["prompts"], other["prompts"], strict=True):
        assert not any(prompt in theirs for prompt in mine)
    logged = read_metrics(newest_run(root / method / strategy / "straight"))
    assert logged["train/kl/k1"][0] == pytest.approx(0, abs=1e-5)
    assert logged["train/kl/k1"][1] != 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_parts_takes_the_steps_of_a_whole_one(method: str, root: Path) -> None:
    """Ranks that hold all the weights draw the same responses, so that weights and values are equal to rounding."""
    (whole, _), (parts, _) = (ranks(root / method / strategy / "straight") for strategy in STRATEGIES)
    assert parts["sampled"] == whole["sampled"]
    assert parts["prompts"] == whole["prompts"]
    torch.testing.assert_close(parts["weights"], whole["weights"], atol=1e-5, rtol=0)
    logged, expected = (read_metrics(newest_run(root / method / name / "straight")) for name in ("fsdp2", "ddp"))
    for key in ("train/loss", "train/kl/k1", "train/grad_norm", "val/loss"):
        assert logged[key] == pytest.approx(expected[key], abs=1e-5), key


@pytest.mark.slow
@EACH
def test_a_resumed_fit_draws_what_an_unbroken_one_would(method: str, strategy: str, root: Path) -> None:
    straight, resumed = (ranks(root / method / strategy / name) for name in ("straight", "parts/resumed"))
    for ours, expected in zip(resumed, straight, strict=True):
        assert ours["sampled"] == expected["sampled"][2:]
        torch.testing.assert_close(ours["weights"], expected["weights"], atol=0, rtol=0)
