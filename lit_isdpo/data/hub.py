"""Data sets of the hub: the text files of one as files, and others as tables of ``datasets``.

``datasets`` would guess the types of the columns of JSON and CSV files, on the hub as elsewhere. It is asked which
files make up which split. The files are then downloaded, and read as local ones are.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from lit_isdpo.data.files import READERS, cache_file, quiet, suffixes
from lit_isdpo.types import InputError

_FILE = re.compile(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)")
# Options of the readers of `datasets` in a data set's card, and the values that leave a file what its suffix says.
_PLAIN = {"sep": (",", None), "delimiter": (",", None), "names": (None,), "column_names": (None,), "field": (None,)}


def open_hub(
    path: str, name: str | None, revision: str | None, option: str
) -> tuple[dict[str, list[Path]], Mapping[str, Any]]:
    """Finds a data set and loads all of its splits.

    Args:
        path: ``owner/name``.
        name: configuration.
        revision: branch, tag or commit.
        option: what it was written for, for messages.

    Returns:
        The files of each split, if they are text; else no files, and a table of each split.

    Raises:
        InputError: there is no such data set, the hub cannot be asked, or the data set cannot be loaded.
    """
    nothing = f"{option}: no such file, folder, glob or hub data set: {path!r}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) or suffixes(Path(path))[0] in READERS:
        raise InputError(nothing)
    is_offline = False
    try:
        HfApi().dataset_info(path, revision=revision, timeout=20)
    except OfflineModeIsEnabled:
        is_offline = True  # `datasets` looks into its cache
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"{nothing} (or it is not open to you)") from error
    except Exception as error:  # the kind of a network's failure depends on the HTTP library
        # Asked here, because `datasets` would try for half a minute to tell a mistyped path from a lost network.
        raise InputError(
            f"{nothing} on this machine, and the hub cannot be asked; HF_HUB_OFFLINE=1 uses what it loaded before"
        ) from error
    try:
        with quiet():
            listed = _text_files(path, name, revision, is_offline)
            files = {
                split: [Path(hf_hub_download(repo, file, repo_type="dataset", revision=at)) for repo, at, file in some]
                for split, some in listed.items()
            }
            return files, {} if files else datasets.load_dataset(path, name, revision=revision)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{option}: cannot load {path!r} from the hub: {reason}") from error


def _text_files(
    path: str, name: str | None, revision: str | None, is_offline: bool
) -> dict[str, list[tuple[str, str, str]]]:
    """The files of each split as (data set, commit, file); none if they are not all plain JSON or CSV.

    What was found is noted, so that it is known without the hub.
    """
    key = hashlib.blake2b(json.dumps([path, name, revision]).encode(), digest_size=16).hexdigest()
    note = cache_file(f"hub-{key}").with_suffix(".json")
    if is_offline:
        return dict(json.loads(note.read_text())) if note.is_file() else {}
    config = datasets.load_dataset_builder(path, name, revision=revision).config
    is_plain = all(getattr(config, key, None) in plain for key, plain in _PLAIN.items())
    found: dict[str, list[tuple[str, str, str]]] = {}
    for split, files in (config.data_files or {}).items() if is_plain else ():
        matches = [match for match in (_FILE.fullmatch(str(file)) for file in files) if match is not None]
        found[str(split)] = [(match[1], match[2], match[3]) for match in matches if _is_text(match[3])]
        if len(found[str(split)]) < len(files):
            found = {}
            break
    note.write_text(json.dumps(found))
    return found


def _is_text(file: str) -> bool:
    return READERS.get(suffixes(Path(file))[0]) in ("json", "csv")
