"""What a step writes down, line by line, so that a step that is cut off leaves what it has found."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any


@dataclass(frozen=True)
class Sheet:
    """A step's own.

    Args:
        name: of the step.
        device: cuda or cpu. On a CPU everything is tiny, so that the check stays alive where there is no GPU.
        root: folder of the report; what the step finds is in ``steps/`` there, a JSON object per line.
        work: folder of everything else: models, runs.
        ends: when the step is cut off, on this machine's monotonic clock.
        model: which shapes ``speed`` measures.
    """

    name: str
    device: str
    root: Path
    work: Path
    ends: float
    model: str = "1b"

    @property
    def file(self) -> Path:
        """Its findings."""
        return self.root / "steps" / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.root / "steps" / f"{self.name}.log"

    @property
    def folder(self) -> Path:
        """For its own files."""
        folder = self.work / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def is_gpu(self) -> bool:
        """Whether sizes are those of a GPU."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until it is cut off."""
        return self.ends - monotonic()

    def row(self, table: str, **cells: Any) -> None:
        """A row of a table; columns are named by its first row."""
        self._write({"table": table, "cells": cells})

    def check(self, what: str, value: float, at_most: float) -> None:
        """A number that must not be larger; NaN is."""
        self._write({"check": what, "value": value, "at_most": at_most, "passed": bool(value <= at_most)})

    def note(self, text: str) -> None:
        """A sentence."""
        self._write({"note": text})

    def skip(self, what: str, why: str) -> None:
        """Says by name what this device cannot do."""
        self._write({"skipped": what, "why": why})

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(_plain(line)) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a sheet."""
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
