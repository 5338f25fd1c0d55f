"""Posts and summaries: a preference task whose true reward is known, small enough for a laptop, readable by eye.

A post states six facts about a product, an attribute and a value each, out of ten attributes and eight values:

    POST: price good safety poor smell fine speed fair color great weight bad TL;DR:

A response tells some of them and ends:

    " safety poor price good speed fair"

**Gold reward.** The response is read from left to right. An attribute followed by a value is a *mention*; every other
word is malformed. The reward is the sum of

    importance of the attribute   for each mention that is right, i.e. a fact of the post
    -1                            for each mention that is wrong: another value, or an attribute the post has not
    -0.5                          instead of either, for a mention whose attribute was mentioned before
    -0.5                          for each malformed word
    -0.3                          for each mention (right, wrong or repeated) beyond three
    -1                            once, if the response did not end within 24 new tokens, the end token counted

where the importance of safety, price, quality, comfort, speed, noise, weight, color, smell, box is 1, 1, 0.8, 0.8, 0.6,
0.4, 0.2, 0.1, 0, -0.2. So the best response tells the three most important facts, rightly, once each; saying more is
good as long as there is little of it, and bad beyond.

**Demonstrations** tell two to four facts, chosen and ordered at random, each with a wrong value with probability 0.15.
**Preferences** compare two samples of the model trained on them. The first wins with probability
``sigmoid((gold_first - gold_second) / 0.5)`` (Bradley-Terry), so some labels contradict the gold order.

**Splits.** The facts of a post, in whatever order, decide whether it is a train, validation or test post. So the splits
are disjoint under any seed, for demonstrations and preferences alike.

The response above earns 1 + 1 + 0.6. Now with a wrong speed (safety 1, price 1, -1), then with safety told twice and
a stray word (1, -0.5, -0.5):

>>> prompt = "POST: price good safety poor smell fine speed fair color great weight bad TL;DR:"
>>> gold_reward(prompt, " safety poor price good speed fair", finished=True)
2.6
>>> gold_reward(prompt, " safety poor price good speed awful", finished=True)
1.0
>>> gold_reward(prompt, " safety poor safety poor good", finished=True)
0.0
"""

from collections.abc import Iterable
from hashlib import sha256
from random import Random
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_isdpo.types import InputError

Split = Literal["train", "validation", "test"]
Fact = tuple[str, str]  # attribute, value
Post = dict[str, str]  # attribute -> value, in the order of the text

IMPORTANCE = {
    "safety": 1.0,
    "price": 1.0,
    "quality": 0.8,
    "comfort": 0.8,
    "speed": 0.6,
    "noise": 0.4,
    "weight": 0.2,
    "color": 0.1,
    "smell": 0.0,
    "box": -0.2,
}
ATTRIBUTES = tuple(IMPORTANCE)
VALUES = ("awful", "bad", "poor", "fair", "fine", "good", "great", "superb")
PROMPT_START = "POST:"
PROMPT_END = " TL;DR:"
FACTS_PER_POST = 6
MENTIONS_WITHOUT_PENALTY = 3
MAX_NEW_TOKENS = 24
WRONG_VALUE_PROBABILITY = 0.15
LABEL_TEMPERATURE = 0.5
MAX_LENGTH = 2048  # tokens; a post needs 39, the rest is room for real text, a token a byte

_PAD, _BOS, _EOS, _UNK = _SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


def render_facts(facts: Iterable[Fact]) -> str:
    """Facts as text, a space before every word.

    >>> render_facts([("safety", "poor"), ("price", "good")])
    ' safety poor price good'
    """
    return "".join(f" {attribute} {value}" for attribute, value in facts)


def render_prompt(post: Post) -> str:
    """The prompt of a post."""
    return PROMPT_START + render_facts(post.items()) + PROMPT_END


def parse_prompt(prompt: str) -> Post:
    """The post of a prompt, the inverse of :func:`render_prompt`.

    Raises:
        InputError: the text is not the prompt of a post.
    """
    words = prompt.removeprefix(PROMPT_START).removesuffix(PROMPT_END).split()
    post = dict(zip(words[::2], words[1::2], strict=False))
    if len(post) != FACTS_PER_POST or render_prompt(post) != prompt or not _are_facts(post.items()):
        raise InputError(f"the gold reward reads posts, which this prompt is not: {prompt[:80]!r}")
    return post


