"""The sources of rows: local files, folders, globs and hub data sets, and their splits.

A path that exists is read from disk; ``owner/name`` is otherwise a data set on the hub. The names of files tell their
split: in a folder, ``train.jsonl`` and ``val-00000-of-00002.parquet`` are the splits ``train`` and ``validation``; a
file that is not named after a split is ``train`` too. In Python a source may also be rows in memory.
"""

import glob
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from lit_isdpo.data.file_readers import READERS, is_one_object, missing_shards, quiet, read_files, reader_of, suffixes
from lit_isdpo.data.raw_rows import RawRows, cache_file, rows_in_memory
from lit_isdpo.names import named_path
from lit_isdpo.types import InputError, first_line

if TYPE_CHECKING:
    import pandas as pd

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_OTHERS = "other files"  # the split of files without such a word, beside several splits for training
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)")
# Options in a data set's card for the readers of `datasets`, and the values that do not change how a file is read.
_PLAIN = {"sep": (",", None), "delimiter": (",", None), "names": (None,), "column_names": (None,), "field": (None,)}


@dataclass
class DataSource:
    """A data set, or one part of a mixture.

    Attributes:
        path: file, folder, glob (quoted on the command line) or hub id.
        split: which split; by default the one that the use calls for, or the only one there is.
        weight: how many times one epoch of training passes over it.
        revision: branch, tag or commit of a hub data set.
        name: configuration of a hub data set.
        first: how many rows of a split are read, from its beginning; by default all.
        columns: this source's names of columns, over those of ``data.columns``.
        rows: rows in memory, in Python, in place of a path.
    """

    path: str
    split: str | None = None
    weight: float = 1.0
    revision: str | None = None
    name: str | None = None
    first: int | None = None
    columns: dict[str, str | None] | None = None
    rows: Any = None

    def plain(self) -> dict[str, Any]:
        """The source in plain types, without rows in memory."""
        return {name: getattr(self, name) for name in _OPTIONS}


_OPTIONS = [option.name for option in fields(DataSource) if option.name != "rows"]
Sources = str | dict[str, Any] | list[str | dict[str, Any]]
if TYPE_CHECKING:  # Python may also give these, which the command line cannot write
    Given = Sources | datasets.Dataset | datasets.DatasetDict | pd.DataFrame | Sequence[Mapping[str, Any]] | Path
else:
    Given = Sources


def as_sources(value: Any, option: str) -> list[DataSource]:
    """Puts all values that ``data.train`` may have into one form.

    Args:
        value: path, source, or a list of either; a mapping stands for a source. Or rows in memory.
        option: the option's name, for messages.

    Raises:
        InputError: a path or a weight that cannot be.

    >>> [source.weight for source in as_sources(["a.jsonl", {"path": "b.jsonl", "weight": 2}], "data.train")]
    [1.0, 2.0]
    """
    if value is None:
        return []
    if isinstance(value, list | tuple) and value and all(map(_is_row, value)):
        value = [DataSource(f"{len(value):,} rows in memory", rows=list(value))]
    sources = []
    for item in value if isinstance(value, list | tuple) else [value]:
        try:
            source = _as_source(item)
        except TypeError as error:
            raise InputError(f"{option}: {item!r} is neither a path nor {{path, split, weight}}: {error}") from error
        if not source.path:
            raise InputError(f"{option}: an empty path")
        if not 0 < source.weight < math.inf:
            raise InputError(f"{option}: the weight of {source.path!r} is {source.weight}; it must be above 0")
        if source.first is not None and source.first < 1:
            raise InputError(f"{option}: first is {source.first} for {source.path!r}; it must be at least 1 row")
        source.weight = float(source.weight)
        sources.append(source)
    if not sources:
        raise InputError(f"{option}: an empty list")
    return sources


def _is_row(item: object) -> bool:
    """Whether it is a row and no source: it has keys that no source has, and more than one that may be misspelt."""
    return isinstance(item, Mapping) and len(set(item) - {*_OPTIONS, "rows"}) > ("path" in item)


