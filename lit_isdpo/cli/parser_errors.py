"""What the parser says of a mistake, in the user's own words, and what may have been meant."""

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from lit_isdpo.cli.layers import flags
from lit_isdpo.cli.options import arguments_of
from lit_isdpo.types import InputError

_SHOWN = 3  # options that are suggested
_IS_MISTAKE = r"Parser key|Option|Group|the following arguments|unrecognized"
_MEANT = {"task": "a task of the lab: lab:posts, lab:verbosity or lab:length"}
_EXAMPLES = {"model.optimizer": "torch.optim.AdamW", "trainer.strategy": "FSDP2Strategy"}
_NO_CLASS = re.compile(
    r"Expected a dot import path string|Problem with given class_path|does not correspond to a subclass"
    r"|Not a valid subclass|expects a function or a callable class"
)
_UNION_ENDS = " - Expected a <class 'NoneType'> Given value type:"
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "NoneType": "null",
    "list": "a list",
    "Iterable": "a list",
    "tuple": "a list",
    "dict": "a mapping of names to values",
    "Callable": "a function or a class",
}


def check_config_files(arguments: Sequence[str]) -> None:
    """Raises for a config file that cannot be read, which the parser would not name.

    Args:
        arguments: the command line.

    Raises:
        InputError: the file is not there, or is no YAML mapping; a file of a similar name is suggested.
    """
    for name, text in flags(arguments):
        path, option = Path(text).expanduser(), f"--config: {text!r}"
        if name != "config" or (not path.exists() and re.search(r"[{\n]", text)):  # the options themselves
            continue
        if path.is_dir():
            raise InputError(f"{option} is a folder; name a file in it.")
        if not path.exists():
            near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
            suggested = _did_you_mean([str(path.with_name(name)) for name in near])
            raise InputError(f"--config: no such file: {text!r}{suggested}")
        try:
            content = yaml.safe_load(path.read_text())
        except OSError as error:
            raise InputError(f"{option} cannot be read: {error.strerror}.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{option} is not valid YAML: {error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{option} does not map names to values, as in 'trainer:' with options below.")


def explain_verb(arguments: Sequence[str], verbs: Sequence[str]) -> str:
    """The sentence for a command line that does not begin with a verb."""
    if not arguments:
        return "a verb is missing, such as fit; lit-isdpo --help lists all"
    if behind := [argument for argument in arguments if argument in verbs]:
        return f"the verb comes first, its options behind it: lit-isdpo {behind[0]} --..."
    close = difflib.get_close_matches(arguments[0], verbs, n=1)
    return f"there is no verb {arguments[0]!r}; the verbs are {', '.join(verbs)}{_did_you_mean(close)}"


def explain_option(message: str, arguments: Sequence[str], parser: ArgumentParser) -> str:
    """A parser's message, with the option that it is about, and what that may have been meant to be.

    Args:
        message: ``Parser key "model": ...: Parser key "loss": ...``, from the outermost class to the mistake.
        arguments: the command line.
        parser: whose options are suggested.
    """
    key, cls, said = _innermost(" ".join(message.split()))
    if no_value := re.fullmatch(r"argument (--\w+): expected one argument", said):
        bare = [flag for flag in arguments if flag.startswith(f"{no_value[1]}.") and "=" not in flag]
        return f"{(bare or [no_value[1]])[-1]}: a value is missing"
    if missing := re.fullmatch(r"the following arguments are required: (\w+)", said):
        option = f"{key}.{missing[1]}".lstrip(".")
        takes = _MEANT.get(missing[1]) or _listed(_kinds_of(arguments_of(cls).get(missing[1])))
        return f"{option} is missing, and has no default" + (f"; it takes {takes}" if takes else "")
    if strange := re.match(
        r"unrecognized arguments: (?=--)([^ =]*)|Group '(\S*)' does not accept option '(\S*)'|Option '(\S*)' is", said
    ):
        name = ".".join(part.removeprefix("--") for part in (key, *strange.groups()) if part)
        known = [*_known_options(parser, arguments), *(f"{key}.{option}".lstrip(".") for option in arguments_of(cls))]
        dashes = "--" if said.startswith("unrecognized") else _dashes(name, arguments)
        close = [dashes + option for option in _options_like(name, known)]
        return f"{dashes}{name}: there is no such option{_did_you_mean(close)}"
    if inner := re.search(r"NestedArg\(key='(\w+)'", said):
        dashes, example = _dashes(f"{key}.{inner[1]}", arguments), _EXAMPLES.get(key, "CLASS")
        if re.search(r"class_path|import path string|instantiatable class", said):
            return f"{dashes}{key}.{inner[1]}: name the class first, as in {dashes}{key} {example}"
        return f"{dashes}{key}.{inner[1]}: there is no such option; {dashes}{key} takes a value"
    if key:
        hint = arguments_of(cls).get(key.rpartition(".")[2])
        return f"{_dashes(key, arguments)}{key}: {_explain_value(key, said, hint, _known_options(parser, arguments))}"
    return said


