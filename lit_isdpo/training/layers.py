"""Which rows of a config file were meant for other training rows than those that are trained on.

A config file may name ``data.val`` and ``data.test`` beside its ``data.train``. A flag or a later file may name other
training rows, and the run would still be validated and tested on the rows of the first file. These are left out, and a
line says so. What the user names on the command line stays.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_DEFAULTS = {
    "val": "validation takes the validation split of data.train or holds rows out of it",
    "test": "the test rows are the test split of data.train",
}
_WITHOUT_VALUE = ("--print_config", "--help", "-h")
_NULLS = (None, "null")


class LeftOut(NamedTuple):
    """An option of a config file that goes.

    Attributes:
        option: ``data.val`` or ``data.test``.
        file: as it stands on the command line.
    """

    option: str
    file: str

    @property
    def flag(self) -> str:
        """What leaves it out."""
        return f"--{self.option}=null"

    def __str__(self) -> str:
        default = _DEFAULTS[self.option.removeprefix("data.")]
        return (
            f"{self.option} of {self.file} is left out, because data.train is named after it: {default}; "
            f"--{self.option} names other rows."
        )


class _Layer(NamedTuple):
    """What a config file or a flag says of the rows.

    Attributes:
        rows: of ``train``, ``val`` and ``test``, those that it sets.
        file: the config file; ``None`` where the user wrote it on the command line.
    """

    rows: dict[str, Any]
    file: str | None


def left_out(arguments: Sequence[str], verb: str) -> list[LeftOut]:
    """The ``data.val`` and ``data.test`` that a config file names for other training rows than those in force.

    Args:
        arguments: the command line, without the program's name.
        verb: the one of them that names the subcommand.

    >>> left_out(["fit", "--data={val: v.jsonl}", "--data.train", "t.jsonl"], "fit")  # the user named both
    []
    """
    layers = list(_layers(arguments, verb))
    last = {split: number for number, layer in enumerate(layers) for split in layer.rows}
    if "train" not in last or layers[last["train"]].rows["train"] in _NULLS:
        return []
    found = []
    for split in ("val", "test"):
        layer = layers[last[split]] if split in last else _Layer({split: None}, None)
        if layer.file is not None and layer.rows[split] is not None and last[split] < last["train"]:
            found.append(LeftOut(f"data.{split}", layer.file))
    return found


def _layers(arguments: Sequence[str], verb: str) -> Iterator[_Layer]:
    """What each argument says, in their order, in which a later one prevails."""
    left = list(arguments)
    before = verb in left  # a config file before the verb has a section for each
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            before = False  # it is the verb
            continue
        flag, equals, value = argument.partition("=")
        if flag.startswith("-c"):  # -cFILE and -c=FILE are spellings of --config FILE
            value, flag = argument[2:].removeprefix("="), "--config"
            equals = value
        if not equals and flag not in _WITHOUT_VALUE and left and not left[0].startswith("-"):
            value = left.pop(0)
        if flag == "--config":
            content, path = _load(value, Path())
            if isinstance(content, dict):
                content = content.get(verb) if before else content
            yield _Layer(_rows(content, Path() if path is None else path.parent), None if path is None else value)
        else:
            section = _load(value, Path())[1] if flag in ("--data", "--data.init_args") else None
            yield _Layer(_rows({flag.removeprefix("--"): value}, Path()), None if section is None else value)


def _rows(options: Any, folder: Path) -> dict[str, Any]:
    """Which rows are named by options of a file, or by one of a flag."""
    found: dict[str, Any] = {}
    for key, value in options.items() if isinstance(options, dict) else ():
        parts = [part for part in str(key).split(".") if part != "init_args"]
        if parts == ["data"]:
            section = _load(value, folder)[0] if isinstance(value, str) else value
            if isinstance(section, dict):
                inner = section.get("init_args")
                section = section | inner if isinstance(inner, dict) else section
                found |= {split: section[split] for split in ("train", *_DEFAULTS) if split in section}
        elif parts[:1] == ["data"]:
            # What is appended to the training rows, or is said of them, leaves those of the file.
            split, names_rows = parts[1].removesuffix("+"), parts[1:] in (["train"], ["train", "path"])
            if split in _DEFAULTS or names_rows:
                found[split] = value
    return found


def _load(text: str, folder: Path) -> tuple[Any, Path | None]:
    """What a file holds, and its path, or what a text says; nothing, if the parser has to complain of it."""
    try:
        path = folder / text
        is_file = bool(text) and path.is_file()
        return yaml.safe_load(path.read_text() if is_file else text), path if is_file else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None, None
