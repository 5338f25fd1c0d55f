"""An evaluation as a whole: what it reports, what it keeps, and what it does not do twice."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from lit_isdpo.evaluation import evaluator as module
from lit_isdpo.evaluation import statistics
from lit_isdpo.evaluation.evaluator import Evaluator, Outcome
from lit_isdpo.evaluation.judge import Judge, Verdict
from lit_isdpo.evaluation.statistics import sampled_kl
from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.generation import Sampling, Vocabulary
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import AdapterOffReference, ResidentReference
from lit_isdpo.types import ProbePrompt, Prompt, Response

PROMPTS = [
    ProbePrompt([1, 5 + number], f"prompt {number}", "a chosen one", number, f"source {number}") for number in range(12)
]
SAMPLING = Sampling(num_responses=2, max_new_tokens=6, temperature=0.8, top_p=0.9, batch_size=10)
KL_SAMPLING = Sampling(max_new_tokens=5, batch_size=10)


class LengthReward:
    """Longer is better; fails on a prompt that is not the source."""

    def __init__(self, identity: str = "length") -> None:
        self.identity = identity
        self.num_scored = 0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
        assert all(str(prompt).startswith("source ") for prompt in prompts)
        self.num_scored += len(responses)
        return [float(len(response)) for response in responses]


class LengthJudge(Judge):
    """Says what LengthReward says; of its first question, nothing."""

    def __init__(self) -> None:
        self.identity = "judge of lengths"
        self.calls = 0

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        self.calls += 1
        scores = [float(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(first, second, strict=True)]
        if self.calls == 1:
            scores[0] = float("nan")
        return [Verdict(score, score, score) for score in scores]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bootstrap has tests of its own."""
    for place, name in ((module, "bootstrap_interval"), (statistics, "length_controlled_win_rate")):
        monkeypatch.setattr(place, name, partial(getattr(place, name), num_resamples=50))


@pytest.fixture
def models(tiny_llama: PreTrainedModel) -> tuple[LogProbModel, ResidentReference]:
    """A policy, and a reference that is another model."""
    torch.manual_seed(1)
    other = type(tiny_llama)(tiny_llama.config)
    return LogProbModel(tiny_llama), ResidentReference(LogProbModel(other))


def evaluate(folder: Path, models: tuple[LogProbModel, ResidentReference | None], **options: Any) -> Outcome:
    vocabulary = Vocabulary(lambda ids: " ".join(map(str, ids)), [2], 0)
    options = {"kl_prompts": 7, "kl_sampling": KL_SAMPLING, **options}
    return Evaluator(PROMPTS, vocabulary, SAMPLING, folder=folder, **options)(*models)