def gold_reward(prompt: str, response: str, finished: bool) -> float:
    """The gold reward of one response, rounded to its exact number of tenths.

    Args:
        prompt: the post, as :func:`render_prompt` writes it.
        response: the response's text, without the end token.
        finished: whether the response ended by itself within :data:`MAX_NEW_TOKENS`.

    Raises:
        InputError: ``prompt`` is not a post.
    """
    post = parse_prompt(prompt)
    mentions, num_malformed = _read(response)
    reward = 0.0 if finished else -1.0
    reward -= 0.5 * num_malformed
    reward -= 0.3 * max(0, len(mentions) - MENTIONS_WITHOUT_PENALTY)
    told: set[str] = set()
    for attribute, value in mentions:
        if attribute in told:
            reward -= 0.5
        elif post.get(attribute) == value:
            reward += IMPORTANCE[attribute]
        else:
            reward -= 1.0
        told.add(attribute)
    return round(reward, 1) + 0.0  # every term is a multiple of 0.1; adding zero turns -0.0 into 0.0


def split_of(post: Post) -> Split:
    """The split that a post belongs to: a quarter of all posts each for validation and test, the rest for train."""
    quarter = sha256(render_facts(sorted(post.items())).encode()).digest()[0] % 4
    return "validation" if quarter == 0 else "test" if quarter == 1 else "train"


def sample_post(rng: Random, split: Split) -> Post:
    """A post of the split: six different attributes in random order, each with a value drawn uniformly."""
    while True:
        post = {attribute: rng.choice(VALUES) for attribute in rng.sample(ATTRIBUTES, FACTS_PER_POST)}
        if split_of(post) == split:
            return post


def sample_demonstration(rng: Random, post: Post) -> str:
    """A summary of two to four of the post's facts, as the reference is trained on; see the module's text."""
    facts = []
    for attribute, value in rng.sample(list(post.items()), rng.randint(2, 4)):
        others = [other for other in VALUES if other != value]
        facts.append((attribute, rng.choice(others) if rng.random() < WRONG_VALUE_PROBABILITY else value))
    return render_facts(facts)


def _are_facts(facts: Iterable[Fact]) -> bool:
    return all(attribute in IMPORTANCE and value in VALUES for attribute, value in facts)


def _read(response: str) -> tuple[list[Fact], int]:
    """The mentions of a response in their order, and the number of malformed words.

    >>> _read(" safety poor price price good oops fair")
    ([('safety', 'poor'), ('price', 'good')], 3)
    """
    words = response.split()
    mentions: list[Fact] = []
    num_malformed = position = 0
    while position < len(words):
        pair = tuple(words[position : position + 2])
        if len(pair) == 2 and _are_facts([pair]):
            mentions.append(pair)
            position += 2
        else:
            num_malformed += 1
            position += 1
    return mentions, num_malformed


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: 4 special tokens, 256 bytes, 20 words.

    Encoding and decoding are exact inverses on every text, and the words of a response are the same tokens whether
    the prompt before them is encoded with them or apart, because a word carries the space before it. ``<s>`` is put in
    front where special tokens are asked for; ``</s>`` never is. There is no chat template.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.convert_ids_to_tokens(tokenizer.encode("POST: price good TL;DR:"))
    ['<s>', 'POST:', ' price', ' good', ' TL;DR:']
    >>> tokenizer.decode(tokenizer.encode(" <0x41>  safety </s>"), skip_special_tokens=True)
    ' <0x41>  safety </s>'
    """
    words = [PROMPT_START, PROMPT_END, *(f" {word}" for word in (*ATTRIBUTES, *VALUES))]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate([*_SPECIALS, *byte_tokens, *words])}
    # No merges: a piece of text is one of the words or it is spelled in bytes.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, ignore_merges=True, unk_token=_UNK))
    # A piece is a word with at most one space before it. "<" is a piece of its own: a text that spells "<0x41>" is not
    # taken for the byte token of that name.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s<]+|[\s<]"), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, vocabulary[_BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNK,
        split_special_tokens=True,  # "</s>" within a text is text: it cannot end a response
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
