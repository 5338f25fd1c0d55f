"""Names of folders that this project can make, wherever a path is read: ``lab:posts`` is one.

Whoever makes folders registers a prefix here, as ``lit_isdpo.lab`` does. So the rooms that read paths need not know who
makes them, and nothing is made before a path is read. The command line knows the folder of the runs and makes the
folders there; the names that come here are those of Python.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

Part = Literal["pairs", "reference"]
NAMES: dict[str, Callable[[str, Part], Path]] = {}
"""By prefix, what makes a folder of a name: given the whole name, and the part that a name without one means."""


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