def test_keys_files_and_samples(models: tuple[LogProbModel, ResidentReference], tmp_path: Path) -> None:
    outcome = evaluate(tmp_path, models, reward=LengthReward())
    values = outcome.values
    for key in ("reward", "win_rate", "win_rate_lc", "win_rate_vs_chosen", "kl/rao_blackwell", "kl/k1", "kl/k3"):
        assert values[f"{key}_low"] <= values[key] <= values[f"{key}_high"]
        assert values[f"{key}_stderr"] >= 0
    assert values["kl/rao_blackwell"] > 0
    assert 0 <= values["kl/cut_fraction"] <= 1
    assert values["chosen/reward"] == len("a chosen one")
    assert "reference/response_length" in values
    table = pd.read_parquet(outcome.files["policy"])
    assert table.row_id.tolist() == [row for row in range(12) for _ in range(2)]
    assert (table["reward/length"] == table.response.str.len()).all()
    assert values["reward"] == pytest.approx(table["reward/length"].mean())
    ref_table = pd.read_parquet(outcome.files["reference"])
    wins = [
        float(own > other) + (own == other) / 2
        for row in range(12)
        for own in table["reward/length"][table.row_id == row]
        for other in ref_table["reward/length"][ref_table.row_id == row]
    ]
    assert values["win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert outcome.samples["policy"][3].prompt == "prompt 3"
    assert outcome.samples["policy"][3].response == table.response[6]


def test_the_kl_has_samples_of_its_own_at_temperature_1(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    draw = module.sample

    def watched(model: LogProbModel, prompts: Any, sampling: Sampling, *place: Any) -> Any:
        asked.append((sampling.temperature, sampling.top_p, sampling.num_responses, sampling.max_new_tokens))
        return draw(model, prompts, sampling, *place)

    monkeypatch.setattr(module, "sample", watched)
    evaluate(tmp_path, models)
    assert set(asked) == {(0.8, 0.9, 2, 6), (1.0, 1.0, 1, 5)}
    with pytest.raises(AssertionError):
        evaluate(tmp_path, models, kl_sampling=SAMPLING)


def test_padding_that_was_sampled_before_it_was_known_is_not_taken_up(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path
) -> None:
    def largest(outcome: Outcome) -> int:
        texts = [text for owner in ("policy", "reference") for text in pd.read_parquet(outcome.files[owner]).response]
        return max(int(word) for text in texts for word in text.split())

    before = evaluate(tmp_path, models)
    assert largest(before) >= 40, "the test would see nothing"
    for model in (models[0], models[1].model):
        model.num_tokens = 50
    assert evaluate(tmp_path, models).files == before.files, "all are tokens"
    for model in (models[0], models[1].model):
        model.num_tokens = 40
    assert largest(evaluate(tmp_path, models)) < 40


def test_a_second_evaluation_samples_and_scores_nothing(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(tmp_path, models, reward=LengthReward())

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "sample", never)
    monkeypatch.setattr(module, "sampled_kl", never)
    reward = LengthReward()
    assert evaluate(tmp_path, models, reward=reward) == first
    assert reward.num_scored == 0
    other = LengthReward("another")
    again = evaluate(tmp_path, models, reward=other)
    assert other.num_scored == 12 * (2 + 2 + 1), "the responses are the same, the scores new"
    assert {"reward/length", "reward/another"} <= set(pd.read_parquet(again.files["policy"]))


def test_policies_share_the_references_responses(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path
) -> None:
    policy, _ = models
    first = evaluate(tmp_path, models)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.1)
    second = evaluate(tmp_path, models)
    assert second.files["policy"] != first.files["policy"]
    assert second.files["reference"] == first.files["reference"]
    assert second.files["chosen"] == first.files["chosen"]


def test_a_base_under_an_adapter_shares_the_responses_of_the_base(
    models: tuple[LogProbModel, ResidentReference], tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    base = evaluate(tmp_path, (models[0], ResidentReference(LogProbModel(deepcopy(tiny_llama)))))
    config = parse_adapter({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    policy = LogProbModel(tiny_llama, adapter=Adapter(tiny_llama, config))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, tiny_llama.parameters()):
            parameter.fill_(0.3)
    adapted = evaluate(tmp_path, (policy, AdapterOffReference(policy)))
    assert adapted.files["reference"] == base.files["reference"]
    assert adapted.files["policy"] != base.files["policy"]
    assert adapted.values["kl/rao_blackwell"] > 0


def test_without_a_reference_what_needs_one_is_left_out(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path
) -> None:
    outcome = evaluate(tmp_path, (models[0], None), reward=LengthReward())
    assert set(outcome.files) == {"policy", "chosen"}
    assert "win_rate_vs_chosen" in outcome.values
    assert not any(key.startswith(("kl/", "reference/")) or key == "win_rate" for key in outcome.values)


def test_a_judge_is_asked_again_for_what_it_did_not_answer_and_then_never(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path
) -> None:
    judge = LengthJudge()
    first = evaluate(tmp_path, models, judge=judge)
    assert judge.calls == 2, "against the reference, and the chosen ones"
    assert first.values["judge/invalid_fraction"] == pytest.approx(1 / 48)
    second = evaluate(tmp_path, models, judge=judge)
    assert judge.calls == 3
    assert second.values["judge/invalid_fraction"] == 0
    third = evaluate(tmp_path, models, judge=judge, reward=LengthReward())
    assert judge.calls == 3
    assert third.values["judge/win_rate_vs_chosen"] == third.values["win_rate_vs_chosen"]
    assert third.values["judge/win_rate_vs_chosen_lc"] == third.values["win_rate_vs_chosen_lc"]
    own, theirs = (pd.read_parquet(third.files[owner]).response.str.len() for owner in ("policy", "reference"))
    assert third.values["judge/win_rate"] == pytest.approx(((own > theirs) + (own == theirs) / 2).mean())


def probe(models: tuple[LogProbModel, ResidentReference | None], **options: Any) -> Evaluator:
    """An evaluation without files, of prompts of different lengths."""
    prompts = [prompt._replace(prompt_ids=[1, *[5 + row] * (1 + row % 3)]) for row, prompt in enumerate(PROMPTS)]
    sampling = Sampling(**{"num_responses": 5, "max_new_tokens": 6, "batch_size": 7, **options.pop("sampling", {})})
    vocabulary = Vocabulary(lambda ids: " ".join(map(str, ids)), [2], 0)
    return Evaluator(prompts, vocabulary, sampling, kl_prompts=len(prompts), **options)


class SourceReward(LengthReward):
    """The number of the prompt."""

    def __init__(self, number: type[int] | type[float] = float) -> None:
        super().__init__("source")
        self.number = number

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
        return [self.number(str(prompt).split()[1]) for prompt in prompts]


def test_a_probe_keeps_no_files_and_goes_by_the_callers_order(
    models: tuple[LogProbModel, ResidentReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluator = probe(models, reward=SourceReward(), proxy=LengthReward())
    outcome = evaluator(*models)
    assert [text.prompt for text in outcome.samples["policy"]] == [prompt.text for prompt in PROMPTS]
    assert [text.reward for text in outcome.samples["policy"]] == list(range(12))
    assert evaluator.reward_key == "reward", "that of a task of the lab is gold"
    assert outcome.values["reward"] == pytest.approx(5.5)
    assert outcome.values["win_rate"] == 0.5, "both answer the same prompts"
    assert outcome.values["reward_stderr"] == pytest.approx(torch.arange(12.0).std().item() / 12**0.5)
    assert outcome.values["kl/rao_blackwell"] > 0
    assert not {"kl/cut_fraction", "win_rate_lc", "chosen/reward"} & set(outcome.values)
    assert outcome.files == {}
    assert list(tmp_path.iterdir()) == []


def test_a_probe_asks_the_reference_once_and_the_policy_each_time(
    models: tuple[LogProbModel, ResidentReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[LogProbModel] = []
    draw = module.sample
    monkeypatch.setattr(module, "sample", lambda model, *call: asked.append(model) or draw(model, *call))
    evaluator = probe(models, sampling={"batch_size": 128}, reward=LengthReward())
    first, second = evaluator(*models), evaluator(*models)
    policy, reference = models[0], models[1].model
    assert asked == [policy, reference, policy]
    assert first == second, "the same seed serves every validation"


def test_a_reward_may_give_whole_numbers(models: tuple[LogProbModel, ResidentReference]) -> None:
    """Lengths and counts are such; their means are not."""
    of_int, of_float = (probe(models, reward=SourceReward(number))(*models) for number in (int, float))
    assert of_int == of_float


class AlternatingReward(LengthReward):
    """0 and 1 in turn."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
        return [float(number % 2) for number in range(len(responses))]


def test_prompts_are_the_sample_and_not_responses(models: tuple[LogProbModel, ResidentReference]) -> None:
    """Rewards that differ within each prompt only have a standard error of 0."""
    sampling = {"num_responses": 2, "batch_size": 24}
    values = probe(models, reward=AlternatingReward("alternating"), sampling=sampling)(*models).values
    assert values["reward"] == 0.5
    assert values["reward_stderr"] == 0
    one = {"num_responses": 1, "batch_size": 24}
    values = probe(models, reward=AlternatingReward("alternating"), sampling=one)(*models).values
    assert values["reward_stderr"] == pytest.approx((12 * 0.25 / 11) ** 0.5 / 12**0.5)


def test_the_reference_is_scored_once(models: tuple[LogProbModel, ResidentReference]) -> None:
    class Counting(SourceReward):
        calls = 0

        def __call__(self, prompts: Sequence[Prompt], *others: Any) -> list[float]:
            Counting.calls += len(prompts)
            return super().__call__(prompts, *others)

    evaluator = probe(models, reward=Counting())
    evaluator(*models)
    evaluator(*models)
    assert Counting.calls == 3 * 12 * 5, "the policy twice, the reference once"


def test_the_proxy_is_logged_beside_the_gold_reward(models: tuple[LogProbModel, ResidentReference]) -> None:
    """The gold reward decides who wins."""
    gold = SourceReward()
    evaluator = probe(models, reward=gold, proxy=LengthReward())
    evaluator.__class__ = type("Gold", (Evaluator,), {"reward_key": "gold_reward"})
    values = evaluator(*models).values
    assert values["gold_reward"] == pytest.approx(5.5)
    assert values["win_rate"] == 0.5
    assert values["reward"] != values["gold_reward"]


def test_a_chunk_of_the_logits_changes_no_kl(
    models: tuple[LogProbModel, ResidentReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches go through the decoder; only the logits exist a few tokens at a time."""
    policy, reference = models
    prompts, responses = (
        [[1, 5], [1, 7, 8], [1]],
        [Response([4, 6, 2], True), Response([8], False), Response([2], True)],
    )
    decoded: list[int] = []
    states = policy.completion_states
    monkeypatch.setattr(policy, "completion_states", lambda tokens: decoded.append(1) or states(tokens))
    widths: list[int] = []
    logits = policy.token_logits
    monkeypatch.setattr(policy, "token_logits", lambda some: widths.append(len(some)) or logits(some))
    options = {"pad_token_id": 0, "batch_size": 3}
    whole = sampled_kl(policy, reference, prompts, responses, **options)
    monkeypatch.setattr("lit_isdpo.policy.logprob_model.LOGITS_BUDGET", 2 * policy.vocabulary_size)
    in_chunks = sampled_kl(policy, reference, prompts, responses, **options)
    torch.testing.assert_close(in_chunks, whole)
    assert len(decoded) == 2, "one forward for all rows"
    assert widths == [5, 2, 2, 1]
