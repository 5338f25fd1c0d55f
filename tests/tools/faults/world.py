"""What faults are tried on: a tiny model, a few pairs, and unbroken runs to compare with."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import yaml

from lit_isdpo.study.results import read_log
from lit_isdpo.training.checkpoint_files import StoredCheckpoint
from tests.conftest import tiny_options, write_model, write_pairs
from tests.tools.faults.process import Ended, Progress, run, steps_done

NUM_STEPS = 10  # of 4 to an epoch, of two micro-batches each
SAVED_EVERY = 3
SAVED_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "recent_log_weights", "global_step")


class Outcome(NamedTuple):
    """What a fault came to.

    Attributes:
        moment: when it struck.
        ended: the process's status and last words.
        lost: what had to be done again.
        problems: what is wrong; nothing where all is well.
    """

    moment: str
    ended: str
    lost: str
    problems: list[str]


@dataclass
class World:
    """A folder with model, data and unbroken runs, which are made when they are first asked for."""

    root: Path
    _unbroken: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def options(self) -> list[str]:
        """Arguments of every verb."""
        self.root.mkdir(parents=True, exist_ok=True)
        model = write_model(self.root / "model")
        pairs = write_pairs(self.root / "pairs.jsonl")
        more = ["--probe.num_prompts=0", "--data.micro_batch_size=4", f"--data.test={pairs}"]
        return [*tiny_options(model, pairs), *more]

    def fit_arguments(self, root: Path, *more: str) -> list[str]:
        """Of a fit that saves every few steps, and goes on where there is something to go on from."""
        steps = [f"--trainer.max_steps={NUM_STEPS}", f"--last.every_n_steps={SAVED_EVERY}"]
        best = ["--checkpoint.monitor=val/loss", "--checkpoint.save_top_k=2"]
        progress = [
            f"--trainer.callbacks+={Progress.__module__}.Progress",
            f"--trainer.callbacks.file={root}.progress",
        ]
        on = [f"--ckpt_path={found}"] if (found := last(root)) else []
        return ["fit", *self.options, *steps, *best, *progress, f"--trainer.default_root_dir={root}", *on, *more]

    def fit(self, root: Path, *more: str, **how: Any) -> Ended:
        """Makes that fit."""
        return run(self.fit_arguments(root, *more), root, **how)

    def unbroken(self, name: str, make: Callable[[Path], Any]) -> Any:
        """What ``make`` gives where nothing happens."""
        if name not in self._unbroken:
            self._unbroken[name] = make(self.root / "unbroken" / name)
        return self._unbroken[name]

    def unbroken_fit(self, *more: str) -> tuple[dict[str, Any], Any, Ended]:
        """End, log and process of an unbroken fit."""

        def make(root: Path) -> tuple[dict[str, Any], Any, Ended]:
            root.parent.mkdir(parents=True, exist_ok=True)
            ended = self.fit(root, *more)
            assert ended.status == 0, ended.printed
            return end_of(root), losses(root), ended

        return self.unbroken("fit " + " ".join(more).replace("/", "_"), make)

    @cached_property
    def checkpoint(self) -> Path:
        """That of the unbroken fit."""
        self.unbroken_fit()
        found = last(self.root / "unbroken" / "fit ")
        assert found is not None
        return found


def last(root: Path) -> Path | None:
    """The newest run's last checkpoint, as a user would look for it."""
    found = [path for path in root.glob("version_*/checkpoints/last.ckpt") if path.exists()]
    return max(found, key=lambda path: int(path.parts[-3].split("_")[1])) if found else None


def end_of(root: Path) -> dict[str, Any]:
    """What the last checkpoint holds; of a folder its model alone."""
    path = last(root)
    assert path is not None
    stored = StoredCheckpoint(path)
    stored.check()
    if stored.is_folder:
        return {"state_dict": stored.read("policy.model."), "global_step": stored.extras["global_step"]}
    return {key: stored.extras[key] for key in SAVED_KEYS}


