"""The optimizer follows the config, also when its state comes from a checkpoint; so does the schedule."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from lit_isdpo.training.optimization import build_optimizer, is_decayed
from lit_isdpo.training.optimizer_step import Schedule, ScheduledRate
from lit_isdpo.types import InputError
from tests.runs import read_metrics
from tests.training.test_resume import checkpoint, fit

STEPS = 5  # of which a checkpoint follows the third
SHAPES = {"norm.weight": (3,), "embed.weight": (4, 3), "head.bias": (4,), "head.weight": (4, 3)}
Make = Callable[..., Optimizer]


def made(make: Make, *, decay_norms_and_biases: bool = True) -> tuple[dict[str, Parameter], Optimizer]:
    """Parameters with fixed values, and their optimizer."""
    random = torch.Generator().manual_seed(0)
    named = {name: Parameter(torch.randn(shape, generator=random)) for name, shape in SHAPES.items()}
    return named, build_optimizer(make, named, decay_norms_and_biases=decay_norms_and_biases)


def step(named: dict[str, Parameter], optimizer: Optimizer, number: int) -> None:
    """A step on a gradient that depends on its number."""
    random = torch.Generator().manual_seed(number)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()


def resumed(before: Make, after: Make, **after_options: Any) -> tuple[dict[str, Parameter], Optimizer]:
    """Parameters and optimizer as a fit finds them that goes on with other options."""
    named, optimizer = made(before)
    for number in range(3):
        step(named, optimizer, number)
    others, other = made(after, **after_options)
    for name, parameter in others.items():
        parameter.data.copy_(named[name])
    other.load_state_dict(optimizer.state_dict())
    return others, other


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (AdamW, {"lr": 0.1}, {"lr": 0.01}),
        (AdamW, {"weight_decay": 0.0}, {"weight_decay": 0.5}),
        (AdamW, {"betas": (0.9, 0.999)}, {"betas": (0.5, 0.9)}),
        (AdamW, {"eps": 1e-8}, {"eps": 0.1}),
        (AdamW, {"amsgrad": True}, {"amsgrad": False}),
        (SGD, {"momentum": 0.9}, {"momentum": 0.5}),
        (SGD, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
        (SGD, {"momentum": 0.0}, {"momentum": 0.9}),
    ],
)
def test_options_are_those_of_the_resumed_fit(make: Make, before: dict[str, Any], after: dict[str, Any]) -> None:
    """As in a loop of PyTorch's own that changes them after the third step."""
    named, optimizer = resumed(partial(make, **{"lr": 0.1} | before), partial(make, **{"lr": 0.1} | after))
    expected, _ = made(partial(make, lr=0.1))
    plain = make(expected.values(), **{"lr": 0.1} | before)
    for number in range(STEPS):
        if number == 3:
            plain.param_groups[0].update(after)
        step(expected, plain, number)
    for number in range(3, STEPS):
        step(named, optimizer, number)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter, expected[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("make", [AdamW, partial(SGD, momentum=0.9), Adafactor, partial(Adagrad, lr=0.1)])
def test_state_is_taken_over_by_name_whatever_the_groups(make: Make) -> None:
    """From one group to two by weight decay and back, and once more: each parameter keeps its own state."""
    one, two = partial(make, weight_decay=0.0), partial(make, weight_decay=0.1)
    named, optimizer = resumed(one, two, decay_norms_and_biases=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    again, back = made(one)
    third, split = made(two, decay_norms_and_biases=False)
    back.load_state_dict(optimizer.state_dict())
    split.load_state_dict(optimizer.state_dict())
    expected, plain = made(one)
    for number in range(3):
        step(expected, plain, number)
    for name in SHAPES:
        for parameters, other in ((named, optimizer), (again, back), (third, split)):
            assert_same_state(other.state[parameters[name]], plain.state[expected[name]])


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (AdamW, partial(AdamW, amsgrad=True), "AdamW cannot go on .* has no max_exp_avg_sq"),
        (AdamW, partial(SGD, momentum=0.9), "SGD cannot go on .* has no momentum_buffer"),
        (partial(SGD, momentum=0.9), AdamW, "AdamW cannot go on .* has no exp_avg, exp_avg_sq, step"),
        (AdamW, Adafactor, "Adafactor cannot go on .* has no col_var, row_var, variance"),
    ],
)
def test_an_optimizer_that_cannot_go_on_says_so(before: Make, after: Make, message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.optimizer: {message} \(it has .*\); use the optimizer options of"):
        resumed(before, after)


class Learner(SGD):
    """Learns a number, which it keeps with the options of its groups, as Prodigy does."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        for group in self.param_groups:
            group["num_steps"] = 0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["num_steps"] += 1


def test_what_a_class_learns_beside_its_options_is_taken_over() -> None:
    _, optimizer = resumed(Learner, partial(Learner, lr=0.5, weight_decay=0.1), decay_norms_and_biases=False)
    values = [(group["num_steps"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert values == [(3, 0.5, 0.1), (3, 0.5, 0.0)]


class Strict(AdamW):
    """Loads as bitsandbytes does: without hooks, and only groups like its own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, stored = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in stored]:
            raise ValueError("another number of parameter groups")
        keys = [key for group in stored for key in group["params"]]
        place = dict(zip(keys, [parameter for group in groups for parameter in group["params"]], strict=True))
        state = {place[key]: own for key, own in state_dict["state"].items()}
        taken = [{**new, "params": group["params"]} for group, new in zip(groups, stored, strict=True)]
        self.__setstate__({"state": state, "param_groups": taken})


