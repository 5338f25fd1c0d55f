"""The plan against what PyTorch's profiler counts in a fit of the same config, and against formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lit_isdpo import cli
from lit_isdpo.commands import plan as plan_module
from lit_isdpo.commands.plan import BUCKETS, GRADIENTS, OPTIMIZER, PARAMETERS, REFERENCE, Plan
from lit_isdpo.commands.trainer import IsdpoTrainer
from lit_isdpo.lab.posts import build_tokenizer
from lit_isdpo.training.strategy import FSDP2Strategy
from tests.peak import PeakOfSteps
from tests.ranks import run_on_ranks

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that were printed."""
    plans: list[Plan] = []
    print_plan = plan_module.print_plan

    def keep(plan: Plan, *args: Any, **options: Any) -> None:
        plans.append(plan)
        print_plan(plan, *args, **options)

    monkeypatch.setattr("lit_isdpo.commands.trainer.print_plan", keep)
    return plans


def save_model(folder: Path, config: Any) -> str:
    tokenizer = build_tokenizer()
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def equal_rows(pairs_file: str, folder: Path, times: int = 1) -> list[str]:
    """Data whose first micro-batch is as long as its longest, with a prompt that is repeated."""
    row = json.loads(Path(pairs_file).read_text().splitlines()[0])
    row["prompt"] = " ".join([row["prompt"]] * times)
    (folder / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 32)
    return [f"--data.{split}={folder / 'pairs.jsonl'}" for split in ("train", "val")]


