"""The tasks of the lab behind one interface: a new one is a class and a line in ``folder.ENVIRONMENTS``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from lit_isdpo.data.tokenization import TextEncoder
from lit_isdpo.lab.designs import FLIPPED, Design, build_closed_tokenizer
from lit_isdpo.lab.exact import ExactEvaluation, ResponseDistribution, behavior_logps, pair_logps, shipped_reference
from lit_isdpo.lab.labelling import (
    Candidate,
    Labeller,
    PairRow,
    Preference,
    SampledRow,
    first_wins,
    sampled_pairs,
    to_rows,
)
from lit_isdpo.lab.posts import (
    LABEL_TEMPERATURE,
    MAX_LENGTH,
    MAX_NEW_TOKENS,
    Split,
    build_tokenizer,
    gold_reward,
    render_prompt,
    sample_demonstration,
    sample_post,
)
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError, Prompt, Response

_BATCH_SIZE = 512  # responses generated, or scored, at a time


class Environment(ABC):
    """A task with a known gold reward, which the environment is, and a reference that wrote its pairs.

    Attributes:
        name: under which the lab has it.
        format: to be raised with every change of the files' content.
        reference: the folder of the shipped model.
        pairs_parts: the names of its sets of pairs.
        num_pairs: draws of a set of pairs, by split.
        num_demonstrations: by split.
        shape: of the reference, a Llama: hidden size, intermediate size, layers, attention heads.
    """

    name: str
    format = 1
    reference: Path
    pairs_parts: Sequence[str]
    num_pairs: Mapping[Split, int]
    num_demonstrations: Mapping[Split, int] = {"train": 48_000, "validation": 1024}
    shape: tuple[int, int, int, int]

    @property
    def identity(self) -> str:
        """The task and the format of its files, which changes with the reward."""
        return f"lab:{self.name} format {self.format}"

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """Gold rewards of responses to the task's own prompts, which are text; higher is better."""
        rewards = []
        for prompt, response, ended in zip(prompts, responses, finished, strict=True):
            if not isinstance(prompt, str):
                raise InputError(f"The prompts of lab:{self.name} are text; its reward cannot read a conversation.")
            rewards.append(self.gold_reward(prompt, response, ended))
        return rewards

    @abstractmethod
    def gold_reward(self, prompt: str, response: str, finished: bool) -> float:
        """The gold reward of one response; ``finished`` is false where the token limit cut it."""

    @abstractmethod
    def sample_pairs(self, part: str, split: Split, seed: int) -> tuple[list[PairRow], dict[str, int]]:
        """Draws pairs, and counts those that were left out."""

    @abstractmethod
    def sample_demonstrations(self, split: Split, seed: int) -> Iterable[Mapping[str, Any]]:
        """Draws rows of ``prompt`` and ``completion``."""

    @abstractmethod
    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The reference's tokenizer."""

    def build_config(self) -> LlamaConfig:
        """The reference's architecture."""
        tokenizer = self.build_tokenizer()
        hidden_size, intermediate_size, num_layers, num_heads = self.shape
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

    def exact_evaluation(self, part: str) -> ExactEvaluation | None:
        """Exact values of a policy that is trained on this part; ``None`` where responses cannot be enumerated."""
        return None


class _PostsLabeller(Labeller):
    """Keeps pairs with an empty response, which training leaves out: the labels of the pairs after it depend on it."""

    def read_back(self, row: SampledRow, response: Response) -> str:
        """The text whose tokens are those that were sampled."""
        tokenizer = self.encoder.tokenizer
        text = str(tokenizer.decode(response.token_ids, skip_special_tokens=True))
        if text or not response.finished:
            return super().read_back(row, response)
        return text


class Posts(Environment):
    """Posts and summaries; see :mod:`lit_isdpo.lab.posts`."""

    name = "posts"
    reference = Path(__file__).parent / "posts_reference"
    pairs_parts = ("pairs",)
    num_pairs: Mapping[Split, int] = {"train": 1024, "validation": 512, "test": 512}
    # 0.4 million parameters.
    shape = (96, 288, 3, 4)

    def gold_reward(self, prompt: str, response: str, finished: bool) -> float:
        """See :func:`lit_isdpo.lab.posts.gold_reward`."""
        return gold_reward(prompt, response, finished)

    def sample_pairs(self, part: str, split: Split, seed: int) -> tuple[list[PairRow], dict[str, int]]:
        """Draws posts of the split, and for each a pair: two samples of the reference at temperature 1, labelled.

        Not every post gives a pair. The counts tell why, in the words of the labeller.
        """
        rng = Random(f"posts/pairs/{split}/{seed}")
        prompts = [render_prompt(sample_post(rng, split)) for _ in range(self.num_pairs[split])]
        model, tokenizer = _load(self.reference)
        vocabulary = Vocabulary(str, [tokenizer.eos_token_id], tokenizer.pad_token_id)
        ids: list[list[int]] = [tokenizer.encode(prompt) for prompt in prompts]

        def draw() -> Iterator[Response]:
            for start in range(0, len(ids), _BATCH_SIZE):
                sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, batch_size=_BATCH_SIZE, seed=rng.getrandbits(32))
                for (response,) in sample(model, ids[start : start + _BATCH_SIZE], sampling, vocabulary):
                    yield response

        first, second = list(draw()), list(draw())
        drawn = zip(prompts, ids, first, second, strict=True)
        rows = [SampledRow(number, prompt, own, pair) for number, (prompt, own, *pair) in enumerate(drawn)]
        preferences, left_out = self.labeller(tokenizer, rng)(rows)
        pairs = sampled_pairs(
            model,
            preferences,
            Sampling(batch_size=_BATCH_SIZE),
            pad_token_id=vocabulary.pad_token_id,
            score_name="gold",
        )
        return pairs, {"prompts": len(prompts), "pairs": len(preferences), **left_out}

    def labeller(self, tokenizer: PreTrainedTokenizerBase, rng: Random) -> Labeller:
        """Labels both responses to a post, those with equal scores too."""
        return _PostsLabeller(
            reward=self,
            encoder=TextEncoder(tokenizer),
            choose=lambda prompt, texts, scores: [(0, 1)] if len(texts) == 2 else [],
            noise_temperature=LABEL_TEMPERATURE,
            noise=lambda row_id: rng,
            max_length=MAX_LENGTH,
        )

    def sample_demonstrations(self, split: Split, seed: int) -> Iterable[Mapping[str, Any]]:
        """One summary for each post."""
        rng = Random(f"posts/sft/{split}/{seed}")
        posts = (sample_post(rng, split) for _ in range(self.num_demonstrations[split]))
        return ({"prompt": render_prompt(post), "completion": sample_demonstration(rng, post)} for post in posts)

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """Words and bytes."""
        return build_tokenizer()


