"""What a study consists of: designs x methods x a grid of settings x seeds, each combination one run of ``fit``.

Runs may build upon others, its preparations: a reward model, say, trained for each design and seed.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lit_isdpo.types import InputError

SEED = "seed"  # in braces it stands for the run's seed in an option's value
EXPORTED = "exported"  # the folder of a preparation's model, in that of its run
Value: TypeAlias = dict | list | Any  # type: ignore[type-arg]
"""Of an option: anything. Of ``Any`` alone jsonargparse would fill in a mapping with a ``class_path``."""
COLUMNS = {"design", "method", "seed", "step", "progress"}
COLUMNS |= {"gold", "kl", "proxy", "win_rate", "weight", "ess", "support_mass", "loss", "accuracy", "length"}
"""Of the study's tables: a setting's column may have none of these names."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A design, a method or a preparation: config files, the later over the earlier, and options on top of them.

    Args:
        config: files for ``fit --config``, one or several.
        options: flags of ``fit``, without their dashes: ``{"trainer.max_epochs": 4}``. In a text, ``{seed}`` stands for
            the run's seed: ``lab:verbosity/pairs@{seed}`` draws other pairs for each; ``{NAME}`` stands for the folder
            of the model that the preparation NAME exported, for the run's design and seed.
        without: flags of the study's grid that this variant does not have (DPO has no epsilon, say); it is run once for
            all of their values.
    """

    config: str | list[str] = field(default_factory=list)
    options: dict[str, Value] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """The config files."""
        return [self.config] if isinstance(self.config, str) else self.config


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        design: its name in the study.
        method: likewise; or the preparation.
        settings: values of the grid, by their short names; what is no number or text is there as JSON.
        seed: of the order of the pairs, and of what the options make of ``{seed}``.
        arguments: of ``fit``.
        digest: of the arguments, of what their config files say, and of the digests of ``needs``: the same run has the
            same folder in every study.
        needs: the preparations that its options mention.
        exports: it is a preparation, whose model is exported.
    """

    design: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    arguments: tuple[str, ...]
    digest: str
    needs: tuple["Run", ...] = ()
    exports: bool = False

    @property
    def name(self) -> str:
        """For people: ``verbosity, IS-DPO, beta 0.01, seed 0``."""
        settings = [f"{key} {value}" for key, value in self.settings.items()]
        return ", ".join([self.design, self.method, *settings, f"seed {self.seed}"])

    @property
    def folder(self) -> str:
        """Below the folder of runs: ``verbosity/IS-DPO-beta=0.01-seed=0-1a2b3c4d``."""
        parts = [self.method, *(f"{key}={value}" for key, value in self.settings.items()), f"seed={self.seed}"]
        safe = "".join(c if c.isalnum() or c in "-=.+" else "_" for c in "-".join(parts))
        return f"{self.design}/{safe}-{self.digest}"


