"""What every contender trains on: a model with random weights, a tokenizer, and pairs in the order of training.

The lengths of the shapes are log-normal around the means that the data sets have with a Llama tokenizer. Their words
are drawn at random, a token each, so that both sides read the same tokens. Of a file, the pairs are read as training
would read them, and a BPE is trained on their text.
"""

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.examples import detect_format, to_pairs
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.sampling import TrainingOrder
from lit_isdpo.data.tokenization import transcript
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.training.throughput import count_work, forward_flops
from lit_isdpo.types import TokenizedPair

EOS, PAD = "<eos>", "<pad>"
SPREAD = 0.4  # standard deviation of the logarithm of a length


class Shape(NamedTuple):
    """Mean lengths in tokens."""

    prompt: int
    response: int


SHAPES = {"tldr": Shape(350, 38), "hh": Shape(160, 75), "ultrafeedback": Shape(180, 260)}


@dataclass(frozen=True)
class ModelSize:
    """A Llama-shaped model. The default has the proportions of one of 1 to 3 billion parameters, head included.

    Args:
        hidden_size: H.
        intermediate_size: of the MLP.
        num_layers: decoder layers.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values.
        vocabulary: V; at least 4,096 is sensible.
        dtype: of the saved weights.
        tied: whether embeddings and head are one.
    """

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    vocabulary: int = 16_384
    dtype: str = "float32"
    tied: bool = True

    @property
    def config(self) -> LlamaConfig:
        """Without a number of positions."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=self.tied,
        )


class Workload(NamedTuple):
    """Folders and files of a workload.

    Attributes:
        model: Hugging Face folder with the tokenizer.
        pairs: JSON lines with ``prompt``, ``chosen`` and ``rejected``, for our side, which draws the order itself.
        ordered: the same rows in the order in which it does.
        validation: a few rows that nobody validates on.
        max_length: no row is longer, so that nothing is cut.
        seed: of our order.
    """

    model: str
    pairs: str
    ordered: str
    validation: str
    max_length: int
    seed: int


def make_workload(
    folder: Path,
    source: Shape | Path,
    size: ModelSize,
    *,
    num_pairs: int,
    batch_size: int,
    seed: int = 0,
    with_weights: bool = True,
) -> Workload:
    """Writes a workload, or finds the one that was written there.

    Args:
        folder: of the workload.
        source: lengths to draw pairs of, or a file of preference pairs.
        size: of the model.
        num_pairs: a multiple of ``batch_size``.
        batch_size: pairs of an optimizer step.
        seed: of weights, words and order.
        with_weights: else only the model's configuration is written, for weights that are drawn in memory.
    """
    assert num_pairs % batch_size == 0
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(_drawn(source, size, num_pairs, seed) if isinstance(source, Shape) else _read(source, num_pairs, seed))
    texts = (row[key] for row in rows for key in ("prompt", "chosen", "rejected"))
    tokenizer = _bpe(texts, size.vocabulary) if isinstance(source, Path) else _words(size.vocabulary)
    lengths = [
        max(len(tokenizer(row["prompt"] + row[side]).input_ids) for side in ("chosen", "rejected")) for row in rows
    ]
    workload = Workload(
        *(str(folder / name) for name in ("model", "pairs.jsonl", "ordered.jsonl", "validation.jsonl")),
        max_length=max(lengths) + 2,
        seed=seed,
    )
    order = TrainingOrder(
        [num_pairs], weights=[1.0], batch_size=batch_size, micro_batch_size=batch_size, seed=seed
    ).epoch_order(0)
    _write(workload.pairs, rows)
    _write(workload.ordered, [rows[number] for number in order.tolist()])
    _write(workload.validation, rows[:2])
    if not (folder / "model" / "config.json").is_file():
        config = size.config
        config.max_position_embeddings = 2 * workload.max_length
        config.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        if with_weights:
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype)).save_pretrained(folder / "model")
    return workload


def flops_per_pair(workload: Workload, num_forwards: int) -> float:
    """Useful FLOPs of a pair: those of its unique tokens.

    Args:
        workload: names the model's configuration and the pairs.
        num_forwards: one for a live reference and one for the policy; a backward counts as two, or as one if the
            weights are frozen under an adapter.
    """
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    with torch.device("meta"):
        model = LogProbModel(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workload.model)))
    rows = [json.loads(line) for line in Path(workload.pairs).read_text().splitlines()]
    pairs = [
        TokenizedPair(*([*tokenizer(row[key]).input_ids] for key in ("prompt", "chosen", "rejected"))) for row in rows
    ]
    work = count_work(collate_pairs(pairs, range(len(pairs)), pad_token_id=0, layout="shared"))
    return num_forwards * float(forward_flops(model, work)) / len(pairs)


def _drawn(shape: Shape, size: ModelSize, num_pairs: int, seed: int) -> Iterable[dict[str, str]]:
    generator = random.Random(seed)

    def text(mean: int) -> str:
        length = round(generator.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))
        return "".join(f" {generator.randrange(2, size.vocabulary)}" for _ in range(min(max(4, length), 3 * mean)))

    for _ in range(num_pairs):
        yield {"prompt": text(shape.prompt), "chosen": text(shape.response), "rejected": text(shape.response)}


def _read(path: Path, num_pairs: int, seed: int) -> Iterable[dict[str, str]]:
    rows: Any = datasets.load_dataset("json", data_files=str(path), split="train").shuffle(seed)
    format = detect_format(rows.column_names, list(rows.select(range(8))), kind="pairs", name=str(path))
    found = 0
    for row in rows:
        try:
            pairs = to_pairs(row, format=format)
        except RowError:
            continue
        for pair in pairs:
            prompt = pair.prompt if isinstance(pair.prompt, str) else transcript(pair.prompt)
            longest = max(len(prompt) + len(side) for side in (pair.chosen, pair.rejected))
            if pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected and longest < 6000:
                yield {"prompt": prompt, "chosen": " " + pair.chosen.strip(), "rejected": " " + pair.rejected.strip()}
                found += 1
            if found == num_pairs:
                return
    raise SystemExit(f"{path} has fewer than {num_pairs} usable pairs.")


def _words(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {PAD: 0, EOS: 1} | {str(number): number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def _bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def _write(path: str, rows: Sequence[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
