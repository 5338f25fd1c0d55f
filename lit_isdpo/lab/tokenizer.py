"""The tokenizers of the lab: a token is a word, space included; to that of the posts other text passes byte by byte."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_isdpo.lab.posts import ATTRIBUTES, PROMPT_END, PROMPT_START, VALUES

MAX_LENGTH = 2048  # tokens; a post needs 39, the rest is room for real text, a token a byte

_PAD, _BOS, _EOS, _UNK = _SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


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
    # A piece is a word with at most one space before it. "<" stands alone, so that a text that spells "<0x41>" is not
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


def build_closed_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of an enumerable task: ids 0 to K - 1 are its words, K ends a response, and that is all.

    There is no padding token, so the end token fills rows up, and none for unknown text, which is left out: a row of
    other data becomes empty, and is dropped as such.

    >>> tokenizer = build_closed_tokenizer(["very", "good"])
    >>> tokenizer.encode(" very very good bad"), tokenizer.eos_token_id, len(tokenizer)
    ([0, 0, 1], 2, 3)
    """
    words = {f" {word}": index for index, word in enumerate(vocabulary)} | {_EOS: len(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_EOS,
        eos_token=_EOS,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
