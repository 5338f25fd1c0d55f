"""Online methods, and the KL on the policy's own samples: what is sampled, what is asked, and that it learns."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from lit_isdpo.cli import main
from lit_isdpo.data.collation import collate_completions, collate_pairs
from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.objective.losses import IPOLoss
from lit_isdpo.objective.on_policy import GRPOObjective, OnlineDPOObjective, OnPolicyObjective, RLOOObjective
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.training.online import Judge, OnlineModule
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.rollouts import (
    OnPolicyKL,
    RolloutConfig,
    SampledResponses,
    imitate_rollouts,
    sample_rollouts,
    score_rollouts,
)
from lit_isdpo.types import InputError, Prompt, Ranks, Response, TokenBatch, TokenizedPair
from tests.runs import newest_run, read_metrics
from tests.training.test_resume import assert_same_log

CONFIGS = Path(__file__).parents[2] / "configs"
PAIRS = [TokenizedPair([1, 5, 7], [6, 2], [8, 9, 2]), TokenizedPair([1], [7, 2], [9, 2])]
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


class WordReward:
    """1 for a response that has the word, else 0; remembers what it was asked.

    Args:
        word: that counts.
    """

    def __init__(self, word: str = "good") -> None:
        self.word = word
        self.asked: list[tuple[list[Prompt], list[str], list[bool]]] = []
        self.told: list[list[float]] = []

    @property
    def identity(self) -> str:
        return f"word {self.word}"

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        self.asked.append((list(prompts), list(responses), list(finished)))
        self.told.append([float(self.word in response.split()) for response in responses])
        return self.told[-1]


REWARD = f"--model.reward={WordReward.__module__}.{WordReward.__name__}"


@pytest.fixture(scope="module")
def online(tiny: list[str]) -> list[str]:
    """The tiny fit by RLOO, for a word."""
    return [
        *("--model=OnlineModule", REWARD, *tiny, "--probe.num_prompts=0", "--data.micro_batch_size=4"),
        *("--model.rollout.max_new_tokens=6", "--model.objective.beta=0.1"),
    ]


@pytest.fixture(scope="module")
def hypo(tiny: list[str]) -> list[str]:
    """The tiny fit by HyPO."""
    return [
        *(*tiny, "--probe.num_prompts=0", "--data.micro_batch_size=4", "--model.weighting=UniformWeighting"),
        *("--model.on_policy_kl.weight=0.1", "--model.on_policy_kl.max_new_tokens=6"),
    ]


@pytest.fixture(scope="module")
def run(online: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit of RLOO."""
    root = tmp_path_factory.mktemp("online")
    return fit([*online, "--trainer.max_steps=2", "--probe.num_prompts=4"], root)