def _innermost(said: str) -> tuple[str, type | None, str]:
    """The option that a message is about, the class that has it if it is within one, and what is wrong with it.

    >>> _innermost("Parser key 'trainer.max_steps': Expected a <class 'int'>. Got value: x")
    ('trainer.max_steps', None, "Expected a <class 'int'>. Got value: x")
    """
    option, cls = "", None
    while found := re.match(r"Parser key [\"']([\w.]+)[\"']: (.*)", said):
        option, said = f"{option}.{found[1]}".lstrip("."), found[2]
        if inner := re.search(rf"Problem with given class_path '([\w.]+)': (({_IS_MISTAKE}).*)", said):
            unions = said[: inner.start()].count("Subtypes: [")  # each of them says its part at the end
            cls, said = _locate(inner[1]), inner[2]
            for _ in range(unions):
                said = said.rpartition(_UNION_ENDS)[0] or said
    return option, cls, said


def _explain_value(option: str, said: str, hint: Any, known: Sequence[str]) -> str:
    """What an option takes, in place of the parser's report on every type of a union."""
    value = _value(said)
    if said.startswith("Unable to load config"):
        inner = [other for other in known if other.startswith(f"{option}.")]
        options = f"; it has options of its own: {', '.join(inner[:_SHOWN])}" if inner else ""
        return f"{value!r} is no config file{options}"
    kinds = re.findall(r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\])(?=[ .]|$)", said)
    words = list(dict.fromkeys(word for kind in kinds for word in _in_words(kind)))
    if _NO_CLASS.search(said) and not {"an integer", "a number"} & {*words}:
        named = map(_locate, {*re.findall(r"(?:\w+\.)+\w+", said)} - {value})
        return _explain_class(value, said, [*_classes(hint), *filter(None, named)])
    if not words:
        return said
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    close = difflib.get_close_matches(value, [word.strip("'") for word in words if word.startswith("'")], n=1)
    shown = "null" if value == "None" else repr(value)
    return f"{shown} is not {_listed(words)}{_did_you_mean(close)}"


def _explain_class(value: str, said: str, bases: Sequence[type]) -> str:
    """Which classes an option takes in place of a value."""
    if value.startswith(("{", "[{")):
        named = re.search(r"'class_path': '(.*?)'", value)
        if named is None:
            return f"the class_path is missing beside {value}"
        value = named[1]
    reason = re.search(r"No module named '.*?'|module '.*?' has no attribute '.*?'", said)
    is_other = re.search(r"does not correspond to a subclass|to be a subclass of", said)
    names = {cls.__name__ for base in bases for cls in _concrete(base)}
    close = [] if is_other or reason else difflib.get_close_matches(value.rpartition(".")[2], sorted(names), n=1)
    own = ", ".join(sorted(cls.__name__ for base in filter(_is_own, bases) for cls in filter(_is_own, _concrete(base))))
    sentence = f"{value!r} is {'a class of another kind' if is_other else 'no file and no class'}"
    if reason:
        sentence += f" ({reason[0]})"
    if own:
        sentence += f"; known are {own}"
    return sentence + _did_you_mean(close)