def _as_source(item: Any) -> DataSource:
    if isinstance(item, DataSource):
        return item
    if isinstance(item, str | Path):
        return DataSource(str(item))
    if isinstance(item, Mapping) and not isinstance(item, datasets.DatasetDict):
        path = item.get("path")
        if path is None or isinstance(path, str | Path):
            return DataSource(**{**item, **({} if path is None else {"path": str(path)})})
        return DataSource(**{**item, "path": _in_memory(path).path, "rows": path})
    return _in_memory(item)


def _in_memory(rows: Any) -> DataSource:
    number = "" if isinstance(rows, datasets.DatasetDict) else f"{len(rows):,} rows of "
    return DataSource(f"{number}a {type(rows).__name__} in memory", rows=rows)


@dataclass
class OpenSource:
    """A source that was found, and the splits that it has."""

    source: DataSource
    option: str
    files: dict[str, list[Path]] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for sources that are one data set, whatever their splits and weights."""
        return (self.source.path, self.source.name, self.source.revision, id(self.source.rows))

    @property
    def splits(self) -> list[str]:
        """The names of the splits there are."""
        return list(self.files) + list(self.tables)

    def find(self, split: str) -> str | None:
        """The name under which the source has a split, if it does: ``dev`` and ``val`` are ``validation`` too."""
        if split in self.splits:
            return split
        wanted = _SPLIT_WORDS.get(split, split)
        return next((name for name in self.splits if _SPLIT_WORDS.get(name, name) == wanted), None)

    def choose(self, default: str) -> str:
        """The split to read: the one that was named, else ``default``, else the only one.

        Raises:
            InputError: there is no such split.
        """
        found = self.find(self.source.split or default)
        if found is None and self.source.split is None and len(self.splits) == 1:
            return self.splits[0]
        if found is None:
            raise InputError(
                f"{self.option}: {self.source.path!r} has no split {self.source.split or default!r}; "
                f"name one of: {', '.join(self.splits)}"
            )
        return found

    def read(self, split: str, columns: Mapping[str, str | None] | None = None) -> RawRows:
        """Reads a split; ``columns`` has the user's names of columns -> names in the data, and the source's come first.

        Raises:
            InputError: a file cannot be read, or there are no rows.
        """
        if split in self.tables:
            rows = rows_in_memory(self.tables[split], self.option)
        else:
            rows = read_files(self.files[split], self.option, self.source.first)
        if not len(rows):
            raise InputError(f"{self.option}: {self.source.path!r} is an empty data set")
        rows.renamed = {**(columns or {}), **(self.source.columns or {})}
        return rows if self.source.first is None else rows.first(self.source.first)


def open_source(source: DataSource, option: str) -> OpenSource:
    """Finds a source and its splits; local files are not read yet. Messages name its option (``data.train``).

    Raises:
        InputError: there is nothing of that name, or nothing that can be read.
    """
    files: list[Path] = []
    if source.rows is None:
        try:
            files, folder = _find(Path(named_path(source.path, "pairs")).expanduser(), source.path, option)
        except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, ~nobody
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{option}: {source.path!r} cannot be looked up: {reason}") from error
        if not files:
            named, tables = _open_hub(source.path, source.name, source.revision, option)
            return OpenSource(source, option, files=named, tables=tables)
    if source.name or source.revision:
        kind = "a local path" if files else "none"
        raise InputError(f"{option}: name and revision are for hub data sets; {source.path!r} is {kind}")
    if source.rows is not None:
        tables = source.rows if isinstance(source.rows, datasets.DatasetDict) else {"train": source.rows}
        return OpenSource(source, option, tables=tables)
    for file in files:
        reader_of(file, option)
    return OpenSource(source, option, files=_by_split(files, folder))


def _open_hub(
    path: str, name: str | None, revision: str | None, option: str
) -> tuple[dict[str, list[Path]], Mapping[str, Any]]:
    """Downloads a data set of the hub: the files of each split if they are text, else a table of each split.

    ``datasets`` would guess the types of the columns of JSON and CSV files. It only says which files are which split.

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
        raise InputError(f"{option}: cannot load {path!r} from the hub: {first_line(error)}") from error