def losses(root: Path) -> dict[str, dict[int, float]]:
    """Every training value by step, of a run and of those that went on from it."""
    log = read_log(root)
    return {key: log[key].dropna().to_dict() for key in log if key.startswith("train/")}


def same(a: Any, b: Any) -> bool:
    """Equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def compare_fit(world: World, root: Path, *more: str, unlogged: int | None = None) -> list[str]:
    """What differs from the unbroken fit; of one step the log may be missing."""
    end, log, _ = world.unbroken_fit(*more)
    problems = [
        f"other {key} than the unbroken run's" for key, value in end_of(root).items() if not same(value, end[key])
    ]
    for key, values in losses(root).items():
        missing = sorted(log[key].keys() - values.keys() - {unlogged})
        wrong = [step for step, value in values.items() if log[key].get(step) != value]
        if missing or wrong:
            problems.append(f"{key}: steps {missing} are not logged, {wrong} are logged otherwise")
            break
    return problems


def go_on(world: World, root: Path, *more: str, abrupt: bool = False) -> tuple[str, list[str]]:
    """Gives the fit's command again, from the last checkpoint if there is one; what was lost, and what is wrong.

    What is logged of a step is written a moment after its checkpoint: what comes between the two loses that line.
    """
    done = steps_done(Path(f"{root}.progress"))
    found, problems, saved = last(root), [], 0
    if found is not None:
        saved = int(StoredCheckpoint(found).extras["global_step"])
    if done - saved > SAVED_EVERY:  # a step is done a moment before it is saved
        problems.append(f"{done} steps were done and only {saved} are saved")
    ended = world.fit(root, *more)
    if ended.status != 0:
        return "all", [*problems, f"it does not go on: {ended.sentence}"]
    unlogged = saved - 1 if abrupt else None
    differences = compare_fit(world, root, *more, unlogged=unlogged)
    is_logged = unlogged is None or saved == 0 or unlogged in losses(root)["train/loss"]
    return f"{max(0, done - saved)} steps of {done}" + (
        "" if is_logged else ", a line of the log"
    ), problems + differences


def check_end(ended: Ended, status: int | None, *words: str) -> list[str]:
    """What is wrong with how a process ended."""
    problems = []
    if ended.status is None:
        problems.append("it hung")
    elif status is not None and ended.status != status:
        problems.append(f"status {ended.status} instead of {status}")
    if "Traceback" in ended.printed:
        problems.append("a traceback")
    problems += [f"no word of {word!r}" for word in words if word not in ended.printed]
    return problems


def describe(ended: Ended) -> str:
    """Status and last words."""
    return f"{ended.status}: {ended.sentence}" if ended.sentence else str(ended.status)


def damage(file: Path, rng: Random) -> str:
    """Cuts a file short, or flips one bit of it."""
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.3:
        file.write_bytes(content[:place])
        return f"{file.name} cut at byte {place} of {len(content)}"
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"a bit of byte {place} of {len(content)} of {file.name} flipped"


def write_study(world: World, root: Path) -> Path:
    """A study of two runs."""
    flags = dict(
        option.removeprefix("--").split("=", 1) for option in world.options if not option.startswith("--data.test")
    )
    design = root / "design.yaml"
    root.mkdir(parents=True, exist_ok=True)
    design.write_text("trainer: {max_steps: 4, val_check_interval: 4}\nlast: {every_n_steps: 1}\n")
    options = {key: yaml.safe_load(value) for key, value in flags.items()}
    study = {
        "title": "faults",
        "output_dir": str(root / "report"),
        "runs_dir": str(root / "runs"),
        "designs": {"tiny": str(design)},
        "methods": {"DPO": {"options": {"model.weighting": "UniformWeighting"}}, "IS-DPO": {"options": {}}},
        "seeds": [0],
        "options": options,
        "num_workers": 2,
    }
    file = root / "study.yaml"
    file.write_text(json.dumps(study))
    return file


def as_lines(file: Path, key: str) -> str:
    """A part of a JSON file, comparable, NaN too."""
    return json.dumps(json.loads(file.read_text())[key], sort_keys=True)
