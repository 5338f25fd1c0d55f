"""One optimizer step of ours and one of TRL's ``DPOTrainer`` from the same weights and pairs (extra ``bench``).

The policy is not the reference, so that the losses are not at their closed forms. Compared are what both log
(log-probs, rewards, loss) and what the step did to each weight: with plain SGD that is the gradient. Neither clips.

Where TRL means something else by a name, the nearest thing is compared:

- ``ipo`` is the loss of mean log-ratios of a token: our ``logratio: mean``.
- ``use_weighting`` (WPO) has no cap at 1; here no pair would reach it. Its rewards and ours know no weights.
- ``sft`` is the mean over the chosen tokens of a micro-batch, ours the mean over pairs of each response's own: the same
  where a micro-batch is one pair.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_isdpo.cli import main
from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.encoding import load_tokenizer
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import load_logprob_model
from lit_isdpo.types import TokenizedPair
from tests.runs import newest_run, read_metrics
from tests.tools.benchmarks.workload import ModelSize, Shape, Workload, make_workload

BATCH_SIZE = 4
SIZE = ModelSize(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, vocabulary=500)
SGD = {"optim": "sgd", "learning_rate": 0.1}
METHODS: dict[str, tuple[list[str], dict[str, Any]]] = {
    # ours, TRL's
    "dpo": (["DPOLoss"], {"loss_type": ["sigmoid"], "beta": 0.1, **SGD}),
    "ipo": (["IPOLoss", "--model.loss.logratio=mean"], {"loss_type": ["ipo"], "beta": 0.1, **SGD}),
    "slic": (["SLiCLoss"], {"loss_type": ["hinge"], "beta": 0.1, **SGD}),
    "robust": (
        ["RobustDPOLoss", "--model.loss.label_smoothing=0.2"],
        {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.2, **SGD},
    ),
    "wpo": (
        ["DPOLoss", "--model.weighting=WPOWeighting"],
        {"loss_type": ["sigmoid"], "beta": 0.1, "use_weighting": True, **SGD, "learning_rate": 100.0},  # w ~ 1e-3
    ),
    "irpo": (
        ["IRPOLoss", "--model.loss.alpha=0.7"],
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1, **SGD},
    ),
    "dpo_adamw": (
        ["DPOLoss", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.eps=1e-3"],
        {
            **{"loss_type": ["sigmoid"], "beta": 0.1, "optim": "adamw_torch", "learning_rate": 1e-3},
            **{"adam_epsilon": 1e-3, "weight_decay": 0.0, "precompute_ref_log_probs": True},
        },
    ),
}
MICRO = {name: 1 if name == "irpo" else 2 for name in METHODS}


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """Pairs of words drawn at random, a policy with opinions about them, and a reference some nats away from it."""
    folder = tmp_path_factory.mktemp("workload")
    workload = make_workload(folder, Shape(20, 12), SIZE, num_pairs=BATCH_SIZE, batch_size=BATCH_SIZE)
    model = AutoModelForCausalLM.from_pretrained(workload.model)
    torch.manual_seed(1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(
            8
        )  # tied: logits 8 times as far apart, so that no pair reaches WPO's cap
        model.save_pretrained(workload.model)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "reference")
    return workload


@pytest.fixture(scope="module")
def theirs(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What TRL logged of each method's step, and the folder with the weights after it."""
    if not find_spec("trl"):
        pytest.skip("TRL is not installed: pip install -e '.[bench]'")
    output = tmp_path_factory.mktemp("trl")
    job = {
        "methods": {
            name: {**options, "per_device_train_batch_size": MICRO[name]} for name, (_, options) in METHODS.items()
        },
        "model": workload.model,
        "reference": str(Path(workload.model).with_name("reference")),
        "pairs": workload.ordered,
        "max_length": workload.max_length,
        "batch_size": BATCH_SIZE,
        "output": str(output),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.trl_steps", json.dumps(job)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), output


def take_step(name: str, workload: Workload, root: Path) -> Path:
    """Ours; the run."""
    loss, *options = METHODS[name][0]
    rate = METHODS[name][1]["learning_rate"]
    weighting = [] if any("weighting" in option for option in options) else ["--model.weighting=UniformWeighting"]
    optimizer = [] if any("optimizer" in option for option in options) else ["--model.optimizer=torch.optim.SGD"]
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": root,
        "model.policy.path": workload.model,
        "model.reference.path": Path(workload.model).with_name("reference"),
        "model.optimizer.lr": rate,
        "model.optimizer.weight_decay": 0.0,
        "data.train": workload.pairs,
        "data.val": workload.validation,
        "data.batch_size": BATCH_SIZE,
        "data.micro_batch_size": MICRO[name],
        "data.max_length": workload.max_length,
        "data.max_prompt_length": workload.max_length - 1,
        "probe.num_prompts": 0,
        "checkpoint.monitor": "null",
    }
    options = [*weighting, *optimizer, f"--model.loss={loss}", "--model.loss.beta=0.1", *options]
    main(["fit", *options, *(f"--{key}={value}" for key, value in settings.items())])
    return newest_run(root)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_one_step(name: str, workload: Workload, theirs: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    logged, output = theirs
    run = take_step(name, workload, tmp_path)
    ours = {key: values[max(values)] for key, values in read_metrics(run).items()}
    keys = ["loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies"]
    if name == "ipo":  # our reward is that of the loss, of mean log-ratios; theirs that of sums
        keys = keys[:3]
    assert {key: ours[f"train/{key}"] for key in keys} == pytest.approx(
        {key: logged[name][key] for key in keys}, rel=1e-5, abs=2e-6
    )
    assert ours["train/weights/clip_fraction"] == 0
    assert abs(ours["train/logratios/chosen"]) > 0.5, "the policy is not its reference"

    before = load_file(f"{workload.model}/model.safetensors")
    after = load_file(output / name / "model.safetensors")
    own = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(before) <= {key.removeprefix("policy.model.") for key in own}
    for key, start in before.items():
        step, their_step = own[f"policy.model.{key}"] - start, after[key] - start
        largest = their_step.abs().max().item()
        assert largest > 1e-5, key
        # of the tensor's largest change: fp32 stores a weight to 1e-8, and sums in another order
        torch.testing.assert_close(step, their_step, rtol=0, atol=1e-4 * largest + 1e-8, msg=key)


@pytest.mark.slow
def test_log_probs_of_each_response(workload: Workload, theirs: tuple[dict[str, Any], Path]) -> None:
    """The reference's, pair by pair: TRL keeps them as columns of its data."""
    tokenizer = load_tokenizer(workload.model)
    rows = [json.loads(line) for line in Path(workload.ordered).read_text().splitlines()]
    prompts, chosen, rejected = (
        [tokenizer(row[key]).input_ids for row in rows] for key in ("prompt", "chosen", "rejected")
    )
    end = [tokenizer.eos_token_id]
    pairs = [TokenizedPair(x, w + end, l + end) for x, w, l in zip(prompts, chosen, rejected, strict=True)]  # noqa: E741
    model = load_logprob_model(PolicyConfig(path=str(Path(workload.model).with_name("reference"))))
    logps = model(collate_pairs(pairs, list(range(len(pairs))), pad_token_id=0).tokens).logps.detach()
    logged = theirs[0]["dpo_adamw"]
    assert logps.tolist() == pytest.approx([*logged["ref_chosen_logps"], *logged["ref_rejected_logps"]], rel=1e-6)
