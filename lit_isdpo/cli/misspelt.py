"""What the parser says of a mistake, in the user's own words, and what may have been meant."""

import difflib
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from lit_isdpo.commands.label import PreferenceLabels
from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.training.evaluation import Evaluation
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError

OTHER_VERBS = ("export", "study")  # of the command line, beside those of the parser
_SHOWN = 3  # options that are suggested
_REQUIRED = {
    "reward": "a reward (LabReward, RewardModel or a class of yours)",
    "weight": "a term's weight (of on_policy_kl, say)",
    "task": "a task of the lab (lab:posts, lab:verbosity or lab:length)",
    "loss": "a class of losses (DPOLoss, say)",
    "logratio": "IPO's kind of log-ratio (sum or mean)",
}
"""What options without a default are; the parser tells the last part of their name alone."""
_NO_CLASS = re.compile(
    r"Expected a dot import path string|Problem with given class_path|does not correspond to a subclass"
    r"|Not a valid subclass|expects a function or a callable class"
)
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
    for text in _values(arguments, ("--config", "-c")):
        path = Path(text).expanduser()
        option = f"--config: {text!r}"
        if path.is_dir():
            raise InputError(f"{option} is a folder; name a file in it.")
        if not path.exists():
            if "{" in text or "\n" in text:  # the options themselves
                continue
            raise InputError(f"--config: no such file: {text!r}{_did_you_mean(_names_like(path))}")
        try:
            content = yaml.safe_load(path.read_text())
        except OSError as error:
            raise InputError(f"{option} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{option} is no text file in UTF-8.") from error
        except yaml.YAMLError as error:
            said = str(getattr(error, "problem", None) or error)
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise InputError(f"{option} is not valid YAML: {said}{where}.") from error
        if not isinstance(content, dict):
            what = "is empty" if content is None else "does not map names to values"
            raise InputError(f"{option} {what}; a config file has lines such as 'trainer:', with options below.")


