"""The data contract for every family of tokenizers, made here from a few sentences: nothing comes from a hub."""

import json
from functools import cache
from itertools import product

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lit_isdpo.commands.inspect import token_texts
from lit_isdpo.data.encoding import pad_token_id, terminator_ids
from lit_isdpo.data.outcomes import Reason, RowError
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_pair
from lit_isdpo.types import Message, PreferenceExample

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "user assistant system human\n\nHuman: what is the answer?\n\nAssistant: the answer is four.",
    "a post about a car, its color and its price. TL;DR: the color is great",
    "be brief. short answers, long answers, quick answers",
] * 8
SPECIALS = ["<unk>", "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
FAMILIES = ("byte-level BPE", "unigram", "unigram, always a blank", "legacy unigram", "WordPiece")


@cache
def backend(family: str) -> Tokenizer:
    if family == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    elif family == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS)
    else:
        tokenizer = Tokenizer(models.Unigram())
        scheme = "always" if "always" in family else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=SPECIALS, unk_token="<pad>", show_progress=False
        )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if "unigram" in family:  # whose trainer takes another special token for the unknown one
        description = json.loads(tokenizer.to_str())
        description["model"]["unk_id"] = 0
        tokenizer = Tokenizer.from_str(json.dumps(description))
    if family == "legacy unigram":  # Llama 2's: the blank is the normalizer's
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return tokenizer


def make(
    family: str, *, bos: bool = True, eos: bool = False, pad_is_eos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(backend(family).to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    form = "<bos> " * bos + "$A" + " <eos>" * eos
    specials = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=specials)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>" if pad_is_eos else "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=template, **names)