def plan_runs(
    designs: Mapping[str, Variant],
    methods: Mapping[str, Variant],
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
    options: Mapping[str, Any],
    prepare: Mapping[str, Variant] | None = None,
    root: Path = Path(),
) -> list[Run]:
    """Every combination, seed by seed, so that a study that is cut off has all methods on its first seeds.

    Args:
        designs: what is trained on.
        methods: laid over each design.
        grid: values of flags, over which every method is run.
        seeds: one run each.
        options: flags of all runs.
        prepare: laid over each design too, without the grid, for those seeds with which an option mentions them. They
            are not in the list, but are what its runs need.
        root: the folder of runs, in which a run finds its preparations.

    Raises:
        InputError: something is empty, missing or there twice, or a value would silently give way to another; a
            preparation is not mentioned at all, or in an option of its own or of an earlier one.
    """
    prepare = prepare or {}
    for name, given in (("designs", designs), ("methods", methods), ("seeds", seeds)):
        if not given:
            raise InputError(f"{name}: a study needs at least one.")
    for design in designs:
        if Path(design).name != design or design in ("", ".."):
            raise InputError(f"designs: {design!r} names a folder of runs, so it cannot be a path.")
    for flag, values in grid.items():
        if not values:
            raise InputError(f"grid: {flag} has no values.")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds: {list(seeds)} names a seed twice.")
    for method, variant in methods.items():
        if unknown := set(variant.without) - set(grid):
            raise InputError(f"methods.{method}.without: {sorted(unknown)} is not in the grid.")
    if SEED in prepare:
        raise InputError(f"prepare: {{{SEED}}} stands for the run's seed already; give the preparation another name.")
    for name, variant in prepare.items():
        if variant.without:
            raise InputError(f"prepare.{name}.without: a preparation has no flag of the grid; leave it out.")
    _check_options(designs, methods, grid, options, prepare)
    planner = _Planner(designs, prepare, options, root.absolute())
    for variant in methods.values():
        planner.read(variant)
    short = _short_names(list(grid))
    runs = {}
    for seed, design, (method, by) in product(seeds, designs, methods.items()):
        flags = [flag for flag in grid if flag not in by.without]
        for values in product(*(grid[flag] for flag in flags)):
            settings = dict(zip(flags, values, strict=True))
            labels = {short[flag]: _label(value) for flag, value in settings.items()}
            run = planner.run(design, method, by, seed, settings, labels)
            runs[run.folder] = run
    if unused := [name for name in prepare if name not in planner.used]:
        raise InputError(
            f"prepare: no run builds upon {unused}; mention {{{unused[0]}}} in an option, or leave it out."
        )
    return list(runs.values())


class _Planner:
    """Makes runs of what the study's file says, and the preparations that they mention."""

    def __init__(
        self, designs: Mapping[str, Variant], prepare: Mapping[str, Variant], options: Mapping[str, Any], root: Path
    ) -> None:
        self.designs, self.prepare, self.options, self.root = designs, prepare, options, root
        self.used: set[str] = set()  # names of preparations
        self._contents: dict[str, Any] = {}  # of config files
        self._made: dict[tuple[str, str, int], Run] = {}  # preparations, by name, design and seed
        self._mention = re.compile("|".join(re.escape(f"{{{name}}}") for name in (SEED, *prepare)))
        self._unquoted = [(name, _flow_mapping(name)) for name in prepare]
        for variant in (*designs.values(), *prepare.values()):
            self.read(variant)

    def read(self, variant: Variant) -> None:
        """Reads its config files."""
        self._contents.update({file: _read(file) for file in variant.files if file not in self._contents})

    def run(
        self,
        design: str,
        name: str,
        by: Variant,
        seed: int,
        settings: Mapping[str, Any],
        labels: Mapping[str, Any],
        exports: bool = False,
    ) -> Run:
        """The run of a method or a preparation on a design."""
        on = self.designs[design]
        files = [*on.files, *by.files]
        given = {**self.options, **on.options, **by.options, **settings, "seed_everything": seed}
        given = {flag: self._as_text(value) for flag, value in given.items()}
        mentioned = {found[1:-1] for text in _texts(given.values()) for found in self._mention.findall(text)}
        names = list(self.prepare)
        if exports and (late := [f"{{{one}}}" for one in names[names.index(name) :] if one in mentioned]):
            raise InputError(
                f"prepare.{name}: its options, with those of {design!r} and the study, mention {' and '.join(late)}; "
                "a preparation can build upon those before it in the section, and no other."
            )
        needs = tuple(self._preparation(one, design, seed) for one in names if one in mentioned)
        words = {f"{{{need.method}}}": str(self.root / need.folder / EXPORTED) for need in needs}
        if crooked := [folder for folder in words.values() if ": " in folder]:  # the command line reads a mapping
            raise InputError(
                f"prepare: no option can be given the folder {crooked[0]!r}, as ': ' is in its name; name runs_dir and "
                "the design without it."
            )
        words[f"{{{SEED}}}"] = str(seed)
        arguments = (
            *(f"--config={file}" for file in files),
            *(f"--{flag}={_dump(self._fill(value, words))}" for flag, value in given.items()),
        )
        # Not of the arguments, as they have the root in them. What is appended leaves all other runs their folders.
        identity: list[Any] = [[self._contents[file] for file in files], given]
        if needs:
            identity.append({need.method: need.digest for need in needs})
        if exports:  # a run of the same options that is not exported is no preparation
            identity.append(EXPORTED)
        digest = sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return Run(design, name, labels, seed, arguments, digest, needs, exports)

    def _preparation(self, name: str, design: str, seed: int) -> Run:
        key = (name, design, seed)
        if key not in self._made:
            self._made[key] = self.run(design, name, self.prepare[name], seed, {}, {}, exports=True)
            self.used.add(name)
        return self._made[key]

    def _as_text(self, value: Any) -> Any:
        """YAML makes a mapping of ``{NAME}`` without quotes, and jsonargparse does of a name with a space in quotes."""
        for name, mapping in self._unquoted:
            if isinstance(value, dict) and value == mapping:
                return f"{{{name}}}"
        if isinstance(value, dict):
            return {key: self._as_text(part) for key, part in value.items()}
        return [self._as_text(part) for part in value] if isinstance(value, list | tuple) else value

    def _fill(self, value: Any, words: Mapping[str, str]) -> Any:
        """Replaces all at once: a folder's name may look like a mention."""
        if isinstance(value, str):
            filled = self._mention.sub(lambda found: words[found[0]], value)
            return value if filled == value else _Filled(filled)
        if isinstance(value, dict):
            return {self._fill(key, words): self._fill(part, words) for key, part in value.items()}
        return [self._fill(part, words) for part in value] if isinstance(value, list | tuple) else value


