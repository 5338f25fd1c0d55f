"""The runs of a study: designs x methods x a grid of settings x seeds, each combination one run of ``fit``.

Runs may build upon others, the preparations. A preparation is, for example, a reward model for each design and seed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lit_isdpo.types import InputError, first_line

SEED = "seed"  # in braces it stands for the run's seed
EXPORTED = "exported"  # the folder of a preparation's model, in that of its run
Value: TypeAlias = dict | list | Any  # type: ignore[type-arg]
"""Any value of an option. Of the type ``Any`` alone, jsonargparse would build what has a ``class_path``."""
COLUMNS = {"design", "method", "seed", "step", "progress"}
COLUMNS |= {"gold", "kl", "proxy", "win_rate", "weight", "ess", "support_mass", "loss", "accuracy", "length"}
"""The columns of the study's tables. No column of a setting may have one of these names."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A design, a method or a preparation: config files, the later over the earlier, and options on top of them.

    Args:
        config: one or several files for ``fit --config``.
        options: flags of ``fit``, without their dashes: ``{"trainer.max_epochs": 4}``. In a text, ``{seed}`` stands for
            the run's seed, so that ``lab:verbosity/pairs@{seed}`` draws other pairs for each seed. ``{NAME}`` stands
            for the folder of the model that the preparation NAME exported for the run's design and seed.
        without: flags of the study's grid that this variant does not have (DPO has no epsilon). It is run once for all
            of their values.
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
        design: the name of its design in the study.
        method: the name of its method or preparation.
        settings: its values of the grid, by their short names; a value that is no number and no text is JSON here.
        seed: seed of the order of the pairs, and the value of ``{seed}``.
        arguments: arguments of ``fit``.
        digest: digest of the arguments, the contents of the config files and the digests of ``needs``. The same run has
            the same folder in every study.
        needs: the preparations that its options mention.
        exports: whether it is a preparation, whose model is exported.
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
    def cell(self) -> str:
        """Its folder without the digest: ``verbosity/IS-DPO-beta=0.01-seed=0``."""
        parts = [self.method, *(f"{key}={value}" for key, value in self.settings.items()), f"seed={self.seed}"]
        return f"{self.design}/{''.join(c if c.isalnum() or c in '-=.+' else '_' for c in '-'.join(parts))}"

    @property
    def folder(self) -> str:
        """Below the folder of runs: ``verbosity/IS-DPO-beta=0.01-seed=0-1a2b3c4d``."""
        return f"{self.cell}-{self.digest}"


