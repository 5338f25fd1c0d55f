"""A resumed fit follows its config and not the checkpoint's; what it changes is said."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.names import with_present_classes
from lit_isdpo.types import InputError, first_line

BEFORE = {"decay_norms_and_biases": True}  # in force while they were no options
OF_THE_COMMAND = ("ckpt_path", "trainer.default_root_dir")  # where it comes from and goes to


def print_changes(ckpt_path: str, config: str) -> None:
    """Prints which options differ from those of the run that wrote a checkpoint, where its config is still beside it.

    Args:
        ckpt_path: the checkpoint, in the ``checkpoints`` folder of its run.
        config: of this run, as YAML.
    """
    file = Path(ckpt_path).resolve().parent.parent / "config.yaml"
    if not file.is_file():
        return
    lines = list(changes(saved_config(file), yaml.safe_load(config)))
    if lines:
        rank_zero_info("\n  ".join([f"Options that are not those of {file} (the first value is its own):", *lines]))


def saved_config(file: Path) -> Any:
    """A run's ``config.yaml``.

    Raises:
        InputError: it is none.
    """
    try:
        return yaml.safe_load(with_present_classes(file.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} is no config of a run: {first_line(error)}.") from error


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Options with two values, a line each.

    >>> list(changes({"model": {"init_args": {"lr": 1, "beta": 2}}}, {"model": {"init_args": {"lr": 2, "beta": 2}}}))
    ['model.lr: 1 -> 2']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = name if key == "init_args" else f"{name}.{key}".lstrip(".")
            yield from changes(before.get(key, BEFORE.get(key)), now.get(key), inner)
    elif before != now and name not in OF_THE_COMMAND:
        yield f"{name}: {before!r} -> {now!r}"