def _value(said: str) -> str:
    """What was given for the option that a message of the parser is about."""
    for pattern in (
        r"Given value: ?(.*)$",
        r"Got value: ?(.*?)(?: Subclass types expect.*)?$",
        r"Expected a path but ?(.*?) either not accessible",
        r"Unable to load config ['\"](.*?)['\"]",
        r"Expected a dot import path string: ?(.*)$",
    ):
        if found := re.search(pattern, said):
            path = re.match(r"Namespace\(class_path='(.*?)'", found[1])
            return path[1] if path else found[1]
    return ""


def _in_words(kind: str) -> list[str]:
    """What a type is called, ``<class 'int'>`` for example; each literal is listed."""
    if kind.startswith("typing.Literal["):
        return re.findall(r"'.*?'|[^\s,\[\]]+", kind.removeprefix("typing.Literal"))
    name = re.sub(r"^<class '|'>$", "", kind).rpartition(".")[2]
    return ["true", "false"] if name == "bool" else [_WORDS.get(name, f"a {name}")]


def _kinds_of(hint: Any) -> list[str]:
    """What an argument with this annotation takes: literals, classes of this project, or a plain type in words."""
    if get_origin(hint) is Literal:
        return [repr(value) for value in get_args(hint)]
    names = {cls.__name__ for base in filter(_is_own, _classes(hint)) for cls in filter(_is_own, _concrete(base))}
    return sorted(names) or ([_WORDS[hint.__name__]] if isinstance(hint, type) and hint.__name__ in _WORDS else [])


def _dashes(option: str, arguments: Sequence[str]) -> str:
    """``--`` for an option of the command line, nothing for one of a config file."""
    given = (argument.partition("=")[0].replace("init_args.", "") for argument in arguments)
    return "--" if f"--{option}" in given else ""


def _known_options(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The names of a parser's options, with those of the classes that the command line names for model and data."""
    keys: list[str] = []
    # A section's class may be none, or the parser may have no such section.
    wrong = suppress(ValueError, KeyError, TypeError, ImportError, AttributeError)
    with wrong:
        keys += vars(parser.get_defaults().as_flat())
    for name, value in flags(arguments):
        if name in ("model", "data"):
            with wrong:
                parser.set_defaults({name: {"class_path": value}})
                keys += vars(parser.get_defaults().as_flat())
    names = [key.replace("init_args.", "") for key in keys]
    if "model.optimizer" in names:  # a function by default; these are options of the class that is named
        names += ["model.optimizer.lr", "model.optimizer.weight_decay"]
    return [name for name in dict.fromkeys(names) if not name.endswith(("class_path", "__subclasses_disabled__"))]


def _options_like(name: str, known: Sequence[str]) -> list[str]:
    """Options that end with a name, or else are spelt like it."""
    if ending := [other for other in known if other.endswith(f".{name}")]:
        return ending[:_SHOWN]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return close
    close = difflib.get_close_matches(name.rpartition(".")[2], [other.rpartition(".")[2] for other in known], n=1)
    return [other for other in known if other.rpartition(".")[2] in close][:_SHOWN]


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {_listed(names)}?" if names else ""


def _listed(words: Sequence[str]) -> str:
    """Words with commas and an "or" between them."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _locate(path: str) -> type | None:
    """A class by its path."""
    try:
        found = locate(path)
    except ErrorDuringImport:
        return None
    return found if inspect.isclass(found) else None


def _classes(hint: Any) -> Iterator[type]:
    """The classes in a type: the members of a union, the items of a list, the result of a function."""
    if inspect.isclass(hint) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from _classes(part)


def _is_own(cls: type) -> bool:
    return cls.__module__.startswith("lit_isdpo.")


def _concrete(base: type) -> Iterator[type]:
    """A class and those that are derived from it, if objects can be made of them."""
    is_lazy = base.__name__.startswith("LazyInstance_")  # the parser's own, of a default
    if not (is_lazy or inspect.isabstract(base) or getattr(base, "_is_protocol", False)):
        yield base
    derived: list[type] = base.__subclasses__()
    for cls in derived:
        yield from _concrete(cls)
