"""Token ids: a row for each, the same meaning to both models, and padding that is never said."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_isdpo.evaluation.statistics import sampled_kl
from lit_isdpo.lab.labelling import nucleus_logps, sampled_logps
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference
from lit_isdpo.policy.vocabulary import check_rows, check_vocabulary, first_without_row, num_tokens
from lit_isdpo.types import InputError, Response

WORDS = ("<s>", "</s>", "alpha", "beta", "gamma")


def tokenizer_of(*words: str) -> PreTrainedTokenizerFast:
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of(*WORDS)


def llama(rows: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=rows)


def reference(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> PolicyConfig:
    """Names a folder with nothing in it but a tokenizer, if any."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return PolicyConfig(path=str(folder))


@pytest.mark.parametrize(("own", "other"), [(5, 5), (64, 5), (5, 64), (64, 128)])
def test_the_same_tokens_may_be_padded_to_any_size(
    own: int, other: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    check_vocabulary(reference(tmp_path, tokenizer), llama(other), tokenizer, llama(own))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("<s>", "</s>", "beta", "alpha", "gamma"), "'alpha' is 3 to the tokenizer of .* and 2 to the policy's, and 2"),
        (("<s>", "</s>", "alpha", "beta"), "'gamma' is no token to the tokenizer of .* and 4 to the policy's, and 1"),
        ((*WORDS, "delta"), "'delta' is 5 to the tokenizer of .* and no token to the policy's, and 1"),
    ],
)
def test_another_tokenizer_is_refused_whatever_the_sizes(
    words: tuple[str, ...], says: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"^model.reference.path: {says} token"):
        check_vocabulary(reference(tmp_path, tokenizer_of(*words)), llama(64), tokenizer, llama(64))


def test_added_tokens_are_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    named = reference(tmp_path, tokenizer)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    with pytest.raises(InputError, match=r"'<\|im_end\|>' is no token to .* and 5 to the policy's"):
        check_vocabulary(named, llama(64), tokenizer, llama(64))


def test_a_reference_without_rows_for_the_tokens_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^model.reference.path: the tokenizer has ids up to 4, .* only 4 rows"):
        check_vocabulary(reference(tmp_path, tokenizer), llama(4), tokenizer, llama(5))


def test_without_a_tokenizer_the_sizes_must_be_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    named = reference(tmp_path, None)
    check_vocabulary(named, llama(64), tokenizer, llama(64))
    with pytest.raises(InputError, match=r"^model.reference.path: .* no tokenizer, .* 128 rows where .* 64;"):
        check_vocabulary(named, llama(128), tokenizer, llama(64))
    GPT2Config().save_pretrained(tmp_path)  # transformers can make an empty tokenizer of that
    check_vocabulary(named, llama(64), tokenizer, llama(64))


def test_a_tokenizer_that_is_broken_is_not_a_missing_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    named = reference(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"^model.reference.path: no tokenizer can be loaded from"):
        check_vocabulary(named, llama(64), tokenizer, llama(64))


def test_every_token_needs_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    source = PolicyConfig(path="folder")
    nested = Gemma3Config(text_config={"vocab_size": 5})
    for config in (llama(5), llama(64), nested, GPT2Config(vocab_size=5)):
        check_rows(source, config, tokenizer, option="reward.path")
    tokenizer.add_tokens(["delta"])
    for config in (llama(5), nested):
        with pytest.raises(InputError) as caught:
            check_rows(source, config, tokenizer, option="reward.path")
        assert str(caught.value) == (
            "reward.path: the tokenizer has ids up to 5, and the embedding of 'folder' only 5 rows; resize it with "
            "model.resize_token_embeddings(6), save the model, and name that folder."
        )


def test_special_tokens_for_what_a_model_does_not_read_need_no_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma 3's smallest model has no row for the token of an image, and its tokenizer has the token."""
    source, option = PolicyConfig(path="folder"), "model.policy.path"
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    check_rows(source, llama(5), tokenizer, option=option)
    assert first_without_row(llama(5), tokenizer) == 5
    assert first_without_row(llama(6), tokenizer) is None
    tokenizer.chat_template = "<image>{{ messages[0].content }}"
    with pytest.raises(InputError, match="ids up to 5"):
        check_rows(source, llama(5), tokenizer, option=option)
    tokenizer.chat_template, tokenizer.eos_token = None, "<image>"
    with pytest.raises(InputError, match="ids up to 5"):
        check_rows(source, llama(5), tokenizer, option=option)


