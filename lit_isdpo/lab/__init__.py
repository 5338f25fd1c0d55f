"""Controlled environments with a known gold reward, written as folders that data and policy read like any other."""

from pathlib import Path

from lit_isdpo.names import NAMES, Part


def _folder(name: str, part: Part) -> Path:
    """The folder of a name of the lab, where the command line has it by default."""
    from lit_isdpo.lab.folder import resolve  # torch and transformers take seconds

    return resolve(name, Path("runs") / "lab", default=part)


NAMES["lab"] = _folder
