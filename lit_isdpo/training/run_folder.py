"""The folder of a run, ``{default_root_dir}/version_N``: no other run writes to it; its config; its model's code.

The code is the Python files that an ``auto_map`` names, and those that these import beside them. transformers writes an
``auto_map`` into each folder that it makes, and of the files only those of the object at hand. A value with ``--`` in
it names a repository of the hub, which has its file; any other says that its file lies beside.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils.hub import cached_file

from lit_isdpo.evaluation.store import naming
from lit_isdpo.names import with_present_paths
from lit_isdpo.policy.loading import PolicyConfig, model_path
from lit_isdpo.types import InputError, first_line

CONFIG_FILE = "config.json"
BEFORE = {"decay_norms_and_biases": True}  # in force while they were no options
OF_THE_COMMAND = ("ckpt_path", "trainer.default_root_dir")  # where it comes from and goes to


def run_dir(trainer: Trainer) -> Path:
    """The folder of this run, as rank 0 knows it. Every rank must call it.

    It is that of a logger which writes to a folder; with other loggers or none it is the root, of which the command
    line makes a new one for each run.
    """
    first = next(iter(trainer.loggers), None)
    own = first.log_dir if isinstance(first, TensorBoardLogger | CSVLogger) else trainer.default_root_dir
    folder: str = trainer.strategy.broadcast(own)
    return Path(folder)


@contextmanager
def claimed(loggers: Sequence[Logger]) -> Iterator[list[Logger]]:
    """Loggers whose folders exist and belong to no other run; a folder to which nothing is written is removed again.

    Lightning's loggers take the next version that is free when they look, which is the same for runs that are started
    together. ``mkdir`` succeeds for one of them only; the others look again. A version that the user names stays.

    Args:
        loggers: none of them has been used. Those whose version is free get the same one.
    """
    copies = [copy(one) if isinstance(one, TensorBoardLogger | CSVLogger) else one for one in loggers]
    # Lightning has no public way to tell a version that was given from one that is looked up when it is asked for.
    free = [one for one in copies if isinstance(one, TensorBoardLogger | CSVLogger) and one._version is None]
    unused = [copy(one) for one in free]
    while True:
        version = max((int(copy(one).version) for one in unused), default=0)
        for one in free:
            one._version = version
        folders = {Path(one.log_dir) for one in free}
        made = [place for folder in folders for place in _make(folder)]
        if folders <= {*made}:
            break
        _remove(made)
    try:
        yield copies
    finally:
        _remove(made)


def print_changes(ckpt_path: str, config: str) -> None:
    """Prints which options differ from those of the run that wrote a checkpoint, if its config is still beside it.

    A resumed fit follows its own config.

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
        return yaml.safe_load(with_present_paths(file.read_text()))
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


def code_files(folder: Path, kinds: Collection[str] | None = None) -> list[str]:
    """The Python files that a model's folder says lie in it, whether they do or not.

    Args:
        folder: with the configurations of a model and its tokenizer.
        kinds: of the auto classes, such as ``AutoConfig``, that the files are for. Default: of all.
    """
    references: list[Any] = []
    for name in (CONFIG_FILE, TOKENIZER_CONFIG_FILE):
        for kind, value in _auto_map(folder / name).items():
            if kinds is None or kind in kinds:
                references += value if isinstance(value, list) else [value]
    files = [Path(each.rpartition(".")[0] + ".py") for each in references if isinstance(each, str) and "--" not in each]
    inside = [file for file in files if not file.is_absolute() and ".." not in file.parts]
    return list(dict.fromkeys(map(str, inside)))


def copy_code(source: PolicyConfig, folder: Path) -> None:
    """Copies the files that ``folder`` names from the model that it was made of, as far as they are there.

    A file that is not there is none that the model was loaded with, so nothing is downloaded.
    """
    path = model_path(source)
    for name in code_files(folder):
        with suppress(OSError):
            found = str(cached_file(path, name, revision=source.revision, local_files_only=True))
            place = Path(found).parent
            for file in (found, *get_relative_import_files(found)):
                target = (folder / name).parent / Path(file).relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def _auto_map(file: Path) -> dict[str, Any]:
    """What a configuration says, or nothing; older ones of tokenizers have a list of their two classes."""
    content = None
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text())
    found = content.get("auto_map") if isinstance(content, dict) else None
    if isinstance(found, list):
        return {"AutoTokenizer": found}
    return found if isinstance(found, dict) else {}


def _make(folder: Path) -> list[Path]:
    """The folder and its parents, as far as this call has made them; nothing if the folder was there."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with naming(folder):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return []
    return missing


def _remove(folders: Sequence[Path]) -> None:
    for folder in sorted(folders, reverse=True):  # inner ones first
        with suppress(OSError):  # it holds something
            folder.rmdir()