def fit(options: list[str], root: Path) -> Path:
    main(["fit", *options, f"--trainer.default_root_dir={root}"])
    return newest_run(root)


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def end_of(run: Path) -> dict[str, Any]:
    state = torch.load(last(run), weights_only=True)
    return {key: state[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


@pytest.fixture
def module(model_dir: str) -> OnlineModule:
    """Loaded, at optimizer step 0 of no fit; its data has the same prompt at every row."""
    module = OnlineModule(WordReward(), PolicyConfig(path=model_dir), objective=RLOOObjective(0.1))
    at(module)
    module.configure_model()
    return module


def at(module: OnlineModule | PreferenceModule, *, seed: int = 0, step: int = 0, rank: int = 0) -> None:
    """Puts it there in a run."""

    class There(Trainer):
        global_step, global_rank = step, rank

    module.trainer = trainer = There(accelerator="cpu", max_steps=1, **QUIET)
    splits = SimpleNamespace(
        prompt=lambda split, row_id: f"{split} prompt {row_id}", row_name=lambda split, row_id: f"{split} row {row_id}"
    )
    data = PreferenceDataModule(seed=seed)
    data.splits = splits  # type: ignore[assignment]
    trainer.datamodule = data  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the lab's files are written once."""
    return tmp_path_factory.mktemp("lab")


ROLLOUTS = {"reward/mean", "reward/std", "reward/equal_fraction", "entropy", "response_length", "finished_fraction"}


@pytest.mark.parametrize("name", ["rloo", "grpo", "online_dpo", "hypo", "is_hypo", "chi_hypo"])
def test_each_methods_file_fits_and_logs(name: str, lab: Path) -> None:
    """Over the experiment on verbosity, whose gold reward is what online methods are trained on."""
    files = [f"--config={CONFIGS / 'experiment' / 'verbosity_dpo.yaml'}", f"--config={CONFIGS / 'model' / name}.yaml"]
    few = ["--data.train={path: lab:verbosity/pairs, first: 32}", "--data.batch_size=8"]
    few += ["--data.val={path: lab:verbosity/pairs, split: validation, first: 16}", "--trainer.max_steps=2"]
    logged = read_metrics(fit([*files, *few, "--probe.num_prompts=4", "--trainer.enable_progress_bar=false"], lab))
    is_online = "hypo" not in name
    keys = {f"train/{key}" for key in ROLLOUTS} if is_online else {"train/weights/mean", "train/rewards/margins"}
    keys |= {"train/loss", "train/kl/k1", "train/grad_norm"}
    assert {key: list(logged[key]) for key in keys} == {key: [0, 1] for key in keys}
    keys |= {"val/loss", "val/weights/mean", "val/kl/rao_blackwell", "val/gold_reward", "val/exact/kl"}
    assert all(math.isfinite(value) for key in keys for value in logged[key].values())
    assert {key for key in logged if key.startswith("perf/")} == {"perf/pairs_per_second", "perf/peak_memory_gib"}
    assert logged["train/kl/k1"][0] == pytest.approx(0, abs=1e-5)
    assert logged["train/kl/k1"][1] != 0
    assert ("val/reward" in logged) == is_online
    if is_online:
        assert logged["val/reward"] == logged["val/gold_reward"]
        assert logged["val/reward_stderr"] == logged["val/gold_reward_stderr"]


def test_a_reward_is_learned(model_dir: str, pairs_file: str) -> None:
    """A word that a random model says in one of a hundred responses of eight tokens."""
    reward = WordReward()
    module = OnlineModule(
        reward,
        PolicyConfig(path=model_dir),
        objective=RLOOObjective(0.01),
        rollout=RolloutConfig(num_responses=4, max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    data = PreferenceDataModule(train=pairs_file, val_size=8, batch_size=32, max_length=64, max_prompt_length=48)
    trainer = Trainer(accelerator="cpu", max_steps=40, use_distributed_sampler=False, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    means = [sum(told) / len(told) for told in reward.told]
    assert len(means) == 40
    assert sum(means[:3]) / 3 < 0.05
    assert sum(means[-3:]) / 3 > 0.5


def test_the_policy_begins_as_its_reference(module: OnlineModule) -> None:
    loss = module.training_step(collate_pairs(PAIRS, [0, 1], pad_token_id=0), 0)
    values = module.train_metrics.compute()
    assert values["kl/k1"].item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.policy.parameters())
    assert all(parameter.grad is None for parameter in module.reference.model.parameters())


def test_scores_are_the_models_own_on_the_same_tokens(module: OnlineModule) -> None:
    """Each response alone, without padding; the reference's are another model's, and have no gradient."""
    with torch.no_grad():
        for parameter in module.reference.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    sampled = sample_rollouts(module, batch, 0, RolloutConfig(num_responses=3, max_new_tokens=5))
    assert sampled.prompts == [[1, 5, 7]] * 3 + [[1]] * 3
    rewards = [float(number) for number in range(6)]
    rollouts = score_rollouts(module.policy, module.reference, sampled, module.vocabulary.pad_token_id, rewards)
    assert rollouts.rewards.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rollouts.per_token_logps.requires_grad
    assert not rollouts.ref_per_token_logps.requires_grad
    for number, (prompt, response) in enumerate(zip(sampled.prompts, sampled.responses, strict=True)):
        alone = collate_completions([prompt], [response.token_ids], pad_token_id=0)
        place = divmod(number, 3)
        torch.testing.assert_close(rollouts.logps[place], module.policy(alone).logps[0])
        torch.testing.assert_close(rollouts.ref_logps[place], module.reference.model(alone).logps[0])
        assert rollouts.num_tokens[place] == len(response.token_ids)
        assert sampled.finished[place] == response.finished
    assert (rollouts.logps - rollouts.ref_logps).abs().min() > 1e-3
    assert not score_rollouts(module.policy, module.reference, sampled, 0).rewards.any()


def test_samples_are_a_function_of_seed_step_micro_batch_and_rank(module: OnlineModule) -> None:
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    config = RolloutConfig(num_responses=4, max_new_tokens=8)

    def drawn(batch_idx: int = 0, **place: int) -> list[Response]:
        at(module, **place)
        torch.rand(1)  # the global state is of no consequence
        return sample_rollouts(module, batch, batch_idx, config).responses

    first = drawn()
    assert len({tuple(response.token_ids) for response in first}) > 4
    assert drawn() == first
    others = [drawn(1), drawn(seed=1), drawn(step=1), drawn(rank=1), drawn(11), drawn(1, step=1)]
    assert all(one != another for number, one in enumerate([first, *others]) for another in others[number:])


@pytest.mark.parametrize("method", ["online", "hypo"])
@pytest.mark.parametrize("stop", [2, 5])  # in the middle of epochs of 4 steps, of 2 micro-batches each
def test_resume_is_bit_for_bit(method: str, stop: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    options = request.getfixturevalue(method)
    straight = fit([*options, "--trainer.max_steps=6"], tmp_path / "straight")
    stopped = fit([*options, f"--trainer.max_steps={stop}"], tmp_path / "parts")
    resumed = fit([*options, "--trainer.max_steps=6", f"--ckpt_path={last(stopped)}"], tmp_path / "parts")
    ours, expected = end_of(resumed), end_of(straight)
    assert ours["global_step"] == 6
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)
    assert_same_log(straight, resumed, since=stop)
    assert read_metrics(straight)["train/kl/k1"][5] != 0


def train(model_dir: str, pairs_file: str, reward: WordReward, **options: Any) -> OnlineModule:
    """One optimizer step on eight prompts, whose tokens are cut to eight unless options say otherwise."""
    module = OnlineModule(
        reward,
        PolicyConfig(path=model_dir),
        rollout=RolloutConfig(num_responses=3, max_new_tokens=6),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    lengths = {"max_length": 40, "max_prompt_length": 8} | options
    data = PreferenceDataModule(train=pairs_file, val_size=8, batch_size=8, **lengths)
    trainer = Trainer(accelerator="cpu", max_steps=1, use_distributed_sampler=False, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    return module


def test_the_reward_is_asked_with_the_datas_own_prompts(model_dir: str, pairs_file: str, tmp_path: Path) -> None:
    """A prompt whose tokens are cut, and a conversation, are asked as they are written."""
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    talk = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in rows
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    longer = {"max_length": 256, "max_prompt_length": 128}
    for file, written, options in ((pairs_file, rows, {}), (str(tmp_path / "talk.jsonl"), talk, longer)):
        reward = WordReward()
        module = train(model_dir, file, reward, **options)
        ((prompts, responses, finished),) = reward.asked
        assert len(prompts) == len(responses) == len(finished) == 8 * 3
        known = [row["prompt"] for row in written]
        assert all(prompt in known for prompt in prompts)
        assert prompts[0::3] == prompts[1::3] == prompts[2::3]
        assert len({str(prompt) for prompt in prompts}) == 8
        special = module.tokenizer.all_special_tokens
        assert not any(token in response for token in special for response in responses)


def test_micro_batches_take_the_step_of_all_their_prompts(model_dir: str, pairs_file: str) -> None:
    """Other samples in other sizes; each prompt is asked once, all the same."""
    of_size = {}
    for size in (8, 4, 1):
        reward = WordReward()
        train(model_dir, pairs_file, reward, micro_batch_size=size)
        assert [len(told) for told in reward.told] == [size * 3] * (8 // size)
        of_size[size] = sorted(str(prompt) for prompts, _, _ in reward.asked for prompt in prompts)
    assert of_size[8] == of_size[4] == of_size[1]


@pytest.mark.parametrize("method", ["online", "hypo"])
def test_a_window_is_logged_as_a_whole(method: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The KL and the loss of an accumulated step are the means of what its micro-batches returned."""
    options = request.getfixturevalue(method)
    cls = OnlineModule if method == "online" else PreferenceModule
    returned: list[float] = []
    step = cls.training_step

    def spied(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        returned.append(loss.item())
        return loss

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cls, "training_step", spied)
        logged = read_metrics(fit([*options, "--trainer.max_steps=2", "--data.micro_batch_size=2"], tmp_path))
    assert len(returned) == 8
    losses = [sum(returned[:4]) / 4, sum(returned[4:]) / 4]
    assert list(logged["train/loss"].values()) == pytest.approx(losses, abs=1e-6)


def test_what_was_cut_loses_the_penalty_and_nothing_else_does(module: OnlineModule) -> None:
    module.judge = replace(module.judge, missing_eos_penalty=0.75)
    (good,) = module.tokenizer.encode(" good", add_special_tokens=False)[-1:]
    ends = module.tokenizer.eos_token_id
    responses = [
        Response([good, ends], True),
        Response([good, good], False),
        Response([ends], True),
        Response([good, 30, good], False),
    ]
    sampled = SampledResponses([[1, 5, 7]] * 2 + [[1]] * 2, responses, 2)
    assert sampled.finished.tolist() == [[True, False], [True, False]]
    batch = collate_pairs(PAIRS, [7, 3], pad_token_id=0)
    told = module._rewards(batch, sampled)
    ((prompts, texts, finished),) = module.reward.asked  # type: ignore[attr-defined]
    assert prompts == ["train prompt 7", "train prompt 7", "train prompt 3", "train prompt 3"]
    assert [text.split() for text in texts[:3]] == [["good"], ["good", "good"], []]
    assert finished == [True, False, True, False]
    scores = module.reward.told[0]  # type: ignore[attr-defined]
    assert scores[:3] == [1, 1, 0]
    assert told == [scores[0], scores[1] - 0.75, scores[2], scores[3] - 0.75]


def test_the_datas_weights_multiply_a_prompts_loss(module: OnlineModule) -> None:
    module.judge = Judge(lambda prompts, responses, finished: [float(len(response)) for response in responses])  # type: ignore[arg-type]
    plain = module.training_step(collate_pairs(PAIRS, [0, 1], pad_token_id=0), 0).item()
    assert abs(plain) > 1
    weighted = [pair._replace(weight=3.0) for pair in PAIRS]
    module.train_metrics.reset()
    assert module.training_step(collate_pairs(weighted, [0, 1], pad_token_id=0), 0).item() == pytest.approx(3 * plain)
    assert module.train_metrics.compute()["loss"].item() == pytest.approx(3 * plain)


class LinearReward(torch.nn.Linear, WordReward):
    """A reward that is a module."""

    def __init__(self) -> None:
        super().__init__(1, 1)


def test_a_reward_that_is_a_module_is_no_part_of_this_one(model_dir: str) -> None:
    module = OnlineModule(LinearReward(), PolicyConfig(path=model_dir))
    at(module)
    module.configure_model()
    assert not any("reward" in key for key in torch.nn.Module.state_dict(module))
    assert module.method == (
        "RLOOObjective",
        {"beta": 0.05, "num_responses": 2, "missing_eos_penalty": 0.0, "reward": "LinearReward"},
    )


def test_methods_are_told_apart(model_dir: str) -> None:
    def method(objective: OnPolicyObjective) -> tuple[str, dict[str, Any]]:
        return OnlineModule(WordReward(), PolicyConfig(path=model_dir), objective=objective).method

    name, numbers = method(OnlineDPOObjective(IPOLoss("sum", beta=0.2)))
    assert (name, numbers["beta"], numbers["logratio"]) == ("OnlineDPOObjective x IPOLoss", 0.2, "sum")
    assert method(GRPOObjective(scale_rewards=False)) != method(GRPOObjective())


def test_a_policy_that_is_not_its_reference_stops_the_first_step(module: OnlineModule) -> None:
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="At the first step the policy is the reference, yet log pi/ref is up to"):
        module.training_step(batch, 0)
    at(module, step=1)
    assert module.training_step(batch, 0).isfinite()


def test_held_out_pairs_are_measured_without_weights(module: OnlineModule) -> None:
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    module.validation_step(batch, 0)
    assert module.val_metrics.compute()["loss"].item() == pytest.approx(math.log(2))
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(0.5)
    module.val_metrics.reset()
    module.validation_step(batch, 0)
    values = module.val_metrics.compute()
    pairs = module.comparison.pair_logps(module.policy, batch, "val")
    assert values["loss"].item() == pytest.approx(module.comparison.loss(pairs).mean().item())
    assert values["weights/mean"].item() != pytest.approx(1.0, abs=0.01), "but the weights are logged"


def test_the_datas_weights_multiply_the_kl_of_samples_too(model_dir: str) -> None:
    module = PreferenceModule(PolicyConfig(path=model_dir), on_policy_kl=OnPolicyKL(weight=0.5, max_new_tokens=5))
    at(module, step=1)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    plain = module.training_step(collate_pairs(PAIRS, [0, 1], pad_token_id=0), 0).item()
    weighted = [pair._replace(weight=3.0) for pair in PAIRS]
    assert module.training_step(collate_pairs(weighted, [0, 1], pad_token_id=0), 0).item() == pytest.approx(3 * plain)


def test_the_kl_of_samples_is_added_with_its_weight(model_dir: str) -> None:
    """Beside the loss of the pairs, which is what it is without."""
    losses = {}
    for weight in (None, 0.5, 1.5):
        kl = None if weight is None else OnPolicyKL(weight=weight, max_new_tokens=5)
        module = PreferenceModule(PolicyConfig(path=model_dir), on_policy_kl=kl)
        at(module, step=1)
        module.configure_model()
        with torch.no_grad():
            for parameter in module.policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        losses[weight] = module.training_step(collate_pairs(PAIRS, [0, 1], pad_token_id=0), 0).item()
        values = module.train_metrics.compute()
        assert ("kl/k1" in values) == (weight is not None)
        if weight is not None:
            assert losses[weight] - losses[None] == pytest.approx(weight * values["kl/k1"].item(), abs=1e-6)
            assert values["kl/k1"].abs() > 1e-3
            assert module.method[1]["on_policy_kl"] == weight
            module.train_metrics.forget()
            assert not module.train_metrics.totals()
        else:
            assert "on_policy_kl" not in module.method[1]


@pytest.mark.parametrize(("layout", "prompt"), [("plain", 3), ("shared", 2)])
def test_a_plan_takes_sampled_responses_to_be_as_long_as_they_may_be(
    module: OnlineModule, layout: Literal["plain", "shared"], prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows of one sequence each, and with a gradient, as a step would have, behind the longest prompt.

    Of a row with both responses its length and the longer of them are known: the shorter is taken to be as long.
    """
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0, layout=layout)
    shapes, decode = [], LogProbModel.decode

    def watched(self: LogProbModel, tokens: TokenBatch) -> torch.Tensor:
        shapes.append(tuple(tokens.input_ids.shape))
        return decode(self, tokens)

    monkeypatch.setattr(LogProbModel, "decode", watched)
    for number in (2, 3, 5):
        config = RolloutConfig(num_responses=number, max_new_tokens=7)
        rollouts = imitate_rollouts(module.policy, module.reference, batch, config)
        assert rollouts.per_token_logps.shape == rollouts.ref_per_token_logps.shape == (2, number, 7)
        assert rollouts.mask.all()
        assert rollouts.rewards.shape == (2, number)
        assert rollouts.per_token_logps.requires_grad
        assert not rollouts.ref_per_token_logps.requires_grad
        assert shapes[-2:] == [(2 * number, prompt + 7)] * 2


def test_a_reward_that_fails_on_another_rank_stops_this_one(
    module: OnlineModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or this one would wait for it in the next collective."""
    elsewhere = InputError("model.reward: of the other rank")
    ranks = Ranks(rank=0, size=2, gather=lambda own: [own, (None, elsewhere)])
    monkeypatch.setattr(OnlineModule, "ranks", ranks)
    with pytest.raises(InputError, match="of the other rank"):
        module.training_step(collate_pairs(PAIRS, [0, 1], pad_token_id=0), 0)


def test_defaults_are_named_by_their_classes(model_dir: str) -> None:
    start = PolicyConfig(path=model_dir)
    names = [module.method[0] for module in (PreferenceModule(start), OnlineModule(WordReward(), start))]
    assert names == ["ImportanceWeighting x DPOLoss", "RLOOObjective"]


NULL = "--model.reference=null"
CACHE = "--model.reference.cache=true"


@pytest.mark.parametrize("told", [[1.0], [1.0, math.nan, 0.0, 0.0]], ids=["too few", "not finite"])
def test_a_reward_that_does_not_score_every_response_is_named(module: OnlineModule, told: list[float]) -> None:
    module.judge = Judge(lambda prompts, responses, finished: told)  # type: ignore[arg-type]
    sampled = SampledResponses([[1, 5, 7]] * 2 + [[1]] * 2, [Response([5], False)] * 4, 2)
    with pytest.raises(InputError, match="must give a finite number to each of 4 responses, and gave"):
        module._rewards(collate_pairs(PAIRS, [7, 3], pad_token_id=0), sampled)


PACKED = ["--data.packing_length=128", "--model.policy.attn_implementation=flex_attention"]


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("online", [NULL], "model: sampled responses are held to a reference, so model.reference cannot be null."),
        ("online", [CACHE], "model: responses that are sampled in training have no cached log-probs; leave"),
        ("online", ["--model.rollout.num_responses=1"], "model.rollout.num_responses must be at least 2, not 1."),
        ("online", ["--model.rollout.max_new_tokens=0"], "model.rollout.max_new_tokens must be at least 1, not 0."),
        ("online", ["--model.rollout.batch_size=0"], "model.rollout.batch_size must be at least 1, not 0."),
        (
            "online",
            ["--model.missing_eos_penalty=-1"],
            "model.missing_eos_penalty must be a finite number of at least 0",
        ),
        ("online", ["--model.missing_eos_penalty=.inf"], "model.missing_eos_penalty"),
        ("online", ["--model.objective.beta=0"], "model.objective.beta must be a finite number above 0, not 0.0."),
        ("online", ["--model.rollout.max_new_tokens=100000"], "model.rollout.max_new_tokens: 100000 tokens behind a"),
        ("hypo", ["--model.on_policy_kl.max_new_tokens=100000"], "model.on_policy_kl.max_new_tokens: 100000 tokens"),
        ("online", PACKED, "data.packing_length: online methods sample from single prompts; leave the option out."),
        ("online", ["--data=SFTDataModule"], "data: online methods take their prompts from PreferenceDataModule."),
        ("online", ["--model.reward=LabReward", "--model.reward.task=lab:poems"], "reward.task: the lab has no task"),
        ("online", ["--model.reward=LabReward", "--model.reward.task=lab:verbosity"], "knows its eight prompts"),
        (
            "tiny",
            ["--model=OnlineModule"],
            "model.reward is missing, and has no default; it takes LabReward or RewardModel",
        ),
        (
            "online",
            ["--model.objective=RLOO"],
            "--model.objective: 'RLOO' is no file and no class; known are GRPOObjective, OnlineDPOObjective, RLOOObj",
        ),
        ("tiny", ["--model.loss=Returning"], "known are CDPOLoss,"),
        ("tiny", ["--model.loss=OneSidedDPOLoss"], "and ImportanceWeighting would weigh them twice; use Uni"),
        ("online", ["--model.mu=data"], "data.val: model.mu is 'data', but"),
        ("hypo", [NULL, "--model.loss=SimPOLoss"], "model.on_policy_kl: sampled responses are held to a reference"),
        ("hypo", [CACHE], "model.on_policy_kl: responses that are sampled in training have no cached log-probs"),
        ("hypo", PACKED, "data.packing_length: model.on_policy_kl samples from single prompts; leave one of"),
        ("hypo", ["--model.on_policy_kl.weight=0"], "model.on_policy_kl.weight must be a finite number above 0, not 0"),
        ("hypo", ["--model.on_policy_kl.weight=.inf"], "model.on_policy_kl.weight"),
        ("hypo", ["--model.on_policy_kl.num_responses=1"], "model.on_policy_kl.num_responses must be at least 2"),
        ("hypo", ["--model.on_policy_kl.max_new_tokens=0"], "model.on_policy_kl.max_new_tokens must be at least 1"),
        ("hypo", ["--model.on_policy_kl.batch_size=0"], "model.on_policy_kl.batch_size must be at least 1"),
    ],
)
def test_what_is_refused_in_a_sentence(
    method: str,
    arguments: list[str],
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = request.getfixturevalue(method)
    if arguments[0] == "--model=OnlineModule":
        options, arguments = [*arguments, *options], []
    with pytest.raises(SystemExit) as end:
        main(["fit", *options, *arguments, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"])
    assert end.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said


def test_margins_of_pairs_are_not_left_out_in_silence(
    online: list[str], pairs_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) | {"margin": 0.5} for line in Path(pairs_file).read_text().splitlines()]
    with_margins = tmp_path / "margins.jsonl"
    with_margins.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"--data.train={with_margins}", f"--data.val={with_margins}", "--data.margin_column=margin"]
    with pytest.raises(SystemExit):
        main(["fit", *online, *data, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"])
    assert "data.margin_column: online methods know no margins of pairs" in capsys.readouterr().err


def test_precompute_has_nothing_to_do(online: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["precompute", *online, f"--trainer.default_root_dir={tmp_path}"])
    assert end.value.code == 2
    assert "precompute: there is no reference that scores pairs in training" in capsys.readouterr().err


def test_a_plan_of_each(online: list[str], hypo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (online, hypo):
        main(["plan", *options, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"])
        printed = capsys.readouterr().out
        for kind in ("parameters", "reference", "optimizer state", "gradients", "activations"):
            assert f"│ {kind} " in printed, kind
        assert "2 micro-batch(es) of 4 row(s) per step" in printed


def test_the_other_verbs_take_its_checkpoint(run: Path, online: list[str], pairs_file: str, tmp_path: Path) -> None:
    options = [*online, f"--ckpt_path={last(run)}", f"--trainer.default_root_dir={tmp_path}"]
    main(["validate", *options, "--probe.num_prompts=4"])
    fitted, validated = read_metrics(run), read_metrics(tmp_path / "version_0")
    for key in ("val/loss", "val/weights/mean", "val/kl/rao_blackwell", "val/reward"):
        assert [*validated[key].values()] == pytest.approx([fitted[key][2]], abs=1e-6), key
    main(["test", *options, f"--data.test={pairs_file}", "--evaluation.num_prompts=4"])
    tested = read_metrics(tmp_path / "version_1")
    assert all(math.isfinite(tested[key][0]) for key in ("test/loss", "test/weights/mean", "test/kl/rao_blackwell"))
    main(["predict", *options, f"--data.test={pairs_file}", "--model.sampling.max_new_tokens=5"])
    rows = [json.loads(line) for line in (tmp_path / "version_2" / "predictions.jsonl").read_text().splitlines()]
    assert [row["row_id"] for row in rows] == list(range(40))
    main(["export", f"--ckpt_path={last(run)}", f"--output_dir={tmp_path / 'exported'}"])
    state = end_of(run)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    for name, tensor in state.items():
        assert torch.equal(exported[name.removeprefix("policy.model.")], tensor), name
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "RLOOObjective" in card
