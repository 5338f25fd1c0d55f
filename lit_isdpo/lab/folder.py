"""The lab's environments as files, and the names (``lab:posts``) under which the rest of the project asks for them.

    ROOT/NAME-SEED-HASH/
        pairs/      train, validation and test .jsonl of preference pairs, and environment.json, which tells of them
        sft/        train and validation .jsonl of demonstrations, and the like marker
        reference/  the model that wrote the pairs: a Hugging Face folder, shipped with the package
        init/       its architecture and tokenizer without weights, to train it anew

NAME is posts, verbosity or length. Other sets of pairs of an environment have a folder of their own name. Each part is
written when it is first asked for. HASH covers the reference and the environment's format, so files of another version
are never taken for these.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from lit_isdpo.lab import designs
from lit_isdpo.lab.environments import Enumerable, Environment, Posts
from lit_isdpo.lab.exact import ExactEvaluation
from lit_isdpo.types import InputError

PREFIX = "lab:"
MARKER = "environment.json"
ENVIRONMENTS: Mapping[str, Environment] = {
    "posts": Posts(),
    "verbosity": Enumerable(designs.verbosity),
    "length": Enumerable(designs.length),
}


def resolve(
    source: str,
    root: Path,
    *,
    default: Literal["pairs", "reference"] = "pairs",
    say: Callable[[str], Any] = lambda text: None,
) -> Path:
    """Turns a name of the lab into a folder, which is written if it is not there yet.

    Args:
        source: ``lab:NAME``, ``lab:NAME/PART``, each with ``@SEED`` behind it for a seed other than 0. The names and
            parts are those of this module's text.
        root: where the environments are kept.
        default: what ``lab:NAME`` without a part means: pairs to a data set, the reference to a model path.
        say: gets a sentence before pairs are drawn, which takes a while.

    Raises:
        InputError: the lab has nothing of that name.
    """
    match = re.fullmatch(r"lab:(\w+)(?:/(\w+))?(?:@(\d{1,9}))?", source)
    parts = _parts(match[1]) if match is not None and match[1] in ENVIRONMENTS else []
    part = default if match is None else match[2] or default
    if match is None or part not in parts:
        there_is = ", ".join(f"lab:{name}/{part}" for name in ENVIRONMENTS for part in _parts(name))
        raise InputError(
            f"the lab has no {source!r}; it has {there_is}, and each of them with a seed, as in lab:posts/pairs@1."
        )
    name, seed = match[1], int(match[3] or 0)
    folder = root / f"{name}-{seed}-{_content_hash(ENVIRONMENTS[name])}" / part
    if part in ENVIRONMENTS[name].pairs_parts and not folder.exists():
        say(f"Drawing the pairs of {source}, once.")
    return _write_once(folder, lambda place: write_part(place, name, part, seed))


def environment_of(folder: Path) -> str | None:
    """The name of the environment that a folder is of, ``posts`` say, or ``None`` if it is not one of the lab's."""
    found = _read_marker(folder)
    return None if found is None else found[0]


def exact_evaluation_for(folder: Path) -> ExactEvaluation | None:
    """The exact values of a policy on a data folder, or ``None`` if its responses are too many, or it is no lab's."""
    found = _read_marker(folder)
    return None if found is None else ENVIRONMENTS[found[0]].exact_evaluation(found[1])


def write_part(folder: Path, name: str, part: str, seed: int) -> None:
    """Writes any part of an environment; pairs and demonstrations with a marker that counts what was left out.

    Args:
        folder: an existing folder.
        name: of the environment.
        part: of it.
        seed: pairs and demonstrations are a function of it.
    """
    environment = ENVIRONMENTS[name]
    if part == "reference":
        shutil.copytree(environment.reference, folder, dirs_exist_ok=True)
        return
    if part == "init":  # architecture and tokenizer without weights
        config = environment.build_config()
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        environment.build_tokenizer().save_pretrained(folder)
        return
    rows: Iterable[Mapping[str, Any]]
    marker: dict[str, Any] = {"design": name, "format": environment.format, "seed": seed}
    for split in environment.num_demonstrations if part == "sft" else environment.num_pairs:
        if part == "sft":
            rows = environment.sample_demonstrations(split, seed)
        else:
            with _one_thread():
                rows, counts = environment.sample_pairs(part, split, seed)
            marker.setdefault("counts", {})[split] = counts
        with (folder / f"{split}.jsonl").open("w") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / MARKER).write_text(json.dumps({**marker, "part": part}, indent=2) + "\n")


def _parts(name: str) -> list[str]:
    return [*ENVIRONMENTS[name].pairs_parts, "sft", "reference", "init"]


def _read_marker(folder: Path) -> tuple[str, str] | None:
    """The names of the environment and of the part that a folder holds."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(marker, dict) or marker.get("design") not in ENVIRONMENTS:
        return None
    return marker["design"], str(marker.get("part"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny matrices are quicker on one thread, and their sums do not depend on how many cores there are."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _content_hash(environment: Environment) -> str:
    digest = sha256(f"format {environment.format}".encode())
    for file in sorted(environment.reference.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Writes a folder under another name and renames it, so that nobody ever sees half of it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            work = Path(temporary) / folder.name
            work.mkdir()
            write(work)
            try:
                work.rename(folder)
            except OSError:  # another process, a rank of the same run say, was faster; it wrote the same
                if not folder.exists():
                    raise
    return folder