class Enumerable(Environment):
    """A task of :mod:`lit_isdpo.lab.designs`.

    Args:
        build: makes its tables, when they are first asked for.
    """

    num_pairs: Mapping[Split, int] = {"train": 8192, "validation": 1024, "test": 1024}
    # 80,000 parameters: small enough to be asked for every response at every validation.
    shape = (64, 128, 2, 2)

    def __init__(self, build: Callable[[], Design]) -> None:
        self._build = build

    @property
    def name(self) -> str:  # type: ignore[override]
        """The design's."""
        return self._build().name

    @property
    def reference(self) -> Path:  # type: ignore[override]
        """The folder of the shipped model."""
        return self._build().reference

    @property
    def pairs_parts(self) -> Sequence[str]:  # type: ignore[override]
        """The names of its sets of pairs."""
        return tuple(self._build().parts)

    def gold_reward(self, prompt: str, response: str, finished: bool) -> float:
        """Looked up in the design's table."""
        return self._build().gold_reward(prompt, response, finished)

    def sample_pairs(
        self, part: str, split: Split, seed: int, *, reference: ResponseDistribution | None = None
    ) -> tuple[list[PairRow], dict[str, int]]:
        """Draws pairs from distributions that are known exactly, an eighth for each prompt.

        Args:
            part: the name of the pairs.
            split: other pairs of the same prompts.
            seed: the rows are a function of it, given the reference and the machine's arithmetic.
            reference: wrote them; by default the shipped one.

        Returns:
            The rows, and the counts ``pairs`` and ``identical``, draws of two equal responses, which are repeated.
        """
        design, number = self._build(), self.num_pairs[split]
        drawn_as = part if design.parts[part].true_mu else "pairs"  # with a wrong mu they are the very same pairs
        rng = Random(f"{design.name}/{drawn_as}/{split}/{seed}")
        mu_logps = pair_logps(design, part, reference or shipped_reference(design))
        behavior = behavior_logps(design, part, mu_logps)
        cumulative = [list(accumulate(row)) for row in mu_logps.exp().tolist()]
        preferences: list[Preference] = []
        logps: list[float] = []
        identical = 0
        for draw in range(number):
            prompt = draw % len(design.prompts)
            while True:
                pair = rng.choices(range(len(design.tree)), cum_weights=cumulative[prompt], k=2)
                if pair[0] != pair[1]:
                    break
                identical += 1
            candidates = [Candidate(_text(design, node), [], float(design.gold[prompt, node])) for node in pair]
            if first_wins(rng, candidates[0].score, candidates[1].score, 1.0) == (rng.random() < FLIPPED):
                candidates.reverse()
                pair.reverse()
            row = SampledRow(draw, design.render(design.prompts[prompt]), [], [])
            preferences.append(Preference(row, *candidates))
            logps += [float(behavior[prompt, node]) for node in pair]
        # All of the chosen responses, then all of the rejected ones.
        return to_rows(preferences, logps[::2] + logps[1::2], "gold"), {"pairs": number, "identical": identical}

    def sample_demonstrations(self, split: Split, seed: int) -> Iterator[Mapping[str, Any]]:
        """Draws demonstrations from the design's target, an eighth for each prompt."""
        design = self._build()
        rng = Random(f"{design.name}/sft/{split}/{seed}")
        cumulative = [list(accumulate(row)) for row in design.target.tolist()]
        for draw in range(self.num_demonstrations[split]):
            prompt = draw % len(design.prompts)
            (node,) = rng.choices(range(len(design.tree)), cum_weights=cumulative[prompt])
            yield {"prompt": design.render(design.prompts[prompt]), "completion": _text(design, node)}

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The design's words and an end token."""
        return build_closed_tokenizer(self._build().vocabulary)

    def exact_evaluation(self, part: str) -> ExactEvaluation:
        """Exact values of a policy; those about pairs where the part is one of pairs."""
        return ExactEvaluation(self._build(), part if part in self.pairs_parts else None)


@cache
def _load(folder: Path) -> tuple[LogProbModel, PreTrainedTokenizerBase]:
    return LogProbModel(load_causal_lm(PolicyConfig(path=str(folder)))), AutoTokenizer.from_pretrained(folder)


def _text(design: Design, node: int) -> str:
    words = design.tree.words[node]
    return design.render(words[: int(design.tree.lengths[node])].tolist())