def _text_files(path: str, name: str | None, revision: str | None, is_offline: bool) -> dict[str, list[Any]]:
    """The files of each split as (data set, commit, file), kept for runs without the hub; none if not all are text."""
    key = hashlib.blake2b(json.dumps([path, name, revision]).encode(), digest_size=16).hexdigest()
    note = cache_file(f"hub-{key}").with_suffix(".json")
    if is_offline:
        return dict(json.loads(note.read_text())) if note.is_file() else {}
    config = datasets.load_dataset_builder(path, name, revision=revision).config
    split_files = (config.data_files or {}).items()
    found = {str(split): [_HUB_FILE.fullmatch(str(file)) for file in files] for split, files in split_files}
    is_plain = all(getattr(config, option, None) in plain for option, plain in _PLAIN.items())
    files = [match and Path(match[3]) for matches in found.values() for match in matches]
    if not is_plain or not all(file and READERS.get(suffixes(file)[0]) in ("json", "csv") for file in files):
        found = {}
    listed = {split: [match.groups() for match in matches if match] for split, matches in found.items()}
    note.write_text(json.dumps(listed))
    return listed


def _find(path: Path, name: str, option: str) -> tuple[list[Path], Path]:
    """The local files of a source, and the folder that they are in; messages call it by its name."""
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        files, folder = [file for file in sorted(path.rglob("*")) if _is_data(file, path)], path
        for file in files:
            if not file.is_file():
                raise InputError(f"{option}: {str(file)!r} is no file that can be read, or a link to none")
        if not files:
            raise InputError(f"{option}: no data files ({', '.join(READERS)}) in the folder {name!r}")
    else:
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute pattern
        # A link to a folder above would give each file many times.
        files = list({file.parent.resolve() / file.name: file for file in matches if file.is_file()}.values())
        folder = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    if missing := missing_shards(files):
        parent = missing[0].parent
        names = [file.name for file in missing if file.parent == parent]
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(
            f"{option}: {str(parent)!r} lacks {some}; to read a part of the data, name its files in a list"
        )
    return files, folder


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    left_behind = file.name.startswith(("cache-", "tmp")) and file.suffix == ".arrow"  # by `datasets`
    named_so = not hidden and not left_behind and file.name not in _NOT_DATA and suffixes(file)[0] in READERS
    return named_so and not file.is_dir()


def _by_split(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Sorts files into splits by the words of their names, ``my-train_0.jsonl``, or their folders, ``train/0.jsonl``.

    If several names stand for one split (``train_sft``, ``train_prefs``), each is a split by its own name, so that they
    are not mixed by accident. Files without such a word are read with the training files, except a JSON file that is
    one object.
    """
    named: dict[str, dict[str, list[Path]]] = {}
    others = []
    for file in files:
        stem = file.name[: -len("".join(suffixes(file)))]  # it may have more dots: v1.0-test.jsonl, pairs.test.jsonl
        name = re.sub(r"([-_.]?\d+)+(-of-\d+)?$", "", stem)
        parents = file.relative_to(folder).parts[:-1] if file.is_relative_to(folder) else ()
        for part in (name, *parents):
            words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLIT_WORDS]
            if words:
                named.setdefault(_SPLIT_WORDS[words[0]], {}).setdefault(part, []).append(file)
                break
        else:
            others.append(file)
    # A folder may hold a file about its rows; if there is nothing else, it is read.
    others = [file for file in others if not is_one_object(file)] or ([] if named else others)
    splits: dict[str, list[Path]] = {}
    for split, groups in named.items():
        splits |= {split: next(iter(groups.values()))} if len(groups) == 1 else groups
    if others:
        name = "train" if "train" in splits or "train" not in named else _OTHERS
        splits[name] = sorted([*splits.get(name, []), *others])
    return splits
