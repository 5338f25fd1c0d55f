"""What a run has left in its folder."""

import csv
from pathlib import Path


def newest_run(root: Path) -> Path:
    """The folder of the last run under a root."""
    return max(root.glob("version_*"), key=lambda path: int(path.name.split("_")[1]))


def read_metrics(run: Path) -> dict[str, dict[int, float]]:
    """The run's CSV log: key -> optimizer step -> value."""
    values: dict[str, dict[int, float]] = {}
    with (run / "metrics.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            for key, value in row.items():
                if value and key not in ("step", "epoch"):
                    values.setdefault(key, {})[int(row["step"])] = float(value)
    return values