def _check_options(
    designs: Mapping[str, Variant],
    methods: Mapping[str, Variant],
    grid: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
    prepare: Mapping[str, Variant],
) -> None:
    """Raises InputError for an option that has no effect, as the grid's values or the run's seed take its place."""
    # A method that is without a flag of the grid takes the value from its own options or from those for all.
    for_all = set(grid).difference(*(variant.without for variant in methods.values()))
    places = [("options", options, for_all)]
    places += [(f"designs.{name}.options", variant.options, for_all) for name, variant in designs.items()]
    places += [(f"methods.{name}.options", one.options, set(grid) - set(one.without)) for name, one in methods.items()]
    places += [(f"prepare.{name}.options", variant.options, set()) for name, variant in prepare.items()]
    for place, given, varied in places:
        if both := set(given) & varied:
            raise InputError(f"{place}: {sorted(both)} is in the grid too, whose values would count; leave one out.")
    for place, flags in (("grid", grid), *((place, given) for place, given, _ in places)):
        if "seed_everything" in flags:
            raise InputError(f"{place}: seed_everything is each run's own, from seeds; leave it out.")


def _read(file: str) -> Any:
    try:
        return yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"config: cannot read {file!r}, named from the current folder: {reason}") from error


def _flow_mapping(name: str) -> Any:
    """What YAML makes of the name in braces."""
    try:
        return yaml.safe_load(f"{{{name}}}")
    except yaml.YAMLError:
        return None


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """All texts, however deep, keys of mappings included."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts([*value, *value.values()])
        elif isinstance(value, list | tuple):
            yield from _texts(value)


class _Filled(str):
    """A text in which something was replaced: it stays a text in YAML, even if it looks like a number now."""


class _Dumper(yaml.SafeDumper):
    """Writes those too."""


_Dumper.add_representer(
    _Filled, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="'")
)


def _dump(value: Any) -> str:
    """A flag's value as it is typed: texts as they stand, all else as YAML, which has infinity."""
    if isinstance(value, str):
        return str(value)
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()


def _label(value: Any) -> Any:
    """A value that a table can be grouped by; null is a value too, and none that is missing."""
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _short_names(flags: Sequence[str]) -> dict[str, str]:
    """The last part of each flag, where it is not the last part of another, and no other column of the tables."""
    last = [flag.split(".")[-1] for flag in flags]
    alone = [last.count(name) == 1 and name not in COLUMNS for name in last]
    return {flag: name if short else flag for flag, name, short in zip(flags, last, alone, strict=True)}
