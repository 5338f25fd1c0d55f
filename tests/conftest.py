"""What tests share: tiny models and data, and a single-threaded process."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_isdpo.lab.posts import build_tokenizer, render_facts, render_prompt, sample_demonstration, sample_post
from lit_isdpo.objective.logprobs import PairLogps

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give

# Property tests draw the same few cases in every run; `pytest --hypothesis-profile=fuzz` goes on looking for others.
settings.register_profile("quick", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=2000, derandomize=False, deadline=None)
settings.load_profile("quick")


LONGEST = ("test_readme.py", "test_notebooks.py", "test_sharded.py", "test_plan.py", "test_over_optimization.py")
LONGEST += ("test_gpu.py", "test_reward.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes begin, the longest first, so that no core waits for them at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def ctrl_c_works() -> Iterator[None]:
    """Whatever a test has run, Ctrl-C stops the process again; in the background a shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert callable(handler)
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A random Llama with a vocabulary of 50."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder: a tiny random Llama with the lab's tokenizer."""
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path) -> str:
    """Writes that."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 preference pairs as JSON lines, readable by the tiny model's tokenizer."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    return write_pairs(file)


def write_pairs(file: Path, number: int = 40) -> str:
    """Preference pairs in the words of the lab's posts, the same on every machine."""
    rng = Random(0)
    rows = []
    for _ in range(number):
        post = sample_post(rng, "train")
        rejected = render_facts(rng.sample(list(post.items()), 2)) + " awful"
        rows.append({"prompt": render_prompt(post), "chosen": sample_demonstration(rng, post), "rejected": rejected})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def tiny(model_dir: str, pairs_file: str) -> list[str]:
    """Arguments of a fit that takes a second: 32 pairs of training, 4 optimizer steps an epoch."""
    return tiny_options(model_dir, pairs_file)


def tiny_options(model_dir: str, pairs_file: str) -> list[str]:
    """Likewise, of a model and data that are there."""
    return [
        f"--model.policy.path={model_dir}",
        f"--data.train={pairs_file}",
        "--data.val_size=8",
        "--data.batch_size=8",
        "--data.max_length=64",
        "--data.max_prompt_length=48",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=1e-3",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
        "--probe.num_prompts=4",
        "--probe.max_new_tokens=4",
    ]


def pair_logps(
    chosen: Tensor,
    rejected: Tensor,
    *,
    ref: tuple[float, float] = (0.0, 0.0),
    mu: tuple[float, float] | None = None,
    num_tokens: tuple[int, int] = (1, 1),
    margin: float = 0.0,
    alignment: tuple[float, float] = (0.0, 0.0),
) -> PairLogps:
    """Pairs with the policy's log-probs, and the same of everything else for each; mu is the reference by default."""
    behavior = ref if mu is None else mu
    full = torch.ones_like(chosen)
    others = [value * full for value in (*ref, *behavior, *num_tokens, margin, *alignment)]
    return PairLogps(chosen, rejected, *others)