def explain_option(message: str, arguments: Sequence[str], parsers: Sequence[ArgumentParser] = ()) -> str:
    """A parser's message, with the flag that it is about, and what it may have been meant to be.

    Args:
        message: in one line; of an option of ``model`` or ``data`` the parser tells the last part of its name.
        arguments: the command line.
        parsers: whose options are suggested: that of the message, which may know those of a class only, and that of
            the verb.
    """
    if verb := re.search(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", message):
        return _explain_verb(verb[1], [*OTHER_VERBS, *re.findall(r"'(.*?)'", verb[2])], arguments)
    if missing := re.fullmatch(r"the following arguments are required: (?:\w+\.)?(\w+)", message):
        return f"{missing[1]}: {_REQUIRED.get(missing[1], 'it')} is missing, and has no default"
    if message.startswith('expected "subcommand"'):
        return "a verb is missing, fit for one; lit-isdpo --help lists all"
    if no_value := re.fullmatch(r"argument (--\w+): expected one argument", message):
        bare = [flag for flag in arguments if flag.startswith(f"{no_value[1]}.") and "=" not in flag]
        return f"{(bare or [no_value[1]])[-1]}: a value is missing"
    own, *others = [_known_options(parser, arguments) for parser in parsers] or [[]]
    known = list(dict.fromkeys(itertools.chain(own, *others)))
    if strange := re.fullmatch(r"unrecognized arguments: (.*)", message):
        flags = [_named(part.split("=")[0][2:], arguments) for part in strange[1].split(" ") if part.startswith("--")]
        return message + _did_you_mean(f"--{name}" for name in _options_like("".join(flags[:1]), known))
    if strange := re.fullmatch(r"Subcommand '\w+' does not accept option '([^']*)'.*", message):
        return f"{strange[1]}: there is no such option" + _did_you_mean(_options_like(strange[1], known))
    if strange := re.fullmatch(r"Option '([^']*)' is not accepted", message):
        option = _named(strange[1], arguments)
        names = _options_like(strange[1], own) or _options_like(option, known)
        close = [option.removesuffix(strange[1]) + name.rpartition(".")[2] for name in names]
        return f"{option}: there is no such option{_did_you_mean(close)}"
    if named := re.match(r"Parser key [\"']([\w.]+)[\"']: .*NestedArg\(key='(\w+)'", message):
        option = _named(f"{named[1]}.{named[2]}", arguments)
        return f"{option}: name the class first, as in {option.rpartition('.')[0]} torch.optim.AdamW"
    if named := re.match(r"Parser key [\"']([\w.]+)[\"']: (.*)", message):
        return _explain_value(_named(named[1], arguments), named[2], known)
    return message


def _explain_verb(given: str, verbs: list[str], arguments: Sequence[str]) -> str:
    if behind := [argument for argument in arguments if argument in verbs]:
        return f"the verb comes first, its options behind it: lit-isdpo {behind[0]} --..."
    close = difflib.get_close_matches(given, verbs, n=1)
    return f"there is no verb {given!r}; the verbs are {', '.join(verbs)}{_did_you_mean(close)}"


def _explain_value(option: str, said: str, known: Sequence[str]) -> str:
    """What an option takes, in place of the parser's report on every type of a union."""
    value, name = _value(said), option.removeprefix("--")
    if said.startswith("Unable to load config"):
        inner = [other for other in known if other.startswith(f"{name}.")]
        more = ", ..." if len(inner) > _SHOWN else ""
        options = f"; it has options of its own: {', '.join(inner[:_SHOWN])}{more}" if inner else ""
        return f"{option}: {value!r} is no config file{options}"
    union = re.search(r"Subtypes: \[(.*)\] Errors:", said)
    kinds = list(_split(union[1])) if union else re.findall(r"^Expected an? (.*)\. Got value:", said)
    words = list(dict.fromkeys(word for kind in kinds for word in _in_words(kind)))
    if _NO_CLASS.search(said) and not {"an integer", "a number"} & {*words}:
        return f"{option}: {_explain_class(value, name.rpartition('.')[2], said)}"
    if not words:
        return f"{option}: {said}"
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    close = difflib.get_close_matches(value, [word.strip("'") for word in words if word.startswith("'")], n=1)
    shown = "null" if value == "None" else repr(value)
    return f"{option}: {shown} is not {_listed(words)}{_did_you_mean(close)}"


def _explain_class(value: str, name: str, said: str) -> str:
    """Which classes an option of this name takes in place of a value."""
    if value.startswith(("{", "[{")):
        named = re.search(r"'class_path': '(.*?)'", value)
        if named is None:
            return f"the class_path is missing beside {value}"
        value = named[1]
    paths = sorted({*re.findall(r"(?:\w+\.)+\w+", said)} - {value})
    bases = [cls for cls in map(_locate, paths) if cls] + _kinds(name)
    classes = list(dict.fromkeys(cls for base in bases for cls in _concrete(base)))
    own = [cls.__name__ for cls in classes if any(base in inspect.getmro(cls) for base in bases if _is_own(base))]
    reason = re.search(r"No module named '.*?'|module '.*?' has no attribute '.*?'", said)
    is_other = "does not correspond to a subclass" in said
    names = [] if is_other or "No module named" in said else [cls.__name__ for cls in classes]
    close = difflib.get_close_matches(value.rpartition(".")[2], names, n=1)
    return (
        f"{value!r} is {'a class of another kind' if is_other else 'no file and no class'}"
        + (f" ({reason[0]})" if reason else "")
        + (f"; known are {', '.join(own)}" if own else "")
        + _did_you_mean(close)
    )


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
    """What a type is called, ``<class 'int'>`` for one; of literals each is listed."""
    if kind.startswith("typing.Literal["):
        return list(_split(kind[len("typing.Literal[") : -1]))
    name = re.sub(r"^<class '|'>$", "", kind).partition("[")[0].rpartition(".")[2]
    return ["true", "false"] if name == "bool" else [_WORDS.get(name, f"a {name}")]


def _split(types: str) -> Iterator[str]:
    """Types or literals between commas that are in no bracket.

    >>> list(_split("<class 'int'>, dict[str, int]"))
    ["<class 'int'>", 'dict[str, int]']
    """
    depth, part = 0, ""
    for character in types:
        depth += (character in "[(") - (character in "])")
        if character == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += character
    yield part.strip()


def _named(key: str, arguments: Sequence[str]) -> str:
    """The last flag of the command line whose name ends with a key; the key itself if it comes from a config file."""
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    found = (flag for flag in reversed(flags) if f".{flag.removeprefix('--')}".endswith(f".{key}"))
    return next(found, key).replace("init_args.", "")


def _values(arguments: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """What the command line gives for a flag, behind an equals sign or as the next argument."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if flag in flags:
            yield value if equals else following


def _known_options(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The names of a parser's options, with those of the classes that the command line names for model and data."""
    keys: list[str] = []
    # A section's class may be none, or the parser may have no such section.
    wrong = suppress(ValueError, KeyError, TypeError, ImportError, AttributeError)
    with wrong:
        keys += vars(parser.get_defaults().as_flat())
    for section in ("model", "data"):
        for value in _values(arguments, [f"--{section}"]):
            with wrong:
                parser.set_defaults({section: {"class_path": value}})
                keys += vars(parser.get_defaults().as_flat())
    names = [key.replace("init_args.", "") for key in keys]
    if "model.optimizer" in names:  # a function by default; these are options of the class that is named
        names += ["model.optimizer.lr", "model.optimizer.weight_decay"]
    return [name for name in dict.fromkeys(names) if not name.endswith(("class_path", "__subclasses_disabled__"))]


def _options_like(option: str, known: Sequence[str]) -> list[str]:
    """Options that end with a name, or else are spelt like it."""
    name = option.removeprefix("--")
    if ending := [other for other in known if other.endswith(f".{name}")]:
        return ending[:_SHOWN]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return close
    close = difflib.get_close_matches(name.rpartition(".")[2], [other.rpartition(".")[2] for other in known], n=1)
    return [other for other in known if other.rpartition(".")[2] in close][:_SHOWN]


def _names_like(path: Path) -> list[str]:
    """Files beside one that is not there, whose names are similar."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=1)]


def _did_you_mean(names: Iterable[str]) -> str:
    found = list(names)
    return f"; did you mean {_listed(found)}?" if found else ""


def _listed(words: Sequence[str]) -> str:
    """Words with commas and an "or" between them."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _locate(path: str) -> type | None:
    """A class by its path, if it is one that others are derived from."""
    try:
        found = locate(path)
    except ErrorDuringImport:
        return None
    return found if inspect.isclass(found) else None


def _kinds(name: str) -> list[type]:
    """The classes that an option of this name takes, wherever a class of this project has it."""
    todo: list[type] = [LanguageModule, TextDataModule, Evaluation, PreferenceLabels]
    seen: set[type] = set()
    found: dict[type, None] = {}
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        todo += cls.__subclasses__()
        hints: dict[str, Any] = get_type_hints(vars(cls).get("__init__", object.__init__))
        for option, hint in hints.items():
            for part in _classes(hint):
                if _is_own(part):
                    todo.append(part)
                if option == name and part not in (type(None), bool, int, float, str):
                    found[part] = None
    return list(found)


def _classes(hint: Any) -> Iterator[type]:
    """The classes in a type: of a union its members, of a list its items', of a function its result's."""
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
