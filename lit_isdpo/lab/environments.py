"""The tasks of the lab behind one interface: a new one is a class and a line in ``folder.ENVIRONMENTS``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Protocol

from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_isdpo.lab import design_data, pairs
from lit_isdpo.lab.designs import Design
from lit_isdpo.lab.exact import ExactEvaluation
from lit_isdpo.lab.pairs import PairRow
from lit_isdpo.lab.posts import GoldReward, Split, render_prompt, sample_demonstration, sample_post
from lit_isdpo.lab.tokenizer import MAX_LENGTH, build_closed_tokenizer, build_tokenizer
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm


class Gold(Protocol):
    """A gold reward, as evaluation calls it."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """One number a response, higher is better; ``finished`` is false where the token limit cut a response."""
        ...


class Environment(Protocol):
    """A task with a known gold reward, and a reference that wrote its pairs.

    Attributes:
        format: to be raised with every change of the files' content.
        num_pairs: draws of a set of pairs, by split.
        num_demonstrations: by split.
    """

    format: int
    num_pairs: Mapping[Split, int]
    num_demonstrations: Mapping[Split, int]

    @property
    def reference(self) -> Path:
        """The folder of the shipped model."""
        ...

    @property
    def pairs_parts(self) -> Sequence[str]:
        """The names of its sets of pairs."""
        ...

    @property
    def gold_reward(self) -> Gold:
        """Scores prompts, responses, and whether these are finished."""
        ...

    def sample_pairs(self, part: str, split: Split, seed: int) -> tuple[list[PairRow], dict[str, int]]:
        """Draws pairs, and counts what was left out."""
        ...

    def sample_demonstrations(self, split: Split, seed: int) -> Iterable[Mapping[str, Any]]:
        """Draws rows of ``prompt`` and ``completion``."""
        ...

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The reference's tokenizer."""
        ...

    def build_config(self) -> LlamaConfig:
        """The reference's architecture."""
        ...

    def exact_evaluation(self, part: str) -> ExactEvaluation | None:
        """Exact values of a policy that is trained on this part; ``None`` where responses cannot be enumerated."""
        ...


class Posts:
    """Posts and summaries; see :mod:`lit_isdpo.lab.posts`."""

    format = 1
    num_pairs: Mapping[Split, int] = {"train": 1024, "validation": 512, "test": 512}
    num_demonstrations: Mapping[Split, int] = {"train": 48_000, "validation": 1024}
    reference = Path(__file__).parent / "posts_reference"
    pairs_parts = ("pairs",)
    gold_reward = GoldReward()

    def sample_pairs(self, part: str, split: Split, seed: int) -> tuple[list[PairRow], dict[str, int]]:
        """One draw a post at most; see :func:`lit_isdpo.lab.pairs.sample_pairs`."""
        model, tokenizer = _load(self.reference)
        return pairs.sample_pairs(model, tokenizer, split=split, num_prompts=self.num_pairs[split], seed=seed)

    def sample_demonstrations(self, split: Split, seed: int) -> Iterable[Mapping[str, Any]]:
        """One summary a post."""
        rng = Random(f"posts/sft/{split}/{seed}")
        posts = (sample_post(rng, split) for _ in range(self.num_demonstrations[split]))
        return ({"prompt": render_prompt(post), "completion": sample_demonstration(rng, post)} for post in posts)

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """Words and bytes."""
        return build_tokenizer()

    def build_config(self) -> LlamaConfig:
        """A Llama of 0.4 million parameters."""
        return _llama(build_tokenizer(), hidden_size=96, intermediate_size=288, num_layers=3, num_heads=4)

    def exact_evaluation(self, part: str) -> None:
        """There are far too many summaries."""
        return


class Enumerable:
    """A task of :mod:`lit_isdpo.lab.designs`.

    Args:
        build: makes its tables, when they are first asked for.
    """

    format = 1
    num_pairs: Mapping[Split, int] = {"train": 8192, "validation": 1024, "test": 1024}
    num_demonstrations: Mapping[Split, int] = {"train": 48_000, "validation": 1024}

    def __init__(self, build: Callable[[], Design]) -> None:
        self._build = build

    @property
    def reference(self) -> Path:
        """The folder of the shipped model."""
        return self._build().reference

    @property
    def pairs_parts(self) -> Sequence[str]:
        """The names of its sets of pairs."""
        return tuple(self._build().parts)

    @property
    def gold_reward(self) -> Gold:
        """Looked up in the design's table."""
        return self._build().gold_rewards

    def sample_pairs(self, part: str, split: Split, seed: int) -> tuple[list[PairRow], dict[str, int]]:
        """See :func:`lit_isdpo.lab.design_data.sample_pairs`."""
        return design_data.sample_pairs(self._build(), part, split=split, num_pairs=self.num_pairs[split], seed=seed)

    def sample_demonstrations(self, split: Split, seed: int) -> Iterable[Mapping[str, Any]]:
        """See :func:`lit_isdpo.lab.design_data.sample_demonstrations`."""
        return design_data.sample_demonstrations(
            self._build(), split=split, num=self.num_demonstrations[split], seed=seed
        )

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The design's words and an end token."""
        return build_closed_tokenizer(self._build().vocabulary)

    def build_config(self) -> LlamaConfig:
        """A Llama of 80,000 parameters, small enough to be asked for every response at every validation."""
        return _llama(self.build_tokenizer(), hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2)

    def exact_evaluation(self, part: str) -> ExactEvaluation:
        """Exact values of a policy; those about pairs where the part is one of pairs."""
        return ExactEvaluation(self._build(), part if part in self.pairs_parts else None)


@cache
def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_causal_lm(PolicyConfig(path=str(folder))), AutoTokenizer.from_pretrained(folder)


def _llama(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int
) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        # About 1 / sqrt(hidden_size); from the usual 0.02 the posts' model learns to copy facts late or, in 3,000
        # steps, not at all.
        initializer_range=0.1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        dtype="float32",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