def test_a_class_with_a_load_of_its_own_follows_the_config() -> None:
    for decays in (0.0, 0.1):
        before, after = partial(Strict, weight_decay=0.1), partial(Strict, lr=1e-2, weight_decay=decays, eps=0.1)
        for all_decay in (True, False):
            _, optimizer = resumed(before, after, decay_norms_and_biases=all_decay)
            rates = [(group["lr"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups]
            assert rates[0] == (1e-2, 0.1, decays)
            assert len(rates) == (1 if all_decay or not decays else 2)
            assert all("exp_avg" in own for own in optimizer.state.values())


class Keyword(SGD):
    """Names none of its options."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


def test_options_that_a_class_does_not_name_are_those_of_the_resumed_fit() -> None:
    _, optimizer = resumed(partial(Keyword, lr=0.1, momentum=0.9), partial(Keyword, lr=0.1, momentum=0.1))
    assert optimizer.param_groups[0]["momentum"] == 0.1


class Late(SGD):
    """Has state from its second step on."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", torch.zeros(())) + 1
                if state["step"] > 1:
                    state["last"] = parameter.grad.clone()
        return super().step(closure)


def test_state_that_comes_late_is_taken_over() -> None:
    _, optimizer = resumed(partial(Late, lr=0.1), partial(Late, lr=0.1))
    assert all("last" in state for state in optimizer.state.values())


def test_adamw_decays_after_adam() -> None:
    """The flag by which they differ is an option of neither's config."""
    _, optimizer = resumed(Adam, AdamW)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_adam_does_not_decay_as_adamw_did() -> None:
    _, optimizer = resumed(AdamW, Adam)
    assert not optimizer.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize("after", [AdamW, Adagrad, SGD])
def test_after_an_optimizer_without_state_any_begins(after: Make) -> None:
    named, optimizer = resumed(SGD, after)
    step(named, optimizer, 3)


def test_another_number_of_tensors_is_refused() -> None:
    optimizer = build_optimizer(SGD, {"a": Parameter(torch.zeros(1))}, decay_norms_and_biases=True)
    with pytest.raises(InputError, match="the checkpoint's optimizer has 4 tensors, and this run trains 1"):
        optimizer.load_state_dict(made(SGD)[1].state_dict())


def test_schedule() -> None:
    cosine = Schedule(decay="cosine", warmup_steps=10, final_factor=0.1)
    assert [cosine.factor(step, 111) for step in (0, 9, 10, 60, 110, 200)] == pytest.approx([0.1, 1, 1, 0.55, 0.1, 0.1])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 7, 8, 9])
def test_the_last_step_has_the_final_factor(decay: Any, warmup_steps: int) -> None:
    schedule = Schedule(decay=decay, warmup_steps=warmup_steps, final_factor=0.25)
    factors = [schedule.factor(step, 8) for step in range(8)]
    if warmup_steps < 7:  # otherwise the warmup takes all steps, or all but the last one
        assert factors[-1] == pytest.approx(0.25)
        assert factors[-2] > 0.26
    assert all(0 < factor <= 1 for factor in factors)


def test_rates_are_those_of_the_resumed_fit() -> None:
    def rates(lr: float, schedule: Schedule, total_steps: int) -> tuple[Optimizer, ScheduledRate]:
        optimizer = made(partial(SGD, lr=lr))[1]
        return optimizer, ScheduledRate(optimizer, schedule, total_steps)

    optimizer, scheduler = rates(0.1, Schedule(warmup_steps=10), 20)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    linear = Schedule(decay="linear", final_factor=0.0)
    other, resumed = rates(0.8, linear, 9)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["lr"] == resumed.get_last_lr()[0] == pytest.approx(0.8 * 5 / 8)
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == pytest.approx(0.8 * 4 / 8)


# What weight decay acts on


