"""Two preference tasks that are small enough to be summed over: every response, its reward and its probability.

A vocabulary of a few words and an end token; eight prompts of two words. A response of the first design:

    prompt " warm clear"      response " very good kind very calm good"

**verbosity** (6 words, responses of exactly 6). With c = how often the word "very" occurs, the gold reward is

    0.7 q(prompt, response) + g(c),     g(0 ... 6) = 0, 0.8, 1.4, 0.8, -1, -3, -5

q sums a random number for each word, one for each word under this prompt, and one for each two words in a row; over all
responses to a prompt it has mean 0 and variance 1. The reader reads six words: what follows changes nothing, so that
the task is one of fixed length, and a response with fewer earns -5, as six times "very" does. Demonstrations have c ~
Binomial(6, 0.1), and within a c probabilities in proportion to exp(q'), where q' is a score like q that correlates 0.3
with it. Pairs are two responses of the reference given c <= 2: there the reward rises with c, and nothing in the data
says that it falls beyond. ``pairs_wrong_mu`` are the same pairs, with the log-probs of six words drawn uniformly as
those of their writer.

**length** (4 words, responses of up to 8). With n = the number of words, the gold reward is

    0.7 q(prompt, response) + g(n),     g(0 ... 8) = -1, -0.2, 0.5, 1, 1.4, 0.8, -0.5, -2, -3.5

q is the mean over the words (0 for none) of a word's quality: a random number for each word and one for each word under
this prompt, over the words of mean 0 and variance 1. No end within 9 tokens earns -5, where g would go on.
Demonstrations have n - 1 ~ Binomial(7, 0.35), and within an n probabilities in proportion to exp(the sum of the words'
q'). Pairs are two responses of the reference that are not empty (an empty response is no preference data); those of
``pairs_hole`` have at most 4 words, so that the reward rises with n inside the data and falls outside. Those of
``pairs_sharp`` have at most 5, and the reference writes them at temperature 0.7 (of whole responses): so mu is not the
reference anywhere.

**Labels** are Bradley-Terry's, ``sigmoid(gold_first - gold_second)``, and then 10 % of them are turned round.

The random numbers of a design are fixed: a seed of the lab draws other demonstrations and pairs, not another task.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lit_isdpo.lab.posts import MAX_LENGTH
from lit_isdpo.types import InputError

NUM_PROMPTS = 8
FLIPPED = 0.1
QUALITY = 0.7
VERBOSITY_GOLD = (0.0, 0.8, 1.4, 0.8, -1.0, -3.0, -5.0)
LENGTH_GOLD = (-1.0, -0.2, 0.5, 1.0, 1.4, 0.8, -0.5, -2.0, -3.5)
WORST = -5.0
END = "</s>"


@dataclass(frozen=True)
class ResponseTree:
    """The numbering of responses of at most L words: the nodes of a tree, level by level, a word per edge.

    A vocabulary of K words and one end token, token ids 0 to K - 1 and K, has ``1 + K + ... + K^L`` of them. For K = 2,
    L = 2:

        0: ""       1: "0"   2: "1"       3: "0 0"   4: "0 1"   5: "1 0"   6: "1 1"

    The nodes one word longer than node i are ``K i + 1 ... K i + K``. A node is a prefix, and a response where the end
    token follows.

    >>> tree = ResponseTree(num_words=2, max_words=2)
    >>> len(tree), tree.level(2), tree.find([1, 0])
    (7, slice(3, 7, None), 5)
    >>> tree.words.tolist()
    [[-1, -1], [0, -1], [1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]

    Args:
        num_words: K, at least 2.
        max_words: L, words of the longest response.
    """

    num_words: int
    max_words: int

    def __len__(self) -> int:
        return self._start(self.max_words + 1)

    def level(self, length: int) -> slice:
        """The nodes of ``length`` words."""
        return slice(self._start(length), self._start(length + 1))

    def find(self, word_ids: Sequence[int]) -> int:
        """The node of a response of at most ``max_words`` words."""
        assert len(word_ids) <= self.max_words
        node = 0
        for word in word_ids:
            node = self.num_words * node + 1 + word
        return node

    @cached_property
    def lengths(self) -> Tensor:
        """``(N,)`` words of each response."""
        return (self.words >= 0).sum(dim=1)

    @cached_property
    def words(self) -> Tensor:
        """``(N, L)`` the words of each response, -1 after its last."""
        words = torch.full((len(self), self.max_words), -1)
        for length in range(1, self.max_words + 1):
            nodes = words[self.level(length)]
            nodes[:, : length - 1] = words[self.level(length - 1), : length - 1].repeat_interleave(self.num_words, 0)
            nodes[:, length - 1] = torch.arange(self.num_words).repeat(len(nodes) // self.num_words)
        return words

    def _start(self, length: int) -> int:
        return int((self.num_words**length - 1) // (self.num_words - 1))


class PairsPart(NamedTuple):
    """A set of pairs that a design offers.

    Attributes:
        support: ``(N,)`` bool, the responses that its pairs are made of.
        true_mu: whether its behavior log-probs are those of the policy that wrote the responses; if not, they are wrong
            on purpose: those of a policy that draws each word of the response uniformly.
        temperature: divides the reference's log-probs of whole responses: below 1 it writes what it likes best.
    """

    support: Tensor
    true_mu: bool = True
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Design:
    """A task whose responses can be enumerated. P prompts, N responses, K words.

    Attributes:
        name: under which the lab has it.
        reference: folder of the shipped model that is trained on the demonstrations.
        vocabulary: the K words; a word's token id is its place, the end token is K.
        tree: the numbering of the responses.
        prompts: token ids.
        gold: ``(P, N)`` gold reward of each finished response, float64.
        longer_gold: ``(P, K^L)`` of the responses that go on behind the L words of a deepest node.
        malformed_gold: of what is cut off before, or no text of this vocabulary.
        target: ``(P, N)`` probabilities of the demonstrations.
        feature: ``(N,)`` int64: what the reward turns round in, the number of "very" or of words; -1 for responses that
            the demonstrations never have.
        parts: the sets of pairs by name.
    """

    name: str
    reference: Path
    vocabulary: tuple[str, ...]
    tree: ResponseTree
    prompts: tuple[tuple[int, ...], ...]
    gold: Tensor
    longer_gold: Tensor
    malformed_gold: float
    target: Tensor
    feature: Tensor
    parts: Mapping[str, PairsPart]

    def render(self, word_ids: Sequence[int]) -> str:
        """Words as text, a space before each."""
        return "".join(f" {self.vocabulary[word]}" for word in word_ids)

    def read(self, text: str) -> list[int] | None:
        """The inverse of :meth:`render`; ``None`` if the text is none of this vocabulary."""
        ids = {word: index for index, word in enumerate(self.vocabulary)}
        word_ids = [ids.get(word, -1) for word in text.split()]
        return None if -1 in word_ids or self.render(word_ids) != text else word_ids

    def gold_reward(self, prompt: str, response: str, finished: bool) -> float:
        """The gold reward of one response.

        Raises:
            InputError: ``prompt`` is none of the design's.
        """
        prompt_ids = self.read(prompt)
        if prompt_ids is None or tuple(prompt_ids) not in self.prompts:
            raise InputError(f"the gold reward of lab:{self.name} knows its eight prompts, not {prompt[:80]!r}")
        word_ids, row = self.read(response), self.prompts.index(tuple(prompt_ids))
        longest = self.tree.max_words
        if word_ids is None or (not finished and len(word_ids) < longest):
            return self.malformed_gold
        if len(word_ids) > longest or not finished:
            deepest = self.tree.find(word_ids[:longest]) - self.tree.level(longest).start
            return float(self.longer_gold[row, deepest])
        return float(self.gold[row, self.tree.find(word_ids)])


@cache
def verbosity() -> Design:
    """The first design of this module's text."""
    rng = Random("verbosity")
    vocabulary = ("very", "good", "clear", "calm", "warm", "kind")
    tree = ResponseTree(num_words=6, max_words=6)
    whole = tree.level(6)
    words = tree.words[whole]
    count = (words == 0).sum(dim=1)
    quality, score = (_standardized(_fluency(rng, words, len(vocabulary))) for _ in range(2))
    g = torch.tensor(VERBOSITY_GOLD, dtype=torch.float64)
    gold = torch.full((NUM_PROMPTS, len(tree)), WORST, dtype=torch.float64)
    gold[:, whole] = QUALITY * quality + g[count]
    feature = torch.full((len(tree),), -1)
    feature[whole] = count
    tilt = torch.zeros_like(gold)
    tilt[:, whole] = _correlated(score, quality)
    covered = (feature >= 0) & (feature <= 2)
    return Design(
        name="verbosity",
        reference=Path(__file__).parent / "verbosity_reference",
        vocabulary=vocabulary,
        tree=tree,
        prompts=_prompts(rng, len(vocabulary)),
        gold=gold,
        longer_gold=gold[:, whole],
        malformed_gold=WORST,
        target=_stratified(tilt, feature, _binomial(6, 0.1)),
        feature=feature,
        parts={"pairs": PairsPart(covered), "pairs_wrong_mu": PairsPart(covered, true_mu=False)},
    )


@cache
def length() -> Design:
    """The second design of this module's text."""
    rng = Random("length")
    vocabulary = ("red", "green", "blue", "white")
    tree = ResponseTree(num_words=4, max_words=8)
    quality, score = (_standardized(_normal(rng, 1, 4) + _normal(rng, NUM_PROMPTS, 4)) for _ in range(2))
    g = torch.tensor(LENGTH_GOLD, dtype=torch.float64)
    gold = QUALITY * _sums(quality, tree) / tree.lengths.clamp(min=1) + g[tree.lengths]
    feature = torch.where(tree.lengths > 0, tree.lengths, -1)
    return Design(
        name="length",
        reference=Path(__file__).parent / "length_reference",
        vocabulary=vocabulary,
        tree=tree,
        prompts=_prompts(rng, len(vocabulary)),
        gold=gold,
        longer_gold=torch.full((NUM_PROMPTS, 4**8), WORST, dtype=torch.float64),
        malformed_gold=WORST,
        target=_stratified(_sums(_correlated(score, quality), tree), feature, [0.0, *_binomial(7, 0.35)]),
        feature=feature,
        parts={
            "pairs": PairsPart(feature >= 1),
            "pairs_hole": PairsPart((feature >= 1) & (feature <= 4)),
            "pairs_sharp": PairsPart((feature >= 1) & (feature <= 5), temperature=0.7),
        },
    )


def build_closed_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of an enumerable task: ids 0 to K - 1 are its words, K ends a response, and that is all.

    There is no padding token, so the end token fills rows up, and none for unknown text, which is left out: a row of
    other data becomes empty, and is dropped as such.

    >>> tokenizer = build_closed_tokenizer(["very", "good"])
    >>> tokenizer.encode(" very very good bad"), tokenizer.eos_token_id, len(tokenizer)
    ([0, 0, 1], 2, 3)
    """
    words = {f" {word}": index for index, word in enumerate(vocabulary)} | {END: len(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def _prompts(rng: Random, num_words: int) -> tuple[tuple[int, ...], ...]:
    """Eight different prompts of two words."""
    return tuple(rng.sample(list(product(range(num_words), repeat=2)), NUM_PROMPTS))


def _normal(rng: Random, rows: int, columns: int) -> Tensor:
    return torch.tensor([[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)], dtype=torch.float64)


def _fluency(rng: Random, words: Tensor, num_words: int) -> Tensor:
    """``(R, L) -> (P, R)``: random numbers of words, of words under a prompt, and of two words in a row, summed."""
    of_word = _normal(rng, 1, num_words) + _normal(rng, NUM_PROMPTS, num_words)
    of_two_words = _normal(rng, num_words, num_words)
    return of_word[:, words].sum(dim=2) + of_two_words[words[:, :-1], words[:, 1:]].sum(dim=1)


def _sums(of_word: Tensor, tree: ResponseTree) -> Tensor:
    """``(P, K) -> (P, N)``: a number of each word, summed over the words of each response."""
    with_none = torch.cat([of_word, torch.zeros_like(of_word[:, :1])], dim=1)  # -1, behind the last word, counts 0
    return with_none[:, tree.words].sum(dim=2)


def _standardized(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each row."""
    return (values - values.mean(dim=1, keepdim=True)) / values.std(dim=1, correction=0, keepdim=True)


def _correlated(score: Tensor, quality: Tensor, correlation: float = 0.3) -> Tensor:
    """``score`` turned, row by row, to correlate as said with ``quality``; both, and the result, standardized."""
    own = _standardized(score - (score * quality).mean(dim=1, keepdim=True) * quality)
    return correlation * quality + math.sqrt(1 - correlation**2) * own


def _stratified(tilt: Tensor, feature: Tensor, probabilities: Sequence[float]) -> Tensor:
    """``(P, N)``: the feature has these probabilities, and within a value of it a response goes as ``exp(tilt)``."""
    target = torch.zeros_like(tilt)
    for value, probability in enumerate(probabilities):
        if probability:
            within = feature == value
            target[:, within] = probability * tilt[:, within].softmax(dim=1)
    return target


def _binomial(number: int, probability: float) -> list[float]:
    return [math.comb(number, k) * probability**k * (1 - probability) ** (number - k) for k in range(number + 1)]