@dataclass(frozen=True)
class StudyPlan:
    """Plans the runs of a study.

    Args:
        designs: variants to train on.
        methods: variants that are laid over each design.
        grid: values of flags; every method is run with every combination of them.
        seeds: one run each.
        options: flags of all runs.
        prepare: variants that are laid over each design too, without the grid, for those seeds for which an option
            mentions them.
        root: the folder of runs, in which a run finds its preparations.
    """

    designs: Mapping[str, Variant]
    methods: Mapping[str, Variant]
    grid: Mapping[str, Sequence[Any]]
    seeds: Sequence[int]
    options: Mapping[str, Any]
    prepare: Mapping[str, Variant] = field(default_factory=dict)
    root: Path = Path()
    _preparations: dict[tuple[str, str, int], Run] = field(default_factory=dict, init=False)

    def runs(self) -> list[Run]:
        """Every combination, seed by seed, so that a study that is cut off has all methods on its first seeds.

        The preparations are not in the list, but its runs need them.

        Raises:
            InputError: something is empty, missing or there twice, or a value would silently give way to another; no
                option mentions a preparation, or an option of its own or of an earlier preparation does.
        """
        self._check()
        runs = {}
        for seed, design, (method, by) in product(self.seeds, self.designs, self.methods.items()):
            flags = [flag for flag in self.grid if flag not in by.without]
            for values in product(*(self.grid[flag] for flag in flags)):
                run = self._run(design, method, by, seed, dict(zip(flags, values, strict=True)))
                runs[run.folder] = run
        if unused := [name for name in self.prepare if all(name != made for made, _, _ in self._preparations)]:
            raise InputError(
                f"prepare: no run builds upon {unused}; mention {{{unused[0]}}} in an option, or leave it out."
            )
        return list(runs.values())

    def _check(self) -> None:
        for name, given in (("designs", self.designs), ("methods", self.methods), ("seeds", self.seeds)):
            if not given:
                raise InputError(f"{name}: a study needs at least one.")
        for design in self.designs:
            if Path(design).name != design or design in ("", ".."):
                raise InputError(f"designs: {design!r} names a folder of runs, so it cannot be a path.")
        for flag, values in self.grid.items():
            if not values:
                raise InputError(f"grid: {flag} has no values.")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: {list(self.seeds)} names a seed twice.")
        for method, variant in self.methods.items():
            if unknown := set(variant.without) - set(self.grid):
                raise InputError(f"methods.{method}.without: {sorted(unknown)} is not in the grid.")
        if SEED in self.prepare:
            raise InputError(
                f"prepare: {{{SEED}}} stands for the run's seed already; give the preparation another name."
            )
        for name, variant in self.prepare.items():
            if variant.without:
                raise InputError(f"prepare.{name}.without: a preparation has no flag of the grid; leave it out.")
        # A method that is without a flag of the grid takes the value from its own options or from those for all.
        varied = {name: set(self.grid).difference(one.without) for name, one in self.methods.items()}
        for_all = set.intersection(*varied.values())
        places = [("grid", self.grid, set()), ("options", self.options, for_all)]
        places += [(f"designs.{name}.options", one.options, for_all) for name, one in self.designs.items()]
        places += [(f"methods.{name}.options", one.options, varied[name]) for name, one in self.methods.items()]
        places += [(f"prepare.{name}.options", one.options, set()) for name, one in self.prepare.items()]
        for place, options, replaced in places:
            if both := set(options) & replaced:
                raise InputError(
                    f"{place}: {sorted(both)} is in the grid too, whose values would count; leave one out."
                )
            if "seed_everything" in options:
                raise InputError(f"{place}: seed_everything is each run's own, from seeds; leave it out.")

    def _run(
        self, design: str, name: str, by: Variant, seed: int, settings: Mapping[str, Any], exports: bool = False
    ) -> Run:
        """The run of a method or a preparation on a design."""
        on = self.designs[design]
        files = [*on.files, *by.files]
        given = {**self.options, **on.options, **by.options, **settings, "seed_everything": seed}
        given = _changed(given, self._quoted)
        text = json.dumps(given, default=str)
        names = list(self.prepare)
        mentioned = [one for one in names if json.dumps(f"{{{one}}}")[1:-1] in text]
        if exports and (late := [f"{{{one}}}" for one in names[names.index(name) :] if one in mentioned]):
            raise InputError(
                f"prepare.{name}: its options, with those of {design!r} and the study, mention {' and '.join(late)}; "
                "a preparation can build upon those before it in the section, and no other."
            )
        needs = tuple(self._preparation(one, design, seed) for one in mentioned)
        words = {f"{{{need.method}}}": str(self.root.absolute() / need.folder / EXPORTED) for need in needs}
        if crooked := [folder for folder in words.values() if ": " in folder]:  # the command line reads a mapping
            raise InputError(
                f"prepare: no option can be given the folder {crooked[0]!r}, as ': ' is in its name; name runs_dir and "
                "the design without it."
            )
        words[f"{{{SEED}}}"] = str(seed)

        mention = re.compile("|".join(map(re.escape, words)))

        def fill(part: Any) -> Any:  # all at once, as a folder's name may look like a mention
            return mention.sub(lambda found: words[found[0]], part) if isinstance(part, str) else part

        arguments = [f"--config={file}" for file in files]
        arguments += [f"--{flag}={_dump(_changed(value, fill))}" for flag, value in given.items()]
        # The arguments have the root in them. Parts are appended only where there are some, as old runs lack them.
        identity: list[Any] = [[self._contents[file] for file in files], given]
        if needs:
            identity.append({need.method: need.digest for need in needs})
        if exports:  # a run of the same options that is not exported is no preparation
            identity.append(EXPORTED)
        digest = sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        labels = {self._short[flag]: _label(value) for flag, value in settings.items()}
        return Run(design, name, labels, seed, tuple(arguments), digest, needs, exports)

    def _preparation(self, name: str, design: str, seed: int) -> Run:
        key = (name, design, seed)
        if key not in self._preparations:
            self._preparations[key] = self._run(design, name, self.prepare[name], seed, {}, exports=True)
        return self._preparations[key]

    def _quoted(self, part: Any) -> Any:
        """YAML makes a mapping of ``{NAME}`` without quotes, and jsonargparse does of a name with a space in quotes."""
        return next((f"{{{name}}}" for name in self.prepare if isinstance(part, dict) and part == _flow(name)), part)

    @cached_property
    def _contents(self) -> dict[str, Any]:
        """The contents of the config files."""
        variants = (*self.designs.values(), *self.prepare.values(), *self.methods.values())
        return {file: _read(file) for file in dict.fromkeys(file for one in variants for file in one.files)}

    @cached_property
    def _short(self) -> dict[str, str]:
        """The last part of each flag, unless it is the last part of another flag or a column of the tables."""
        last = {flag: flag.rpartition(".")[2] for flag in self.grid}
        often = Counter(last.values())
        return {flag: name if often[name] == 1 and name not in COLUMNS else flag for flag, name in last.items()}


def with_needs(runs: Iterable[Run], wanted: Callable[[Run], bool] = lambda run: True) -> list[Run]:
    """The runs, each once and behind the preparations that it needs; only those that are wanted, and what they need."""
    found: dict[str, Run] = {}
    for run in filter(wanted, runs):
        for one in (*with_needs(run.needs, wanted), run):
            found.setdefault(one.folder, one)
    return list(found.values())


def find_run(runs: Sequence[Run], name: str) -> Run:
    """The run of that name, or the preparation.

    Args:
        runs: the runs of a study.
        name: ``DESIGN/METHOD`` if there is one such run, or :attr:`Run.cell`, or :attr:`Run.folder`.

    Raises:
        InputError: there is no such run, or there are several.
    """
    known = with_needs(runs)
    found = [run for run in known if name in (f"{run.design}/{run.method}", run.cell, run.folder)]
    if len(found) == 1:
        return found[0]
    cells = "; ".join([run.cell for run in found or known][:8])
    if found:
        raise InputError(f"show: {name!r} is the name of {len(found)} runs; name one, for example of {cells}.")
    raise InputError(f"show: the study has no run {name!r}; it has, for example, {cells}.")


def _read(file: str) -> Any:
    try:
        return yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"config: cannot read {file!r}, named from the current folder: {first_line(error)}") from error


def _flow(name: str) -> Any:
    """What YAML makes of the name in braces."""
    try:
        return yaml.safe_load(f"{{{name}}}")
    except yaml.YAMLError:
        return None


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with ``change`` made to it and to all its parts, keys of mappings included."""
    value = change(value)
    if isinstance(value, dict):
        return {change(key): _changed(part, change) for key, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, list | tuple) else value


def _dump(value: Any) -> str:
    """The value of a flag: a text as it is, anything else as YAML, which has infinity."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


def _label(value: Any) -> Any:
    """A value that a table can be grouped by; null is a value too, and none that is missing."""
    return value if isinstance(value, int | float | str) else json.dumps(value)
