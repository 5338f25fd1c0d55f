"""What cannot be asked for, alone or together: told by the config, before anything is loaded."""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any, cast, get_args, get_type_hints

import torch
from jsonargparse import Namespace

from lit_isdpo.cli.layers import SECTIONS
from lit_isdpo.data.sampling import check_random_order, split_batch
from lit_isdpo.evaluation.endpoint import check_no_secret
from lit_isdpo.training.checkpoint_files import StoredCheckpoint
from lit_isdpo.training.reward import RewardModule
from lit_isdpo.training.strategy import NAME, FSDP2Strategy
from lit_isdpo.types import InputError


def check(verb: str, config: Namespace) -> None:
    """Raises for options that are not supported, alone or together.

    Args:
        verb: of the command line.
        config: its options.

    Raises:
        InputError: names the option and what to use instead.
    """
    check_no_secret(config.as_dict())
    for section in SECTIONS:
        if config.get(section) is None:
            raise InputError(f"{section} is null; leave the section out for its defaults.")
    _check_nulls(config, "")
    _check_numbers(config)
    _check_trainer(verb, config.trainer)
    _check_strategy(verb, config)
    kernel = config.model.init_args.get("policy.attn_implementation")
    if config.data.init_args.get("packing_length") is not None and kernel != "flex_attention":
        raise InputError(
            "data.packing_length: packed rows are quick where the attention skips what no token sees; set "
            "model.policy.attn_implementation to flex_attention (on a GPU), or leave the option out."
        )
    if verb in ("fit", "precompute"):
        _check_ranks(config)
    if verb in ("fit", "inspect", "plan") and _mixes_pairs(config.model.init_args.get("weighting")):
        check_random_order(config.data.init_args.get("length_window", 1))
    single = config.model.init_args.get("sampling.num_responses", 1) < 2
    if verb == "predict" and config.labels.reward is not None and single:
        raise InputError("labels.reward: a pair needs two responses; set model.sampling.num_responses to 2 or more.")
    if verb == "test" and config.evaluation.kl_prompts and config.model.init_args.get("reference") is None:
        raise InputError(
            "evaluation.kl_prompts: without model.reference there is nothing to measure KL to; leave it out."
        )
    if config.get("weights_only") is False:
        raise InputError("weights_only: a checkpoint is never let run code as it is loaded; leave the option out.")
    ckpt_path = config.get("ckpt_path")
    if ckpt_path == "":
        raise InputError("ckpt_path is empty; name a checkpoint, or leave the option out.")
    if ckpt_path and StoredCheckpoint(Path(ckpt_path)).is_folder and not is_sharded(config):
        raise InputError(
            f"ckpt_path: {ckpt_path!r} is a sharded checkpoint; use --trainer.strategy fsdp2, on one device too, or "
            "export it."
        )


def arguments_of(cls: type | None) -> dict[str, Any]:
    """The arguments of a class and their types, with those that it passes on to its base classes."""
    hints: dict[str, Any] = {}
    for base in reversed(inspect.getmro(cls or object)):
        hints |= get_type_hints(vars(base).get("__init__", object.__init__))
    return {name: hint for name, hint in hints.items() if name != "return"}


def is_sharded(config: Namespace) -> bool:
    """Whether each rank holds only a part of the model."""
    named = NAME if isinstance(config.trainer.strategy, str) else FSDP2Strategy.__name__
    return _strategy_name(config) == named


def _check_nulls(config: Any, option: str) -> None:
    """Raises for a null where a class of the config wants a value: the parser takes it for an option left out."""
    if not isinstance(config, Namespace):
        return
    if path := config.get("class_path"):
        hints = arguments_of(cast(type, locate(path)))
        for name, value in vars(config.get("init_args", Namespace())).items():
            if value is None and name in hints and not {Any, type(None)} & {hints[name], *get_args(hints[name])}:
                raise InputError(f"{option}.{name} is null; it needs a value. Leave it out for the default.")
    for key, value in vars(config).items():
        _check_nulls(value, option if key == "init_args" else f"{option}.{key}".lstrip("."))


def _check_numbers(config: Namespace) -> None:
    """Raises for numbers that no option has room for, and for those of the trainer's that Lightning lets pass."""
    largest = torch.finfo(torch.float32).max
    for option, value in _numbers(config, ""):
        if isinstance(value, int) and abs(value) >= 2**32:
            raise InputError(f"{option} is {value}; whole numbers lie below 2^32.")
        if math.isnan(value) or largest < abs(value) < math.inf:
            raise InputError(f"{option} is {value}, which is no number that float32 holds.")
    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps", "num_nodes"):
        value = config.trainer[name]
        if isinstance(value, int | float) and value <= 0:
            raise InputError(f"trainer.{name} is {value}; it must be above 0.")
    norm = config.trainer.gradient_clip_val
    if norm is not None and norm < 0:
        raise InputError(f"trainer.gradient_clip_val is {norm}; it must be at least 0, or gradients would be reversed.")