def tiny_model(family: str, **options: Any) -> torch.nn.Module:
    """Two layers without values."""
    config = AutoConfig.for_model(family, **options)
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("opt", {}),
        ("bloom", {}),
        ("qwen2", {}),
        ("qwen3_moe", {}),
        ("gemma3_text", {}),
        ("olmo2", {}),
        ("cohere", {"use_qk_norm": True}),  # its norms of queries and keys are matrices
    ],
)
def test_decayed_is_what_transformers_decays(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    decayed = {name for name, parameter in model.named_parameters() if is_decayed(name, parameter)}
    theirs = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed == theirs.intersection(dict(model.named_parameters()))


@pytest.mark.parametrize(("family", "vectors"), [("mamba", {"D", "weight"}), ("gpt_oss", {"sinks"})])
def test_vectors_are_never_decayed(family: str, vectors: set[str]) -> None:
    """Transformers' trainer decays these, as their names say nothing."""
    model = tiny_model(family)
    parameters = dict(model.named_parameters())
    decayed = {name for name, parameter in parameters.items() if is_decayed(name, parameter)}
    theirs = set(Trainer.get_decay_parameter_names(None, model)).intersection(parameters)  # type: ignore[arg-type]
    assert decayed < theirs
    assert {name.rpartition(".")[2] for name in theirs - decayed} == vectors


def test_weight_decay_leaves_norms_and_biases_out_unless_it_is_asked() -> None:
    decaying = partial(AdamW, weight_decay=0.1)
    named, optimizer = made(decaying, decay_norms_and_biases=False)
    groups = [{name for name in named if any(named[name] is p for p in g["params"])} for g in optimizer.param_groups]
    assert groups == [{"embed.weight", "head.weight"}, {"norm.weight", "head.bias"}]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [len(made(make)[1].param_groups) for make in (decaying, AdamW)] == [1, 1]
    undecayed = made(partial(AdamW, weight_decay=0.0), decay_norms_and_biases=False)[1]
    assert len(undecayed.param_groups) == 1
    vectors = {name: parameter for name, parameter in named.items() if parameter.ndim == 1}
    (only,) = build_optimizer(decaying, vectors, decay_norms_and_biases=False).param_groups
    assert only["weight_decay"] == 0


# In a fit


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    return [*tiny, "--model.schedule.warmup_steps=5", "--probe.num_prompts=0", "--data.micro_batch_size=4"]


@pytest.fixture(scope="module")
def stopped(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("stopped"), [*options, "--trainer.max_steps=3"])


def go_on(stopped: Path, options: list[str], root: Path) -> Path:
    last = stopped / "checkpoints" / "last.ckpt"
    return fit(root, [*options, "--trainer.max_steps=6", f"--ckpt_path={last}"])


def test_a_resumed_fit_has_the_learning_rate_of_its_config(stopped: Path, options: list[str], tmp_path: Path) -> None:
    assert read_metrics(stopped)["train/lr"] == pytest.approx({0: 2e-4, 1: 4e-4, 2: 6e-4})
    run = go_on(stopped, [*options, "--model.optimizer.lr=1e-9", "--model.optimizer.weight_decay=0.3"], tmp_path)
    assert read_metrics(run)["train/lr"] == pytest.approx({3: 8e-10, 4: 1e-9, 5: 1e-9}, rel=1e-6)
    for name, value in checkpoint(stopped)["state_dict"].items():
        torch.testing.assert_close(checkpoint(run)["state_dict"][name], value, atol=1e-7, rtol=0, msg=name)
    groups = checkpoint(run)["optimizer_states"][0]["param_groups"]
    assert [(group["weight_decay"], group["initial_lr"]) for group in groups] == [(0.3, 1e-9), (0.0, 1e-9)]
    assert checkpoint(run)["lr_schedulers"][0]["base_lrs"] == [1e-9, 1e-9]


def test_a_resumed_fit_has_the_schedule_of_its_config(stopped: Path, options: list[str], tmp_path: Path) -> None:
    other = ["--model.schedule.warmup_steps=0", "--model.schedule.decay=linear", "--model.schedule.final_factor=0"]
    run = go_on(stopped, [*options, *other], tmp_path)
    assert read_metrics(run)["train/lr"] == pytest.approx({3: 4e-4, 4: 2e-4, 5: 0})


@pytest.mark.parametrize(
    "other", ["--model.optimizer.amsgrad=true", "--model.optimizer.class_path=torch.optim.RMSprop"]
)
def test_state_that_does_not_serve_is_a_sentence(
    other: str, stopped: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        go_on(stopped, [*options, other], tmp_path)
    assert end.value.code == 2
    assert "cannot go on from the checkpoint's optimizer, which has no" in capsys.readouterr().err


def test_decay_goes_on_bit_for_bit(options: list[str], tmp_path: Path) -> None:
    options = [*options, "--model.optimizer.weight_decay=0.1"]
    straight = fit(tmp_path / "straight", [*options, "--trainer.max_steps=6"])
    part = fit(tmp_path / "parts", [*options, "--trainer.max_steps=3"])
    run = go_on(part, options, tmp_path / "parts")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(checkpoint(run)[key], checkpoint(straight)[key], atol=0, rtol=0)
    everywhere = fit(tmp_path / "all", [*options, "--model.decay_norms_and_biases=true", "--trainer.max_steps=6"])
    (norm,) = [name for name in checkpoint(straight)["state_dict"] if name.endswith("model.norm.weight")]
    assert not checkpoint(everywhere)["state_dict"][norm].equal(checkpoint(straight)["state_dict"][norm])
