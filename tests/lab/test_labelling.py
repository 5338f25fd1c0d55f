"""From sampled responses to pairs: what is left out, who is chosen, and the log-probs of what was really sampled."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from lit_isdpo.data.examples import choose_pairs, detect_format, to_pairs
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_pair
from lit_isdpo.lab.labelling import Labeller, SampledRow, nucleus_logps, sampled_logps, to_rows
from lit_isdpo.policy.generation import Sampling
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import Conversation, InputError, Message, Prompt, Response
from tests.data.conftest import _make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [Message(role="user", content="2 + 2?")]


class Length:
    """Longer is better."""

    identity = "length"

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        assert all(finished)
        return [len(response.strip()) for response in responses]


def labeller(tokenizer: PreTrainedTokenizerBase, **options: object) -> Labeller:
    defaults: dict[str, object] = {
        "reward": Length(),
        "encoder": TextEncoder(tokenizer),
        "choose": partial(choose_pairs, pairing="best_worst"),
        "noise_temperature": 0.0,
        "noise": lambda row_id: Random(f"0/{row_id}"),
        "max_length": 100,
    }
    return Labeller(**(defaults | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token a byte."""
    return _make_tokenizer()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def sampled(tokenizer: PreTrainedTokenizerBase, *texts: str, row_id: int = 0) -> SampledRow:
    """Responses to the prompt "2 + 2 =", finished unless they end in "..."."""
    responses = [
        Response(
            encode(tokenizer, text.removesuffix("...")) + [2] * (not text.endswith("...")), not text.endswith("...")
        )
        for text in texts
    ]
    return SampledRow(row_id, "2 + 2 =", [1, *encode(tokenizer, "2 + 2 =")], responses)


def test_the_best_is_chosen_over_the_worst(tokenizer: PreTrainedTokenizerBase) -> None:
    preferences, left_out = labeller(tokenizer)([sampled(tokenizer, " 4", " 22222", " 55")])
    (row,) = to_rows(preferences, [-1.0, -2.0])
    assert row == {
        "prompt": "2 + 2 =",
        "chosen": " 22222",
        "rejected": " 4",
        "chosen_behavior_logps": -1.0,
        "rejected_behavior_logps": -2.0,
        "chosen_score": 5.0,
        "rejected_score": 1.0,
    }
    assert preferences[0].chosen.token_ids == [*encode(tokenizer, " 22222"), 2]
    assert not left_out


def test_what_is_left_out_is_counted_by_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        sampled(tokenizer, " 4", " 4", " 55", " 666...", "  "),
        sampled(tokenizer, " 4", " 5"),
        sampled(tokenizer, " 4", "..."),
        sampled(tokenizer, " 4", " 1234567890" * 10),
        sampled(tokenizer, " 4", " 55")._replace(prompt_ids=[1, 7]),
        SampledRow(
            5, "2 + 2 =", [1, *encode(tokenizer, "2 + 2 =")], [Response([*encode(tokenizer, " 4"), 2, 2], True)]
        ),
    ]
    preferences, left_out = labeller(tokenizer)(rows)
    assert len(preferences) == 1
    assert left_out == Counter(
        {
            "responses equal to another": 1,
            "responses unfinished": 2,
            "responses left out as empty response": 1,
            "responses longer than data.max_length allows": 1,
            "responses to a prompt that was cut": 2,
            "responses whose text has other tokens": 1,
            "prompts with equal scores": 1,
            "prompts with fewer than two responses left": 4,
        }
    )


@pytest.mark.parametrize("template", [None, CHATML])
def test_conversations_are_written_as_messages_that_read_back_as_the_sampled_tokens(template: str | None) -> None:
    """Without a template the transcript's blank belongs to the tokens, not to the message."""
    tokenizer = _make_tokenizer(template=template, eos_token="<|im_end|>" if template else "<eos>")
    turn = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = encode(tokenizer, turn) if template else [1, *encode(tokenizer, "\n\nHuman: 2 + 2?\n\nAssistant:")]
    blank = "" if template else " "
    ids = [[*encode(tokenizer, blank + text), tokenizer.eos_token_id] for text in ("4", "five")]
    row = SampledRow(0, CHAT, prompt_ids, [Response(token_ids, True) for token_ids in ids])
    preferences, left_out = labeller(tokenizer)([row])
    assert not left_out
    (written,) = to_rows(preferences, [-1.0, -2.0])
    assert written["chosen"] == [{"role": "assistant", "content": "five"}]
    values = dict(written)
    (pair,) = to_pairs(values, detect_format(list(values), [values]))
    read = tokenize_pair(pair, TextEncoder(tokenizer), Limits(100, 90))
    assert read[:7] == (prompt_ids, ids[1], ids[0], -1.0, -2.0, 1.0, 0.0)