def test_the_largest_id_counts_and_not_the_number_of_tokens() -> None:
    model = WordLevel({"<s>": 0, "</s>": 1, "alpha": 9}, unk_token="<s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")
    assert (len(tokenizer), num_tokens(tokenizer)) == (3, 10)
    with pytest.raises(InputError, match="ids up to 9, and the embedding of 'folder' only 3 rows"):
        check_rows(PolicyConfig(path="folder"), llama(3), tokenizer, option="model.policy.path")


def test_the_labs_models_have_a_row_for_each_token(model_dir: str) -> None:
    check_rows(
        PolicyConfig(path=model_dir),
        LlamaConfig.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
        option="model.policy.path",
    )


# A Llama of 50 rows, of which 40 are tokens.
TOKENS, PROMPT = 40, [1, 5]


@pytest.fixture
def padded(tiny_llama: PreTrainedModel) -> LogProbModel:
    policy = LogProbModel(tiny_llama)
    policy.num_tokens = TOKENS
    return policy


def next_token(policy: LogProbModel, tokens: int) -> torch.Tensor:
    """The first tokens' probabilities behind the prompt."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPT])).logits[0, -1]
    return logits[:tokens].softmax(dim=0)


def test_padding_is_never_sampled(padded: LogProbModel) -> None:
    number, vocabulary = 5000, Vocabulary(str, [2], 0)
    sampling = Sampling(num_responses=number, max_new_tokens=1, batch_size=number)
    (all_of_them,) = sample(LogProbModel(padded.model), [PROMPT], sampling, vocabulary)
    assert max(response.token_ids[0] for response in all_of_them) >= TOKENS, "the test would see nothing"
    (drawn,) = sample(padded, [PROMPT], sampling, vocabulary)
    counts = torch.bincount(torch.tensor([response.token_ids[0] for response in drawn]), minlength=TOKENS)
    assert len(counts) == TOKENS
    probability = next_token(padded, TOKENS)
    assert ((counts / number - probability).abs() < 4.5 * (probability * (1 - probability) / number).sqrt()).all()


def test_a_responses_log_probs_are_those_of_what_was_sampled(padded: LogProbModel) -> None:
    responses = [[7], [8]]
    sampling = Sampling(temperature=0.7, top_p=0.9, batch_size=2)
    found = sampled_logps(padded, [PROMPT] * 2, responses, sampling, pad_token_id=0)
    logits = next_token(padded, TOKENS).log()[None].expand(2, -1)
    expected = nucleus_logps(logits, torch.tensor([7, 8]), sampling)
    torch.testing.assert_close(torch.tensor(found), expected)


@pytest.mark.parametrize("rows", [40, 45, 64])
def test_kl_is_that_of_the_tokens_that_both_have(padded: LogProbModel, rows: int) -> None:
    """A reference with fewer and with more rows; its last rows have large logits of their own."""
    torch.manual_seed(1)
    config = replace_rows(padded.model.config, rows)
    other = type(padded.model)(config).eval()
    with torch.no_grad():
        other.lm_head.weight[TOKENS:] *= 30
    found = sampled_kl(
        padded, ResidentReference(LogProbModel(other)), [PROMPT], [Response([7], False)], pad_token_id=0, batch_size=1
    )[0]
    pi, ref = next_token(padded, TOKENS), next_token(LogProbModel(other), TOKENS)
    ratio = math.log(pi[7] / ref[7])
    expected = [float((pi * (pi / ref).log()).sum()), ratio, math.expm1(-ratio) + ratio]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def replace_rows(config: LlamaConfig, rows: int) -> LlamaConfig:
    changed = type(config).from_dict(config.to_dict())
    changed.vocab_size = rows
    return changed


def test_without_a_tokenizer_all_that_both_have_is_compared(padded: LogProbModel) -> None:
    padded.num_tokens = None
    torch.manual_seed(1)
    other = LogProbModel(type(padded.model)(replace_rows(padded.model.config, 64)).eval())
    found = sampled_kl(
        padded, ResidentReference(other), [PROMPT], [Response([7], False)], pad_token_id=0, batch_size=1
    )[0]
    pi, ref = next_token(padded, 50), next_token(other, 50)
    assert float(found[0]) == pytest.approx(float((pi * (pi / ref).log()).sum()), rel=1e-4)


def test_another_revision_has_its_own_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Of a folder a revision means nothing; it must not keep the tokenizer from being found."""
    named = replace(reference(tmp_path, tokenizer_of("<s>", "</s>", "beta", "alpha", "gamma")), revision="v2")
    with pytest.raises(InputError, match="'alpha' is 3"):
        check_vocabulary(named, llama(5), tokenizer, llama(5))
