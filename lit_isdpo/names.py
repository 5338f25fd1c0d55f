"""Names that outlive what they stand for: folders that this project makes, and classes and functions that have moved.

Whoever makes folders registers a prefix here, as ``lit_isdpo.lab`` does for ``lab:posts``. So the rooms that read paths
need not know who makes them, and nothing is made before a path is read. The command line knows the folder of the runs
and makes the folders there; the names that come here are those of Python.

An old run's ``config.yaml`` names classes and functions by the modules that they were in. The bare name finds them.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

Part = Literal["pairs", "reference"]
NAMES: dict[str, Callable[[str, Part], Path]] = {}
"""By prefix, what makes a folder of a name: given the whole name, and the part that a name without one means."""
PACKAGE = __name__.partition(".")[0]
IMPORT_PATH = re.compile(rf"(?<![\w./]){PACKAGE}(?:\.[a-z_]\w*)+\.[A-Za-z_]\w*(?![\w/])")
RENAMED = {
    "lit_isdpo.training.module.Sampling": "PredictSampling",
    "lit_isdpo.training.failures.Peers": "RankWatch",
    "lit_isdpo.cli.failures.Peers": "RankWatch",
}
"""Maps former paths to the bare names that classes have now. A class that only moved is not in here."""


def named_path(path: str, part: Part) -> str:
    """The path itself, or the folder that it names where the text before its first colon is registered.

    Args:
        path: a path, a hub id or a registered name.
        part: what is to be read: data or a model.

    Raises:
        InputError: the prefix is registered, and there is nothing of that name.

    >>> named_path("models/llama", "reference")
    'models/llama'
    """
    prefix, colon, _ = path.partition(":")
    return str(NAMES[prefix](path, part)) if colon and prefix in NAMES else path


def with_present_paths(text: str) -> str:
    """Names each class and function of this package in a text by the module that it is in now.

    Args:
        text: a config file or an argument. Other names stay as they are.

    >>> with_present_paths("class_path: lit_isdpo.former.types.InputError")
    'class_path: lit_isdpo.types.InputError'
    """
    return IMPORT_PATH.sub(lambda found: _present_path(found[0]), text)


def _present_path(path: str) -> str:
    name = RENAMED.get(path, path.rpartition(".")[2])
    for found in _candidates(path, name):
        if callable(found) and found.__module__.startswith(f"{PACKAGE}."):
            return f"{found.__module__}.{name}"
    return path


def _candidates(path: str, name: str) -> Iterator[Any]:
    """Yields what a path names, even if that module only imports it; if it names nothing, all that have the name."""
    if (found := locate(path)) is not None:
        yield found
        return
    package = importlib.import_module(PACKAGE)
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if not module.name.endswith(".__main__"):
            yield vars(importlib.import_module(module.name)).get(name)