LONG = ["--data.max_length=1024", "--data.max_prompt_length=1000", "--data.micro_batch_size=2"]
"""Rows whose attention would be seen in memory, were it not fused."""
SETTINGS: dict[str, tuple[Any, list[str]]] = {
    "llama": (LlamaConfig(**LLAMA, tie_word_embeddings=False), []),
    "tied": (LlamaConfig(**LLAMA, tie_word_embeddings=True), ["--data.micro_batch_size=4"]),
    "plain": (LlamaConfig(**LLAMA), ["--model.prefix_sharing=false"]),
    "plain, long": (LlamaConfig(**LLAMA), ["--model.prefix_sharing=false", *LONG]),
    "checkpointing": (
        LlamaConfig(**LLAMA),
        ["--model.policy.gradient_checkpointing=true", "--data.micro_batch_size=4"],
    ),
    "cached": (LlamaConfig(**LLAMA), ["--model.reference.cache=true", "--data.micro_batch_size=2"]),
    "bfloat16": (LlamaConfig(**LLAMA), ["--model.policy.compute_dtype=bfloat16"]),
    "bfloat16 checkpointing": (
        LlamaConfig(**LLAMA),
        ["--model.policy.compute_dtype=bfloat16", "--model.policy.gradient_checkpointing=true"],
    ),
    "chunks": (LlamaConfig(**LLAMA), ["--model.policy.chunk_size=32", "--model.optimizer=torch.optim.SGD"]),
    "lora": (
        LlamaConfig(**LLAMA),
        ["--model.policy.peft={peft_type: LORA, r: 4, target_modules: all-linear}", "--data.micro_batch_size=4"],
    ),
    "gpt2": (GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=128), []),
    "sft": (LlamaConfig(**LLAMA), ["--model=SFTModule", "--data=SFTDataModule"]),
    "reward": (LlamaConfig(**LLAMA), ["--model=RewardModule"]),
}
QUICK = ("tied", "plain, long", "bfloat16 checkpointing", "lora")


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(*setting, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, setting in SETTINGS.items()
    ],
)
def test_the_peak_is_the_profilers(
    config: Any,
    options: list[str],
    tiny: list[str],
    pairs_file: str,
    planned: list[Plan],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """On rows that are all equally long, so that the longest micro-batch is the one that is measured."""
    folder = save_model(tmp_path / "model", config)
    kind = [option for option in options if option.startswith(("--model=", "--data="))]
    options = [option for option in options if option not in kind]
    shared = [option for option in tiny if "policy.path" not in option]
    data = equal_rows(pairs_file, tmp_path, times=40 if LONG[0] in options else 1)
    arguments = [
        *kind,
        *shared,
        *data,
        f"--model.policy.path={folder}",
        *options,
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli.main(["plan", *arguments])
    measure = PeakOfSteps()
    fit = IsdpoTrainer.fit
    monkeypatch.setattr(
        IsdpoTrainer, "fit", lambda self, *args, **kwargs: (self.callbacks.append(measure), fit(self, *args, **kwargs))
    )
    cli.main(["fit", *arguments, "--trainer.max_steps=2"])
    assert planned[0].memory.total() == pytest.approx(measure.peak, rel=0.05)


@pytest.mark.slow
def test_the_peak_of_a_rank_is_the_profilers(
    tiny: list[str], pairs_file: str, planned: list[Plan], tmp_path: Path
) -> None:
    options = ["--model.policy.gradient_checkpointing=true", "--data.micro_batch_size=2"]
    folder = save_model(tmp_path / "model", LlamaConfig(**LLAMA | {"hidden_size": 128, "num_hidden_layers": 6}))
    data = equal_rows(pairs_file, tmp_path)
    arguments = [*tiny, *data, f"--model.policy.path={folder}", *options, "--trainer.strategy=fsdp2"]
    arguments.append(f"--trainer.default_root_dir={tmp_path}")
    cli.main(["plan", *arguments, "--devices=2"])
    fit = ["fit", *arguments, "--trainer.devices=2", "--trainer.max_steps=6"]
    printed = run_on_ranks([fit], module="tests.commands.peak_ranks")
    peak = int(printed.split("PEAK ")[1].split()[0])
    assert planned[0].memory.total() == pytest.approx(peak, rel=0.1)


def test_what_is_sent_is_what_formulas_say(tiny: list[str], planned: list[Plan], tmp_path: Path) -> None:
    """A micro-batch gathers the policy twice and the reference once, and reduces the gradients."""
    folder = save_model(tmp_path / "model", LlamaConfig(**LLAMA, tie_word_embeddings=True))
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    path = f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"
    options = [*tiny, f"--model.policy.path={folder}", "--lengths=limits", "--devices=4", "--data.micro_batch_size=1"]
    cli.main(["plan", *options, "--trainer.strategy=fsdp2"])
    cli.main(["plan", *options, f"--trainer.strategy={path}", "--trainer.strategy.shard_size=2"])
    whole, copies = planned
    assert whole.micro_batches == 2
    assert whole.traffic == pytest.approx(2 * 4 * (2 + 1 + 1) * weights, rel=0.02)  # padded to the number of ranks
    assert copies.memory[PARAMETERS] == pytest.approx(2 * whole.memory[PARAMETERS], rel=0.02)
    averaged = 2 * 4 * weights / 2  # there and back, once a step, of a shard
    assert copies.traffic == pytest.approx(whole.traffic + averaged, rel=0.02)


def test_what_formulas_say(tiny: list[str], planned: list[Plan], tmp_path: Path) -> None:
    """Four bytes a weight, eight more of AdamW's state; two FLOPs a weight and token forward, four backward."""
    folder = save_model(tmp_path / "model", LlamaConfig(**LLAMA, tie_word_embeddings=True))
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    options = [*tiny, f"--model.policy.path={folder}", "--model.prefix_sharing=false", "--data.micro_batch_size=2"]
    cli.main(["plan", *options, "--lengths=limits", "--devices=2"])  # 48 tokens of prompt, 16 of each response
    (plan,) = planned
    assert (plan.rows, plan.micro_batches, plan.positions) == (2, 2, (64, 4))
    for kind, bytes_a_weight in ((PARAMETERS, 4), (REFERENCE, 4), (OPTIMIZER, 8), (GRADIENTS, 4), (BUCKETS, 4)):
        assert plan.memory[kind] == pytest.approx(bytes_a_weight * weights, rel=0.001), kind
    head = LLAMA["hidden_size"] * len(build_tokenizer())
    attention = 4 * LLAMA["num_hidden_layers"] * LLAMA["hidden_size"] * 64 * (4 * 64)  # masked positions are computed
    of_one = 2 * (weights - head) * 4 * 64 + 2 * head * 4 * 16 + attention
    norms = 2 * 7 * LLAMA["hidden_size"] * 4 * 64  # have weights, and no matrix products
    # Older releases of transformers compute the angles of RoPE, half a head's width each, by a matrix product.
    angles = 2 * (LLAMA["hidden_size"] // LLAMA["num_attention_heads"] // 2) * 64
    assert plan.forward_flops - 2 * (of_one - norms) in (0, 2 * angles)
    recomputed = 2 * head * 4 * 16 + attention / 2  # of the head's logits, and of the attention's scores
    assert plan.backward_flops == pytest.approx(2 * (of_one - norms) + recomputed, rel=1e-6)
    assert plan.flops_per_step == 2 * (plan.forward_flops + plan.backward_flops)


def test_no_weights_are_read_and_the_longest_rows_are_taken(
    tiny: list[str], model_dir: str, planned: list[Plan], tmp_path: Path, pairs_file: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(model_dir).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    rows = Path(pairs_file).read_text().splitlines()
    longest = max(rows[:20], key=len)
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows[:20], longest]))
    arguments = [
        *tiny,
        f"--model.policy.path={folder}",
        "--data.batch_size=1",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli.main(["plan", *arguments, f"--data.train={tmp_path / 'pairs.jsonl'}"])
    (tmp_path / "pairs.jsonl").write_text(longest)
    cli.main(["plan", *arguments, f"--data.train={tmp_path / 'pairs.jsonl'}", f"--data.val={pairs_file}"])
    assert planned[0] == planned[1]
    assert not list(tmp_path.glob("version_*"))


def test_buckets_hold_all_gradients_although_the_peak_is_before_these(
    tiny: list[str], planned: list[Plan], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", LlamaConfig(**LLAMA))
    options = ["--model=SFTModule", "--data=SFTDataModule", *(option for option in tiny if "probe" not in option)]
    options += [f"--model.policy.path={folder}", "--devices=2", "--data.micro_batch_size=4"]
    options += ["--model.policy.gradient_checkpointing=true"]  # a layer's activations come back among gradients
    cli.main(["plan", *options])
    assert 0 < planned[0].memory[GRADIENTS] < planned[0].memory[PARAMETERS]
    assert planned[0].memory[BUCKETS] == pytest.approx(planned[0].memory[PARAMETERS], rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices=0"], "devices must be at least 1"),
        (["--devices=3"], "data.batch_size is 8, which 3 ranks do not divide"),
        (["--lengths=data", "--data.batch_size=64"], "a micro-batch has 64 rows"),
    ],
)
def test_what_is_refused(
    options: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *tiny, f"--trainer.default_root_dir={tmp_path}", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
