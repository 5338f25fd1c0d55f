"""The optimizer, and how a fit goes on from that of a checkpoint.

A resumed fit takes over what an optimizer has learned (its state). Its options (learning rate, weight decay, betas) are
those of the config.
"""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lit_isdpo.types import InputError


def adamw(params: Any) -> Optimizer:
    """The default optimizer."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


def check_options(make_optimizer: OptimizerCallable) -> None:
    """Raises for numbers that an optimizer refuses, or that would make its steps infinite."""
    try:
        optimizer = make_optimizer([Parameter(torch.zeros(2, 2))])
    except (ValueError, TypeError) as error:
        raise InputError(f"model.optimizer: {error}") from error
    largest = torch.finfo(torch.float32).max
    for group in optimizer.param_groups:
        for name, value in group.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(number, float) and not abs(number) <= largest for number in numbers):
                raise InputError(f"model.optimizer.{name} must be finite, not {value}.")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter by default: on matrices, but on no norm and no bias.

    Most norms and biases are vectors; a few architectures stack those of their heads or experts to matrices, so names
    count too. Transformers' trainer, and TRL with it, goes by names only; it decays some vectors that are no weights
    (Mamba's ``D``, the attention sinks of GPT-OSS), which are left out here.
    """
    return parameter.ndim > 1 and re.search("bias|norm", name.lower()) is None


def build_optimizer(
    make_optimizer: OptimizerCallable, named: Mapping[str, Parameter], *, decay_norms_and_biases: bool
) -> Optimizer:
    """The optimizer of a fit; what its ``load_state_dict`` takes over is state, and no option.

    Args:
        make_optimizer: makes it from a list of parameters.
        named: what is trained, in the order of the model.
        decay_norms_and_biases: whether its weight decay acts on all of them.

    Raises:
        InputError: in ``load_state_dict``: the optimizer cannot go on from that state.
    """
    parameters = list(named.values())
    optimizer = make_optimizer(parameters)
    if not decay_norms_and_biases:
        _exempt(optimizer, {parameter for name, parameter in named.items() if not is_decayed(name, parameter)})

    # A file numbers the parameters. Lightning's FSDP2 strategy numbers them in the order of the model, and PyTorch as
    # the groups have them; in the order of the model, a checkpoint serves other groups and other strategies too.

    def number(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        place = {parameter: number for number, parameter in enumerate(parameters)}
        numbers = [place[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        groups = [{**group, "params": [numbers[n] for n in group["params"]]} for group in state["param_groups"]]
        return {**state, "state": {numbers[n]: own for n, own in state["state"].items()}, "param_groups": groups}

    load = optimizer.load_state_dict

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        with as_one_group(optimizer, parameters):
            check_state(make_optimizer, parameters, {name for own in state_dict["state"].values() for name in own})
            load(_with_own_options(optimizer, state_dict))

    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        optimizer.register_state_dict_post_hook(number)
    optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign] # not a hook: classes with their own call none
    return optimizer


@contextmanager
def as_one_group(optimizer: Optimizer, parameters: Sequence[Parameter]) -> Iterator[None]:
    """Has an optimizer load a state into one group, whatever groups wrote it; its own groups and options come back.

    Args:
        optimizer: with groups of its own.
        parameters: all that it trains, in the order of the model.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[0], "params": list(parameters)}]
    try:
        yield
    finally:
        learned = _learned(optimizer, optimizer.param_groups[0])
        optimizer.param_groups = groups
        for group in groups:
            group.update(learned)


def _learned(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that some classes (Prodigy) have learned and keep among their options."""
    arguments = inspect.signature(type(optimizer)).parameters
    options = {*arguments, "initial_lr", "params"}
    if any(argument.kind == argument.VAR_KEYWORD for argument in arguments.values()):
        options |= optimizer.defaults.keys()
    # Flags that a class adds, such as AdamW's decoupled_weight_decay, say which class it is.
    return {name: value for name, value in group.items() if name not in options and not isinstance(value, bool)}


def _with_own_options(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A stored state for an optimizer with one group: what was learned is the state's, and all options its own.

    Raises:
        InputError: the state is of other parameters.
    """
    group = optimizer.param_groups[0]
    keys = [key for stored in state["param_groups"] for key in stored["params"]]
    if len(keys) != len(group["params"]):
        raise InputError(
            f"ckpt_path: the checkpoint's optimizer has {len(keys)} tensors, and this run trains "
            f"{len(group['params'])}; use the config.yaml of its own run."
        )
    if all(isinstance(key, int) for key in keys):  # else they are names, in the order of the group
        keys = sorted(keys)
    entries = state["state"]
    if not any(entries.values()):  # that of an optimizer without state: this one begins with its own
        entries = {key: optimizer.state[parameter] for key, parameter in zip(keys, group["params"], strict=True)}
    learned = _learned(optimizer, {k: v for k, v in state["param_groups"][0].items() if k in group})
    return {**state, "state": entries, "param_groups": [{**group, **learned, "params": keys}]}


def _exempt(optimizer: Optimizer, exempt: Collection[Tensor]) -> None:
    """Moves these parameters to groups without weight decay, where there is any."""
    for group in list(optimizer.param_groups):
        if group.get("weight_decay"):
            others = [parameter for parameter in group["params"] if parameter in exempt]
            if others:
                group["params"] = [parameter for parameter in group["params"] if parameter not in exempt]
                optimizer.add_param_group({**group, "params": others, "weight_decay": 0.0})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def check_state(make_optimizer: OptimizerCallable, parameters: Collection[Tensor], stored: Collection[str]) -> None:
    """Checks that an optimizer can go on from the state in a checkpoint.

    Args:
        make_optimizer: makes it.
        parameters: what is trained.
        stored: the names of the tensors that the checkpoint keeps for parameters; none, if its optimizer has no state.

    Raises:
        InputError: the optimizer needs others.
    """
    used: set[str] = set()
    for ndim in {parameter.ndim for parameter in parameters}:  # Adafactor keeps others for vectors than for matrices
        trial = Parameter(torch.zeros((2,) * ndim))
        trial.grad = torch.zeros_like(trial)
        optimizer = make_optimizer([trial])
        optimizer.step(lambda: 0.0)  # some classes want a closure
        used |= optimizer.state[trial].keys()
        name = type(optimizer).__name__
    if stored and (missing := used.difference(stored)):
        raise InputError(
            f"model.optimizer: {name} cannot go on from the checkpoint's optimizer, which has no "
            f"{', '.join(sorted(missing))} (it has {', '.join(sorted(stored))}); use the optimizer options of its own "
            "run, or export the checkpoint and begin anew from it."
        )