def _numbers(config: Any, option: str) -> Iterator[tuple[str, float]]:
    """All numbers of a config, by the names of their options."""
    if option == "trainer.devices" and str(config).isdecimal():  # a string to the parser
        yield option, int(config)
    elif isinstance(config, int | float) and not isinstance(config, bool):
        yield option, config
    elif isinstance(config, list | tuple):
        for item in config:
            yield from _numbers(item, option)
    elif isinstance(config, Namespace | dict):
        for key, value in vars(config).items() if isinstance(config, Namespace) else config.items():
            yield from _numbers(value, option if key == "init_args" else f"{option}.{key}".lstrip("."))


def _check_trainer(verb: str, trainer: Namespace) -> None:
    """Raises for options of Lightning's trainer that would give other results than they seem to."""
    precision = str(trainer.precision or "32-true")
    if precision not in ("32", "32-true"):
        raise InputError(
            f"trainer.precision {precision!r} is not supported: log-ratios need fp32 weights and losses. For bfloat16 "
            "matrix products use --model.policy.compute_dtype bfloat16 (float16 is too narrow for them)."
        )
    if trainer.gradient_clip_algorithm == "value":
        raise InputError("trainer.gradient_clip_algorithm 'value' is not supported: gradients are clipped by norm.")
    if not trainer.default_root_dir:
        raise InputError("trainer.default_root_dir: name a folder for the runs.")
    root = Path(trainer.default_root_dir).expanduser()
    if not next(place for place in (root, *root.absolute().parents) if place.exists()).is_dir():
        raise InputError(f"trainer.default_root_dir: {str(root)!r} is a file, or lies below one; name a folder.")
    if trainer.barebones:
        raise InputError("trainer.barebones is not supported, as a run logs and saves; leave it out.")
    if verb == "fit" and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        raise InputError("trainer: set max_epochs or max_steps, so that the fit ends.")
    for limit in ("max_epochs", "max_steps", "limit_train_batches") if verb == "fit" else ():
        if trainer[limit] == 0:
            raise InputError(f"trainer.{limit} is 0: nothing would be trained. To look at the model, use validate.")


def _check_strategy(verb: str, config: Namespace) -> None:
    """Raises for a strategy that is not supported, and for what a sharded model cannot do."""
    name = _strategy_name(config)
    if not is_sharded(config):
        if name.split("_")[0] in ("auto", "ddp"):
            return
        raise InputError(
            f"trainer.strategy {name!r} is not supported: use 'auto' (one device), 'ddp' (the whole model on each) or "
            "'fsdp2' (a part of it on each; it is the successor of PyTorch's older FSDP)."
        )
    shard_size = None if isinstance(config.trainer.strategy, str) else config.trainer.strategy.init_args.shard_size
    if shard_size is not None and shard_size < 1:
        raise InputError(f"trainer.strategy.shard_size must be at least 1 rank, not {shard_size}.")
    if config.model.class_path.rpartition(".")[2] == RewardModule.__name__:
        raise InputError("trainer.strategy: a reward model is not sharded; use 'ddp' or one device.")
    if config.model.init_args.get("policy.compile"):
        raise InputError("model.policy.compile is not supported with trainer.strategy fsdp2; leave it out.")
    samples = config.evaluation.num_prompts if config.evaluation.num_prompts is not None else config.probe.num_prompts
    if verb == "predict" or (verb == "test" and samples):
        raise InputError(
            f"{verb}: a sharded model does not answer many prompts; export it, and use one device or "
            "--evaluation.engine vllm; test --evaluation.num_prompts 0 computes only the losses."
        )


def _strategy_name(config: Namespace) -> str:
    """Its registered name, or the name of its class."""
    strategy = config.trainer.strategy
    return strategy if isinstance(strategy, str) else str(strategy.class_path).rpartition(".")[2]


def _check_ranks(config: Namespace) -> None:
    """Raises for ranks that do not divide the batch, before they are started."""
    devices, batch_size = str(config.trainer.devices), config.data.init_args.get("batch_size")
    micro_batch_size = config.data.init_args.get("micro_batch_size")
    sizes = [size for size in (batch_size, micro_batch_size) if size is not None]
    if devices.isdecimal() and int(devices) and batch_size and all(size > 0 for size in sizes):
        split_batch(batch_size, micro_batch_size, int(devices) * config.trainer.num_nodes)


def _mixes_pairs(weighting: Any) -> bool:
    """Whether a weighting, or a factor of it, makes a pair's weight depend on the others of its micro-batch."""
    if not isinstance(weighting, Namespace):
        return False
    factors = weighting.get("init_args.factors") or []
    return cast(Any, locate(weighting.class_path)).mixes_pairs or any(map(_mixes_pairs, factors))
