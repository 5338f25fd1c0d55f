"""The posts environment as files, and the names (``lab:posts``) under which the rest of the project asks for them.

    ROOT/posts-SEED-HASH/
        pairs/      train, validation and test .jsonl of preference pairs, and environment.json, which tells of them
        sft/        train and validation .jsonl of demonstrations, and the like marker
        reference/  the model that wrote the pairs: a Hugging Face folder, shipped with the package
        init/       its architecture and tokenizer without weights, to train it anew

Each part is written when it is first asked for. HASH covers the reference and :data:`FORMAT`, so files of another
version are never taken for these.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from lit_isdpo.lab.pairs import sample_pairs
from lit_isdpo.lab.posts import GoldReward, Split, render_prompt, sample_demonstration, sample_post
from lit_isdpo.lab.tokenizer import MAX_LENGTH, build_tokenizer
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.types import InputError

Part = Literal["pairs", "sft", "reference", "init"]

PREFIX = "lab:"
FORMAT = 1  # to be raised with every change of the files' content
REFERENCE = Path(__file__).parent / "posts_reference"
MARKER = "environment.json"
NUM_PROMPTS: Mapping[Split, int] = {"train": 1024, "validation": 512, "test": 512}
NUM_DEMONSTRATIONS = 48_000
NUM_VALIDATION_DEMONSTRATIONS = 1024


def resolve(source: str, root: Path, *, default: Part = "pairs") -> Path:
    """Turns a name of the lab into a folder, which is written if it is not there yet.

    Args:
        source: ``lab:posts``, ``lab:posts/PART``, each with ``@SEED`` behind it for a seed other than 0. The parts are
            the folders of this module's text.
        root: where the environments are kept.
        default: what ``lab:posts`` without a part means: pairs to a data set, the reference to a model path.

    Raises:
        InputError: the lab has nothing of that name.
    """
    match = re.fullmatch(r"lab:posts(?:/(pairs|sft|reference|init))?(?:@(\d{1,9}))?", source)
    if match is None:
        raise InputError(
            f"the lab has no {source!r}; it has lab:posts/pairs, lab:posts/sft, lab:posts/reference, lab:posts/init, "
            "and each of them with a seed, as in lab:posts/pairs@1."
        )
    part, seed = match[1] or default, int(match[2] or 0)
    writers: dict[str, Callable[[Path], None]] = {
        "pairs": lambda folder: write_pairs(folder, seed),
        "sft": lambda folder: write_sft(folder, seed),
        "reference": write_reference,
        "init": write_init,
    }
    return _write_once(root / f"posts-{seed}-{_content_hash()}" / part, writers[part])


def gold_reward_for(folder: Path) -> GoldReward | None:
    """The gold reward that belongs to a data folder, or ``None`` if it is not one of the lab's."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return GoldReward() if isinstance(marker, dict) and marker.get("design") == "posts" else None


def write_pairs(folder: Path, seed: int, *, num_prompts: Mapping[Split, int] = NUM_PROMPTS) -> None:
    """Samples pairs from the shipped reference, one file a split, and counts in the marker what was left out.

    Args:
        folder: an existing folder.
        seed: the pairs are a function of it.
        num_prompts: posts a split; see :func:`lit_isdpo.lab.pairs.sample_pairs`.
    """
    model = load_causal_lm(PolicyConfig(path=str(REFERENCE)))
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    counts = {}
    with _one_thread():
        for split, number in num_prompts.items():
            rows, counts[split] = sample_pairs(model, tokenizer, split=split, num_prompts=number, seed=seed)
            _write_lines(folder / f"{split}.jsonl", rows)
    marker = {"design": "posts", "format": FORMAT, "seed": seed, "counts": counts}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def write_sft(folder: Path, seed: int, num: int = NUM_DEMONSTRATIONS) -> None:
    """Writes ``num`` demonstrations for training, and :data:`NUM_VALIDATION_DEMONSTRATIONS` more, into ``folder``."""
    numbers: dict[Split, int] = {"train": num, "validation": NUM_VALIDATION_DEMONSTRATIONS}
    for split, number in numbers.items():
        rng = Random(f"posts/sft/{split}/{seed}")
        posts = (sample_post(rng, split) for _ in range(number))
        rows = ({"prompt": render_prompt(post), "completion": sample_demonstration(rng, post)} for post in posts)
        _write_lines(folder / f"{split}.jsonl", rows)
    (folder / MARKER).write_text(json.dumps({"design": "posts", "format": FORMAT, "seed": seed}, indent=2) + "\n")


def write_reference(folder: Path) -> None:
    """Copies the shipped reference into ``folder``."""
    shutil.copytree(REFERENCE, folder, dirs_exist_ok=True)


def write_init(folder: Path) -> None:
    """Writes the reference's architecture and tokenizer into ``folder``, without weights."""
    config = reference_config()
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def reference_config() -> LlamaConfig:
    """The architecture of the reference: a Llama of 0.4 million parameters."""
    tokenizer = build_tokenizer()
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        # 1 / sqrt(hidden_size); from the usual 0.02 it learns to copy facts late or, in 3,000 steps, not at all.
        initializer_range=0.1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        dtype="float32",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny matrices are quicker on one thread, and their sums do not depend on how many cores there are."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _content_hash() -> str:
    digest = sha256(f"format {FORMAT}".encode())
    for file in sorted(REFERENCE.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Writes a folder under another name and renames it, so that nobody ever sees half of it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            work = Path(temporary) / folder.name
            work.mkdir()
            write(work)
            try:
                work.rename(folder)
            except OSError:  # another process, a rank of the same run say, was faster; it wrote the same
                if not folder.exists():
                    raise
    return folder


def _write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
