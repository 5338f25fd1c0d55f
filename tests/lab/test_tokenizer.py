"""The tokenizer loses nothing, and prompt and response can be encoded apart."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_isdpo.lab import designs
from lit_isdpo.lab.designs import Design
from lit_isdpo.lab.environments import Enumerable, Posts
from lit_isdpo.lab.posts import build_tokenizer, render_prompt, sample_demonstration, sample_post


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """As users meet it: saved and loaded again."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    return AutoTokenizer.from_pretrained(folder)


def test_a_post_is_one_token_a_word(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt_ids = tokenizer.encode("POST: safety poor price superb TL;DR:")
    assert tokenizer.convert_ids_to_tokens(prompt_ids) == [
        *("<s>", "POST:", " safety", " poor", " price", " superb", " TL;DR:")
    ]
    assert tokenizer.unk_token_id not in prompt_ids
    post = sample_post(Random(0), "train")
    assert len(tokenizer.encode(render_prompt(post))) == 15


def test_prompt_and_response_are_encoded_apart_as_together(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = Random(0)
    for _ in range(50):
        post = sample_post(rng, "train")
        prompt, response = render_prompt(post), sample_demonstration(rng, post)
        apart = tokenizer.encode(prompt) + tokenizer.encode(response, add_special_tokens=False)
        assert apart == tokenizer.encode(prompt + response)
        assert tokenizer.decode(apart, skip_special_tokens=True) == prompt + response


def test_bos_is_added_once_and_eos_never(tokenizer: PreTrainedTokenizerBase) -> None:
    for ids in (tokenizer.encode("POST: hello"), tokenizer("POST: hello").input_ids):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " safety poor",
        "safety poor",
        "  safety   poor ",
        "unknown words, with (punctuation) & 123",
        "line\nline\n\n\tindented\r\n",
        "gr\u00fc\u00df dich, \u4f60\u597d \U0001f389\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u2581safety \u2581",
        "<0x41> x<0x41> <0x0A>",
        "</s> safety<s> poor <pad><unk>",
        "\x00\ufeff\ufffd\u2028 \u00a0",
    ],
)
def test_any_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_random_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = Random(0)
    pieces = [" ", "\n", " safety", " poor", "POST:", " TL;DR:", "<", "<0x20>", "</s>", "\u2581"]
    for _ in range(1000):
        # Any character but the surrogates, which are no text.
        character = chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        text = "".join(rng.choice([*pieces, *(character * 5)]) for _ in range(rng.randrange(12)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("environment", [Posts(), Enumerable(designs.verbosity), Enumerable(designs.length)])
def test_the_shipped_reference_has_this_tokenizer(environment: Posts | Enumerable) -> None:
    shipped, built = AutoTokenizer.from_pretrained(environment.reference), environment.build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
    assert shipped.special_tokens_map == built.special_tokens_map
    assert shipped.split_special_tokens


@pytest.mark.parametrize("design", [designs.verbosity, designs.length])
def test_an_enumerable_task_has_its_words_and_one_more_token(design: Callable[[], Design]) -> None:
    tokenizer, vocabulary = Enumerable(design).build_tokenizer(), design().vocabulary
    words = [*range(len(vocabulary)), 0, 0]
    assert tokenizer.encode(design().render(words)) == words
    assert tokenizer.decode(words, skip_special_tokens=True) == design().render(words)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == len(vocabulary) == len(tokenizer) - 1
    assert tokenizer.pad_token_id is None
    assert tokenizer.encode("Hello, world </s>") == []