def test_tools_and_an_answer_that_has_begun_are_written_and_read_back() -> None:
    template = "{% for t in tools or [] %}{{ t.function.name }}<|im_end|>{% endfor %}" + CHATML
    tokenizer = _make_tokenizer(template=template, eos_token="<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    prompt = Conversation([*CHAT, Message(role="assistant", content="It is", prefix=True)], tools)
    prompt_ids = encode(tokenizer, TextEncoder(tokenizer).render(prompt))
    ids = [[*encode(tokenizer, text), tokenizer.eos_token_id] for text in (" 4", " five")]
    row = SampledRow(0, prompt, prompt_ids, [Response(token_ids, True) for token_ids in ids])
    preferences, left_out = labeller(tokenizer)([row])
    assert not left_out
    (written,) = json.loads(json.dumps(to_rows(preferences, [-1.0, -2.0])))
    assert written["tools"] == tools
    (pair,) = to_pairs(written, detect_format(list(written), [written]))
    read = tokenize_pair(pair, TextEncoder(tokenizer), Limits(100, 90))
    assert read[:3] == (prompt_ids, ids[1], ids[0])


def test_noise_is_bradley_terry(tokenizer: PreTrainedTokenizerBase) -> None:
    """Scores 2 and 1, temperature 0.5: the better one is chosen with sigmoid(2) = 0.88."""
    rows = [sampled(tokenizer, " 4", " 55", row_id=row_id) for row_id in range(400)]
    preferences, _ = labeller(tokenizer, noise_temperature=0.5)(rows)
    share = sum(preference.chosen.score > preference.rejected.score for preference in preferences) / 400
    expected = 1 / (1 + math.exp(-2))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 400)
    again, _ = labeller(tokenizer, noise_temperature=0.5)(rows[::-1])
    assert again[::-1] == preferences, "the order of the rows is not the noise's"
    other, _ = labeller(tokenizer, noise_temperature=0.5, noise=lambda row_id: Random(f"1/{row_id}"))(rows)
    assert other != preferences
    extreme, _ = labeller(tokenizer, noise_temperature=1e-6)(rows[:1])
    assert extreme[0].chosen.text == " 55"


def test_a_reward_that_gives_no_number_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    class Broken(Length):
        def __call__(self, prompts: object, responses: Sequence[str], finished: object) -> Sequence[float]:
            return [math.nan] * len(responses)

    with pytest.raises(InputError, match=r"labels\.reward: Broken must give a finite .* gave nan for ' 4'"):
        labeller(tokenizer, reward=Broken())([sampled(tokenizer, " 4", " 5")])


def test_a_hand_worked_nucleus() -> None:
    """Of 0.5, 0.3, 0.2 a mass of 0.6 needs two tokens; at temperature 1/2 the squares are 25, 9, 4 of 38."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3, 3)
    targets = torch.tensor([0, 1, 2])

    def probs(temperature: float, top_p: float) -> list[float]:
        return nucleus_logps(logits, targets, Sampling(temperature=temperature, top_p=top_p)).exp().tolist()

    assert probs(1, 1) == pytest.approx([0.5, 0.3, 0.2])
    assert probs(0.5, 1) == pytest.approx([25 / 38, 9 / 38, 4 / 38])
    assert probs(1, 0.6)[:2] == pytest.approx([5 / 8, 3 / 8])
    assert probs(1, 0.4)[0] == pytest.approx(1)
    assert probs(0.5, 0.7)[:2] == pytest.approx([25 / 34, 9 / 34])
    assert probs(1, 0.6)[2] == pytest.approx(0.2), "sampled, so inside"


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.8), (1.3, 0.5)])
def test_it_is_the_distribution_that_generation_samples(temperature: float, top_p: float) -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 2
    scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).log_softmax(dim=1)
    targets = torch.multinomial(scores.exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    expected = scores.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(nucleus_logps(logits, targets, Sampling(temperature=temperature, top_p=top_p)), expected)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_sums_over_a_response_whatever_the_batch(
    tiny_llama: PreTrainedModel, temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over tokens: the model's own logits, one prefix at a time."""
    policy, sampling = LogProbModel(tiny_llama), Sampling(temperature=temperature, top_p=top_p)
    prompts, responses = [[1, 5], [1, 7, 9], [3]], [[4, 6, 2], [8, 2], [2]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        total = 0.0
        for position, token in enumerate(response):
            with torch.no_grad():
                logits = tiny_llama(torch.tensor([prompt + response[:position]])).logits[:, -1]
            total += nucleus_logps(logits, torch.tensor([token]), sampling).item()
        expected.append(total)
    for batch_size in (1, 2, 3):
        batches = replace(sampling, batch_size=batch_size)
        logps = sampled_logps(policy, prompts, responses, batches, pad_token_id=0)
        assert logps == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("lit_isdpo.policy.logprob_model.LOGITS_BUDGET", 1)
    logps = sampled_logps(policy, prompts, responses, sampling, pad_token_id=0)
    assert logps == pytest.approx(expected, abs=1e-5)
