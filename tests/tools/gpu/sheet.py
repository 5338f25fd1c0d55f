"""The findings of a step, one per line of a file, so that they survive if the step is cut off."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any


@dataclass(frozen=True)
class Sheet:
    """Takes down the findings of a step, and tells the step where and how it runs.

    Args:
        name: name of the step.
        device: cuda or cpu. On a CPU all sizes are tiny.
        root: folder of the report. Its ``steps/`` has the findings, one JSON object per line.
        work: folder for models and runs; it is removed at the end.
        ends: time at which the step is cut off, on the monotonic clock.
        model: model that ``speed`` trains.
        rate: measured FLOP/s of matrix products.
    """

    name: str
    device: str
    root: Path
    work: Path
    ends: float
    model: str = "1b"
    rate: float = math.nan

    @property
    def file(self) -> Path:
        """File of the findings."""
        return self.root / "steps" / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        """File of the step's output."""
        return self.root / "steps" / f"{self.name}.log"

    @property
    def folder(self) -> Path:
        """Folder for the step's files."""
        folder = self.work / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def is_gpu(self) -> bool:
        """Whether the step runs on a GPU, at a GPU's sizes."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until it is cut off."""
        return self.ends - monotonic()

    def row(self, table: str, **cells: Any) -> None:
        """Adds a row to a table."""
        self._write({"table": table, "cells": cells})

    def check(self, what: str, value: float, at_most: float) -> None:
        """Records whether a number is at most a bound; NaN is not."""
        self._write({"check": what, "value": value, "at_most": at_most, "passed": bool(value <= at_most)})

    def note(self, text: str) -> None:
        """Adds a sentence."""
        self._write({"note": text})

    def skip(self, what: str, why: str) -> None:
        """Names something that this device or environment cannot do."""
        self._write({"skipped": what, "why": why})

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(_plain(line)) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Reads all complete lines of a sheet."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
