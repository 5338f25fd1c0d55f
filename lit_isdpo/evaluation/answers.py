"""The file of a judge's answers, which every run goes on from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from lit_isdpo.types import InputError


class Answers:
    """Raw answers in a file of JSON lines, by the digest of the request. Several processes may append to it.

    Answers are kept as they came, and read anew by every run. Lines that cannot be read are passed over, as a run that
    was killed may leave half of one behind.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = Lock()
        self._answers: dict[str, list[str]] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a+b") as lines:
                lines.seek(0)
                line = b""
                for line in lines:
                    self._read(line)
                if line and not line.endswith(b"\n"):
                    lines.write(b"\n")  # so that the next answer begins a line
        except OSError as error:
            raise InputError(f"judge.answers: {str(file)!r} cannot be used: {error.strerror}.") from error

    def __getitem__(self, key: str) -> Sequence[str]:
        """All answers to a request, oldest first."""
        return self._answers.get(key, [])

    def add(self, key: str, request: Mapping[str, Any], answer: str) -> None:
        """Keeps an answer. The request beside it is for people to read."""
        line = json.dumps({"key": key, "request": request, "answer": answer}) + "\n"
        with self._lock, self._file.open("ab", buffering=0) as lines:
            lines.write(line.encode())
            self._answers.setdefault(key, []).append(answer)

    def _read(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            key, answer = row["key"], row["answer"]
        except (ValueError, LookupError, TypeError):  # half a line, or none of ours
            return
        if isinstance(key, str) and isinstance(answer, str):
            self._answers.setdefault(key, []).append(answer)
