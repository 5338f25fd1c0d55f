"""What a config file changes of those before it, and which of its rows were meant for other training rows.

Config files and flags are layers: a later one prevails, option by option, also if the class that an option belongs to
is another by then. A file of a method may so change more than the method; a line says what.

A config file may name ``data.val`` and ``data.test`` beside its ``data.train``. A flag or a later file may name other
training rows, and the run would still be validated and tested on the rows of the first file. These are left out, and a
line says so. What the user names on the command line stays.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml
from jsonargparse import get_loader

_DEFAULTS = {
    "val": "validation takes the validation split of data.train or holds rows out of it",
    "test": "the test rows are the test split of data.train",
}
_ROWS = re.compile(r"data\.(train|val|test)\b")
# What is appended to the training rows, or is said of them, leaves the other rows of the file.
_NAMES_ROWS = re.compile(r"data\.(?:(train)(?:\.path)?|(val|test)\b.*)")
SECTIONS = ("model", "data", "trainer", "probe", "evaluation", "labels", "checkpoint", "last")  # each may be a file
_WITHOUT_VALUE = ("--print_config", "--help", "-h")
_LONGEST = 60  # characters of a value in a line


def left_out(arguments: Sequence[str], verb: str) -> dict[str, str]:
    """The ``data.val`` and ``data.test`` that a config file names for other training rows than those in force.

    Args:
        arguments: the command line, without the program's name.
        verb: the one of them that names the subcommand.

    Returns:
        A sentence for each of these options, which says why it goes.

    >>> left_out(["fit", "--data={val: v.jsonl}", "--data.train", "t.jsonl"], "fit")  # the user named both
    {}
    """
    last: dict[str, tuple[int, str | None, Any]] = {}
    for number, (options, file) in enumerate(_layers(arguments, verb)):
        for option, value in options.items():
            if named := _NAMES_ROWS.fullmatch(option):
                last[named[1] or named[2]] = number, file, value
    nothing = (0, None, None)
    train, _, rows = last.get("train", nothing)
    found = {}
    for split, default in _DEFAULTS.items() if rows is not None else ():
        number, file, value = last.get(split, nothing)
        if file is not None and value is not None and number < train:
            found[f"data.{split}"] = (
                f"data.{split} of {file} is left out, because data.train is named after it: {default}; "
                f"--data.{split} names other rows."
            )
    return found


def changed(arguments: Sequence[str], verb: str) -> dict[str, str]:
    """The options in force that a config file sets to another value than an earlier file or flag does.

    Classes are not among them, as a method's file is there to name them, nor are rows, as a table lists them.

    Args:
        arguments: the command line, without the program's name.
        verb: the one of them that names the subcommand.

    Returns:
        A sentence for each of these options, with both values.

    >>> changed(["fit", "--model.loss.beta=0.1", "--config={model: {loss: {beta: 0.01}}}"], "fit")  # the user set both
    {}
    """
    found: dict[str, str] = {}
    before: dict[str, tuple[Any, str]] = {}
    for options, file in _layers(arguments, verb):
        for option, value in options.items():
            known, place = before.get(option, (value, ""))
            before[option] = value, file or "the command line"
            if file is None:
                found.pop(option, None)  # the user chose
            elif known != value and not option.endswith(".class_path") and not _ROWS.match(option):
                found[option] = f"{file} sets {option} to {_shown(value)} ({place} has {_shown(known)})."
    return found


def as_options(arguments: Sequence[str], verb: str) -> list[str]:
    """Config files that stand before the verb, each as a flag that holds the verb's section of it.

    Args:
        arguments: those before the verb.
        verb: names the section.
    """
    found = []
    for _, text in flags(arguments):
        content, path = _load(text, Path())
        section = content.get(verb) if isinstance(content, dict) else None
        if isinstance(section, dict):
            for key in SECTIONS:
                if path is not None and isinstance(section.get(key), str) and (path.parent / section[key]).is_file():
                    section[key] = str(path.parent.absolute() / section[key])
            found.append(f"--config={yaml.safe_dump(section, default_flow_style=True)}")
    return found


def flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name and the value of each flag; an argument that is neither, such as the verb, has no name.

    >>> list(flags(["fit", "-cfile.yaml", "--data.train", "lab:posts"]))
    [('', 'fit'), ('config', 'file.yaml'), ('data.train', 'lab:posts')]
    """
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            yield "", argument
            continue
        flag, equals, value = argument.partition("=")
        if flag.startswith("-c"):  # -cFILE and -c=FILE are spellings of --config FILE
            value, flag = argument[2:].removeprefix("="), "--config"
            equals = value
        if not equals and flag not in _WITHOUT_VALUE and left and not left[0].startswith("-"):
            value = left.pop(0)
        yield flag.removeprefix("--"), value


def _layers(arguments: Sequence[str], verb: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What each argument sets, in their order, in which a later one prevails: values by name, without ``init_args``.

    With them comes the config file, or ``None`` for what the user wrote on the command line.
    """
    before = verb in arguments  # a config file before the verb has a section for each
    for name, value in flags(arguments):
        if not name:
            before = False  # it is the verb
        elif name == "config":
            content, path = _load(value, Path())
            if isinstance(content, dict) and before:
                content = content.get(verb)
            yield _flat(content, Path() if path is None else path.parent), None if path is None else value
        else:
            is_section = name.removesuffix(".init_args") in SECTIONS
            content, path = _load(value, Path() if is_section else None)
            yield _flat({name: content}, Path()), None if path is None else value


def _flat(content: Any, folder: Path, prefix: str = "") -> dict[str, Any]:
    """Values by name; a section that is named by its file is read from there."""
    found: dict[str, Any] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        name = ".".join(part for part in (*prefix.split("."), *str(key).split(".")) if part not in ("", "init_args"))
        if name in SECTIONS and isinstance(value, str):
            value = _load(value, folder)[0]
        if isinstance(value, dict) and value:
            found |= _flat(value, folder, name)
        elif name:
            found[name] = value
    return found


def _load(text: str, folder: Path | None) -> tuple[Any, Path | None]:
    """What a file of that name in a folder says, and its path, or what the text says.

    The loader is that of the command line, to which 1e-4 is a number. Of what it cannot read, the parser complains.
    """
    try:
        path = Path() if folder is None else folder / text
        is_file = bool(text) and path.is_file()
        return get_loader("yaml")(path.read_text() if is_file else text), path if is_file else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return text, None


def _shown(value: Any) -> str:
    """A value in a line, cut if it is long."""
    return shorten(value if isinstance(value, str) else json.dumps(value, default=str), _LONGEST, placeholder=" ...")
