"""What a study consists of: designs x methods x a grid of settings x seeds, each combination one run of ``fit``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lit_isdpo.types import InputError

SEED = "{seed}"  # stands for the run's seed in an option's value
COLUMNS = {"design", "method", "seed", "step", "progress"}
COLUMNS |= {"gold", "kl", "win_rate", "weight", "ess", "support_mass", "loss", "accuracy", "length"}
"""Of the study's tables: a setting's column may have none of these names."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A design or a method: config files, the later over the earlier, and options on top of them.

    Args:
        config: files for ``fit --config``, one or several.
        options: flags of ``fit``, without their dashes: ``{"trainer.max_epochs": 4}``. In a text, ``{seed}`` stands for
            the run's seed: ``lab:verbosity/pairs@{seed}`` draws other pairs for each.
        without: flags of the study's grid that this variant does not have (DPO has no epsilon, say); it is run once for
            all of their values.
    """

    config: str | list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
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
        method: likewise.
        settings: values of the grid, by their short names; what is no number or text is there as JSON.
        seed: of the order of the pairs, and of what the options make of ``{seed}``.
        arguments: of ``fit``.
        digest: of the arguments and of what their config files say: the same run has the same folder in every study.
    """

    design: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    arguments: tuple[str, ...]
    digest: str

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
) -> list[Run]:
    """Every combination, seed by seed, so that a study that is cut off has all methods on its first seeds.

    Args:
        designs: what is trained on.
        methods: laid over each design.
        grid: values of flags, over which every method is run.
        seeds: one run each.
        options: flags of all runs.

    Raises:
        InputError: something is empty, missing or there twice, or a value would silently give way to another.
    """
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
    _check_options(designs, methods, grid, options)
    contents = {file: _read(file) for variant in (*designs.values(), *methods.values()) for file in variant.files}
    short = _short_names(list(grid))
    runs = {}
    for seed, (design, on), (method, by) in product(seeds, designs.items(), methods.items()):
        flags = [flag for flag in grid if flag not in by.without]
        for values in product(*(grid[flag] for flag in flags)):
            settings = dict(zip(flags, values, strict=True))
            files = [*on.files, *by.files]
            given_options = {**options, **on.options, **by.options, **settings, "seed_everything": seed}
            arguments = (
                *(f"--config={file}" for file in files),
                *(f"--{flag}={_text(value, seed)}" for flag, value in given_options.items()),
            )
            identity = json.dumps([[contents[file] for file in files], given_options], sort_keys=True, default=str)
            run = Run(
                design,
                method,
                {short[flag]: _label(value) for flag, value in settings.items()},
                seed,
                arguments,
                sha256(identity.encode()).hexdigest()[:8],
            )
            runs[run.folder] = run
    return list(runs.values())


def _check_options(
    designs: Mapping[str, Variant],
    methods: Mapping[str, Variant],
    grid: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
) -> None:
    """Raises InputError for an option that has no effect, as the grid's values or the run's seed take its place."""
    # A method that is without a flag of the grid takes the value from its own options or from those for all.
    for_all = set(grid).difference(*(variant.without for variant in methods.values()))
    places = [("options", options, for_all)]
    places += [(f"designs.{name}.options", variant.options, for_all) for name, variant in designs.items()]
    places += [(f"methods.{name}.options", one.options, set(grid) - set(one.without)) for name, one in methods.items()]
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


def _text(value: Any, seed: int) -> str:
    """A flag's value as it is typed: texts as they stand, all else as YAML, which has infinity."""
    if not isinstance(value, str):
        value = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
    return str(value).replace(SEED, str(seed))


def _label(value: Any) -> Any:
    """A value that a table can be grouped by; null is a value too, and none that is missing."""
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _short_names(flags: Sequence[str]) -> dict[str, str]:
    """The last part of each flag, where it is not the last part of another, and no other column of the tables."""
    last = [flag.split(".")[-1] for flag in flags]
    alone = [last.count(name) == 1 and name not in COLUMNS for name in last]
    return {flag: name if short else flag for flag, name, short in zip(flags, last, alone, strict=True)}
