"""Faults, tried with seeds: ``python -m tests.tools.faults [--seeds N] [--only NAME ...]``.

Each fault runs a command of the command line in a process of its own on a tiny model, injures it at a moment that the
seed draws, gives the command again as a user would, and compares with a run that nothing happened to: weights,
optimizer, logged values, cached log-probs, evaluations and studies, to the bit. The table says what was tried and what
was lost; the exit status is 1 where something was lost beyond the last checkpoint, a result is wrong, a process hung,
or anything but one sentence was said.

{faults}
"""

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from tests.tools.faults.faults import FAULTS
from tests.tools.faults.world import Outcome, World


def attempt(world: World, name: str, seed: int) -> Outcome:
    """One fault with one seed."""
    folder = world.root / f"{name}-{seed}"
    folder.mkdir(parents=True)
    return FAULTS[name](world, Random(f"{name} {seed}"), folder)


def main() -> int:
    """Tries what was asked for, and prints the table."""
    described = "\n".join(f"{name}: {fault.__doc__}" for name, fault in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.faults",
        description=str(__doc__).replace("{faults}", described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each fault")
    parser.add_argument("--first", type=int, default=0, help="the first of these seeds")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME")
    parser.add_argument("--folder", type=Path, help="is kept; by default a temporary one")
    given = parser.parse_args()
    console, bad = Console(), 0
    table = Table("fault", "seed", "moment", "how it ended", "lost", "verdict", title="Faults")
    with tempfile.TemporaryDirectory() as temporary:
        world = World((given.folder or Path(temporary)).resolve())
        for name in given.only:
            for seed in range(given.first, given.first + given.seeds):
                try:
                    outcome = attempt(world, name, seed)
                except Exception as error:  # the rest is tried all the same
                    outcome = Outcome("-", "-", "-", [f"{type(error).__name__}: {error}"])
                bad += bool(outcome.problems)
                verdict = "[red]" + "; ".join(outcome.problems) if outcome.problems else "[green]good"
                table.add_row(name, str(seed), outcome.moment, outcome.ended, outcome.lost, verdict)
                said = "; ".join(outcome.problems) or "good"
                print(f"{name} {seed}: {said} | {' | '.join(outcome[:3])}", flush=True)
    console.print(table)
    print(f"{bad} of {given.seeds * len(given.only)} came out badly.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
