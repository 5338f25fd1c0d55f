"""Pairs: what is left out and why, and log-probs that belong to the text of the row."""

from collections.abc import Iterator
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_pair
from lit_isdpo.lab import environments
from lit_isdpo.lab.environments import Posts
from lit_isdpo.lab.labelling import PairRow, SampledRow, UnusableError
from lit_isdpo.lab.posts import Split, gold_reward, parse_prompt, split_of
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import PreferenceExample, Response


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_causal_lm(PolicyConfig(path=str(Posts.reference)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Posts.reference)


def sample_pairs(split: Split, number: int) -> tuple[list[PairRow], dict[str, int]]:
    posts = Posts()
    posts.num_pairs = {split: number}
    return posts.sample_pairs("pairs", split, 0)


def test_an_empty_response_is_kept_for_training_to_leave_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """The label of the pair takes its random number, so the labels after it stay as they are."""
    posts, empty = Posts(), Response([tokenizer.eos_token_id], True)
    labeller = posts.labeller(tokenizer, Random(0))
    row = SampledRow(0, "a", [1], [empty])
    assert labeller.read_back(row, empty) == ""
    with pytest.raises(UnusableError, match="unfinished"):
        labeller.read_back(row, Response([], False))


def test_behavior_logps_belong_to_the_text_of_the_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokenized anew from the written text, as the training pipeline does it."""
    rows, counts = sample_pairs("test", 64)
    assert len(rows) == counts["pairs"] > 48
    assert counts["prompts"] == 64 == len(rows) + counts.get("prompts with fewer than two responses left", 0)
    tokenized = [
        tokenize_pair(
            PreferenceExample(row["prompt"], row["chosen"], row["rejected"]),
            TextEncoder(tokenizer),
            Limits(64, 32),
        )
        for row in rows
    ]
    batch = collate_pairs(tokenized, range(len(rows)), pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        expected = LogProbModel(model)(batch.tokens).logps
    written = [row["chosen_behavior_logps"] for row in rows] + [row["rejected_behavior_logps"] for row in rows]
    torch.testing.assert_close(torch.tensor(written), expected, rtol=1e-5, atol=1e-5)
    for row in rows:
        assert split_of(parse_prompt(row["prompt"])) == "test"
        assert row["chosen_gold"] == gold_reward(row["prompt"], row["chosen"], finished=True)
        assert row["rejected_gold"] == gold_reward(row["prompt"], row["rejected"], finished=True)


def test_the_better_response_is_chosen_more_often_but_not_always() -> None:
    rows, _ = sample_pairs("train", 256)
    margins = [row["chosen_gold"] - row["rejected_gold"] for row in rows if row["chosen_gold"] != row["rejected_gold"]]
    assert 0.65 < sum(margin > 0 for margin in margins) / len(margins) < 0.95


def test_what_gives_no_pair_is_counted_by_its_reason(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = tokenizer.eos_token_id

    def words(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    good, other = Response([*words(" safety poor"), eos], True), Response([*words(" price good"), eos], True)
    cut = Response(words(" safety poor" * 12), False)
    bytes_of_a_word = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in b" safety"])
    spelled = Response([*bytes_of_a_word, *words(" poor"), eos], True)
    half_a_character = Response([tokenizer.convert_tokens_to_ids("<0xE2>"), eos], True)
    special = Response([*words(" safety"), tokenizer.bos_token_id, *words(" poor"), eos], True)
    sampled: Iterator[list[Response]] = iter(
        [
            [good, good, cut, cut, spelled, good, good],
            [other, good, good, cut, good, half_a_character, special],
        ]
    )
    monkeypatch.setattr(environments, "sample", lambda *_: [[response] for response in next(sampled)])
    rows, counts = sample_pairs("train", 7)
    assert counts == {
        "prompts": 7,
        "pairs": 1,
        "responses unfinished": 3,
        "responses whose text has other tokens": 3,
        "responses equal to another": 1,
        "prompts with fewer than two responses left": 6,
    }
    assert [{row["chosen"], row["rejected"]} for row in rows] == [{" safety poor", " price good"}]