PAIR = PreferenceExample("the answer is: what is", " the quick answer", " the lazy dog, over the fox")
LENGTHS = Limits(200, 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bos", "eos", "pad_is_eos"), list(product((True, False), repeat=3)))
def test_one_bos_where_it_is_wanted_and_one_terminator(family, bos, eos, pad_is_eos):
    tokenizer = make(family, bos=bos, eos=eos, pad_is_eos=pad_is_eos)
    pair = tokenize_pair(PAIR, TextEncoder(tokenizer), LENGTHS)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert pair.prompt_ids.count(start) == bos
    assert (pair.prompt_ids[0] == start) == bos
    assert end not in pair.prompt_ids
    for response in pair[1:3]:
        assert response[-1] == end
        assert response.count(end) == 1
        assert start not in response
    assert (pad_token_id(tokenizer) == end) == pad_is_eos
    assert pair.changes == []


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_are_what_their_text_is_as_a_whole(family):
    """No blank is put between them, none is lost: SentencePiece's own would make another text of it."""
    tokenizer = make(family)
    pair = tokenize_pair(PAIR, TextEncoder(tokenizer), LENGTHS)
    for text, response in ((PAIR.chosen, pair.chosen_ids), (PAIR.rejected, pair.rejected_ids)):
        whole = tokenizer(PAIR.prompt + text)["input_ids"]
        assert pair.prompt_ids + response == [*whole, tokenizer.eos_token_id]
        assert tokenizer.decode(pair.prompt_ids + response, skip_special_tokens=True) == tokenizer.decode(
            whole, skip_special_tokens=True
        )
        if family != "WordPiece":  # which keeps words, not blanks
            assert tokenizer.decode(whole, skip_special_tokens=True) == PAIR.prompt + text
    if "unigram" in family:
        glued = tokenize_pair(
            PAIR._replace(prompt="the answer is:", chosen="four", rejected="dog"), TextEncoder(tokenizer), LENGTHS
        )
        assert tokenizer.decode(glued.prompt_ids + glued.chosen_ids, skip_special_tokens=True) == "the answer is:four"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_that_is_cut_has_no_terminator_and_is_counted(family):
    tokenizer = make(family)
    whole = tokenize_pair(PAIR, TextEncoder(tokenizer), LENGTHS)
    room = len(whole.prompt_ids) + len(whole.chosen_ids)
    assert len(whole.rejected_ids) > len(whole.chosen_ids)
    cut = tokenize_pair(PAIR, TextEncoder(tokenizer), Limits(room, len(whole.prompt_ids)))
    assert cut.chosen_ids == whole.chosen_ids
    assert cut.rejected_ids == whole.rejected_ids[: len(whole.chosen_ids)]
    assert tokenizer.eos_token_id not in cut.rejected_ids
    assert cut.changes == ["response cut"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "trims": CHATML.replace("m['content']", "m['content'] | trim"),
    "adds a system message": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe brief.<|im_end|>\n{% endif %}" + CHATML
    ),
    "begins with BOS": "{{ bos_token }}" + CHATML,
    "ends with EOS": "{{ bos_token }}" + CHATML.replace("<|im_end|>", "{{ eos_token }}"),
    "an empty thought": CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n</think>{% endif %}{{ m['content'] }}",
    ),
}
CHAT = [
    Message(role="user", content="what is the color?"),
    Message(role="assistant", content="the color is great"),
    Message(role="user", content="what is the answer?"),
]
ANSWERS = PreferenceExample(CHAT, "the quick answer", "the lazy dog, over the fox")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_is_what_its_template_renders_as_a_whole(family, template):
    tokenizer = make(family, template=TEMPLATES[template])
    pair = tokenize_pair(ANSWERS, TextEncoder(tokenizer), LENGTHS)
    ends = terminator_ids(tokenizer)
    assert pair.prompt_ids.count(tokenizer.bos_token_id) == ("BOS" in template or "EOS" in template)
    for text, response in ((ANSWERS.chosen, pair.chosen_ids), (ANSWERS.rejected, pair.rejected_ids)):
        assert response[-1] in ends
        assert not set(response[:-1]) & set(ends)
        turn = Message(role="assistant", content=text)
        whole = tokenizer.apply_chat_template([*CHAT, turn], tokenize=False)
        shown = tokenizer.decode(pair.prompt_ids + response, skip_special_tokens=False)
        if family == "byte-level BPE":
            assert shown == whole.rstrip("\n")
        if family in ("byte-level BPE", "WordPiece"):
            ids = tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
            assert pair.prompt_ids + response == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_that_is_too_long_loses_its_first_turns_and_keeps_the_system_message(family):
    tokenizer = make(family, template=TEMPLATES["ChatML"])
    system = [Message(role="system", content="be brief.")]
    expected = tokenize_pair(ANSWERS._replace(prompt=[*system, CHAT[-1]]), TextEncoder(tokenizer), LENGTHS)
    limits = Limits(200, len(expected.prompt_ids))
    pair = tokenize_pair(ANSWERS._replace(prompt=[*system, *CHAT]), TextEncoder(tokenizer), limits)
    assert pair == expected._replace(changes=["first messages left out"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [TEMPLATES["ChatML"], None], ids=["template", "transcript"])
def test_the_assistants_header_is_never_cut(family, template):
    tokenizer = make(family, bos=False, template=template)
    last = ANSWERS._replace(prompt=CHAT[-1:])
    whole = tokenize_pair(last, TextEncoder(tokenizer), LENGTHS).prompt_ids
    opening = "<|im_start|>assistant\n" if template else "\n\nAssistant:"
    without = tokenizer("a" + opening, add_special_tokens=False)["input_ids"]
    header = len(without) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    for mode in ("keep_end", "keep_start"):
        for length in range(1, len(whole)):
            limits = Limits(200, length, mode)
            if length <= header:
                with pytest.raises(RowError) as error:
                    tokenize_pair(last, TextEncoder(tokenizer), limits)
                assert error.value.reason is Reason.LONG_PROMPT
                continue
            pair = tokenize_pair(last, TextEncoder(tokenizer), limits)
            assert len(pair.prompt_ids) <= length
            assert pair.changes == ["prompt cut"]
            shown = tokenizer.decode(pair.prompt_ids, skip_special_tokens=False)
            assert "".join(shown.split()).lower().endswith("".join(opening.split()).lower())
    with pytest.raises(RowError) as dropped:
        tokenize_pair(last, TextEncoder(tokenizer), Limits(200, len(whole) - 1, "drop"))
    assert dropped.value.reason is Reason.LONG_PROMPT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_opens_a_thought_shows_both_renderings(family):
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(RowError, match=r"prompt goes on with '<think>.*and both together with 'the quick"):
        tokenize_pair(ANSWERS, TextEncoder(make(family, template=thinking)), LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_shown_one_by_one_are_the_text(family):
    tokenizer = make(family)
    texts = [PAIR.prompt, "caf\u00e9 \u65e5\u672c \U0001f600" if family == "byte-level BPE" else PAIR.rejected]
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        shown = list(token_texts(ids, tokenizer))
        assert shown[0] == ("<bos>", True)
        assert shown[-1] == ("<eos>", True)
        text = "".join(piece for piece, _ in shown[1:-1])
        assert text.removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["unigram", "WordPiece"])
def test_a_response_that_ends_in_an_unknown_character_still_gets_its_terminator(family):
    """The unknown token is special, and yet it ends nothing."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    opened = template + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make(family, template=opened)
    pair = tokenize_pair(ANSWERS._replace(chosen="the color \u65e5"), TextEncoder(tokenizer), LENGTHS)
    assert pair.chosen_ids[-2:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
