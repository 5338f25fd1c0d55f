"""What is kept on disk, whole or not at all, under names that equal content has on every machine and in every run.

    FOLDER/KEY/
        about.json                      what KEY is a hash of: weights, prompts, sampling
        shards/COLUMNS/00003.parquet    "responses", or one score of them ("kl", "reward-1a2b..."), shard by shard
        responses.parquet               all columns side by side, to be read by others

A shard is a batch of responses. One rank samples or scores it, and writes it whole. An interrupted evaluation goes on
at the shards that are missing or cannot be read, on any number of ranks. A new reward is a new folder of columns.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import InitVar, dataclass
from hashlib import blake2b
from os import getpid
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lit_isdpo.policy.logprob_model import LogProbModel, full_tensor
from lit_isdpo.policy.reward_model import ScoreModel
from lit_isdpo.types import InputError, ProbePrompt, Ranks, Response

DIGEST = b"lit_isdpo:digest"  # of a table's metadata
RESPONSES = "responses"
Columns = dict[str, list[Any]]
# Of a configuration file: where the model came from, and how it is loaded and initialised.
_NO_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_NO_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the system in here (a full disk, a folder that is read only) name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name first, so that nobody ever sees half of it; makes its folder.

    Args:
        path: of the file.
        write: writes it to the path that it gets.

    Raises:
        OSError: it cannot be written; the former file is still there.
    """
    temporary = path.with_name(f".{path.name}.{getpid()}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # it may be what fills the disk
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a text as ``write_whole`` does."""
    write_whole(path, lambda file: file.write_text(text))


def write_table(path: Path, table: pa.Table) -> None:
    """Writes Parquet as ``write_whole`` does, with a digest of its values: Parquet's checksums leave headers out."""
    marked = table.replace_schema_metadata({DIGEST: _table_digest(table)})
    write_whole(path, lambda file: pq.write_table(marked, file))


def read_table(path: Path) -> pa.Table | None:
    """The table; ``None`` where it is missing, torn, or not what was written."""
    try:
        table = pq.read_table(path)
        is_whole = (table.schema.metadata or {}).get(DIGEST) == _table_digest(table)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # a flipped bit is met by whatever parses it
        return None
    return table if is_whole else None


def _table_digest(table: pa.Table) -> bytes:
    return blake2b(repr(table.to_pydict()).encode(), digest_size=16).hexdigest().encode()


def digest(content: Any) -> str:
    """16 hexadecimal digits of anything that JSON can hold.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, default=_plain)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def weights_fingerprint(model: LogProbModel | ScoreModel, *, with_adapter: bool = True) -> str:
    """Names a model as it computes: every value of its weights, its architecture, and the dtype that it computes in.

    A base whose adapter is switched off has the name of the same model without an adapter.

    Args:
        model: the model.
        with_adapter: false names only the base.
    """
    config = model.model.config.to_diff_dict()
    about: dict[str, Any] = {
        "config": {key: value for key, value in config.items() if key not in _NO_ARCHITECTURE},
        "compute_dtype": str(model.compute_dtype),
    }
    if model.adapter is not None and with_adapter:
        adapter = model.adapter.config.to_dict()
        about["adapter"] = {key: value for key, value in adapter.items() if key not in _NO_ADAPTER}
    value = blake2b(digest(about).encode(), digest_size=8)
    for name, tensor in sorted(_tensors(model, with_adapter=with_adapter)):
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        value.update(full_tensor(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return value.hexdigest()


def _tensors(model: LogProbModel | ScoreModel, *, with_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's tensors, or only its base's, which then have the names of a model without PEFT's layers."""
    for name, tensor in model.model.state_dict().items():
        if model.adapter is None or with_adapter:
            yield name, tensor
        elif name not in model.adapter.names:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


class Answers:
    """A judge's raw answers in a file of JSON lines, by the digest of the request. Several processes may append to it.

    Answers are kept as they came, and every run parses them anew. Lines that cannot be read are passed over, because a
    run that was killed may leave half of one behind.

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
                    with suppress(ValueError, LookupError, TypeError):  # half a line, or none of ours
                        row = json.loads(line)
                        self._answers.setdefault(str(row["key"]), []).append(str(row["answer"]))
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


@dataclass
class ResponseSet:
    """n responses to each of P prompts, all of one origin, with columns of values.

    Args:
        root: the folder of all sets; ``None`` keeps everything in memory.
        about: the responses are a function of it; its hash is the set's name.
        prompts: P of them. They are sharded by length, so that little of a batch is padding.
        num_responses: n.
        shard_size: responses per shard, rounded down to whole prompts.
        ranks: who shares the work.
        show: wraps the shards that are about to be computed, with a word for the work, to show progress.
    """

    root: Path | None
    about: InitVar[Mapping[str, Any]]
    prompts: Sequence[ProbePrompt]
    num_responses: int
    shard_size: int
    ranks: Ranks = Ranks()  # noqa: RUF009 - immutable
    show: Callable[[Iterable[int], str], Iterable[int]] = lambda shards, _: shards

    def __post_init__(self, about: Mapping[str, Any]) -> None:
        about = {**about, "shard_size": self.shard_size, "format": 2}
        self.key = digest(about)
        self.folder = None if self.root is None else self.root / self.key
        order = sorted(range(len(self.prompts)), key=lambda row: len(self.prompts[row].prompt_ids))
        per_shard = max(1, self.shard_size // self.num_responses)
        self.shards = [order[start : start + per_shard] for start in range(0, len(order), per_shard)]
        self._parts: dict[str, list[Columns]] = {}
        if self.folder is not None and self.ranks.rank == 0:
            write_text(self.folder / "about.json", json.dumps(about, indent=2) + "\n")

    @property
    def file(self) -> Path | None:
        """Where :meth:`save` writes everything side by side."""
        return None if self.folder is None else self.folder / "responses.parquet"

    def fill(self, name: str, compute: Callable[[int], Columns], doing: str) -> None:
        """Reads columns from their files, or computes and writes them: each rank its own shards.

        Args:
            name: of the columns.
            compute: columns of the shard of that number, one row for each of its responses.
            doing: a word for the work, in the progress.

        Raises:
            InputError: one of ``compute``, on all ranks alike.
        """

        def own_shards() -> dict[int, Columns]:
            own = range(self.ranks.rank, len(self.shards), self.ranks.size)
            parts = {shard: self._read(name, shard) for shard in own}
            missing = [shard for shard, part in parts.items() if part is None]
            for shard in self.show(missing, doing) if missing else ():
                parts[shard] = self._write(name, shard, compute(shard))
            return {shard: part for shard, part in parts.items() if part is not None}

        parts = {shard: part for own in self.ranks.on_all(own_shards) for shard, part in own.items()}
        self._parts[name] = [parts[shard] for shard in range(len(self.shards))]

    def fill_at_once(
        self, name: str, compute: Callable[[], Columns], settled: Callable[[Columns], bool] = lambda _: True
    ) -> None:
        """Like :meth:`fill`, by rank 0 for all shards, where the work cannot be divided.

        Args:
            name: of the columns.
            compute: columns of all responses, prompt by prompt in the caller's order.
            settled: whether a shard that was read need not be computed again.
        """

        def first_rank() -> list[Columns] | None:
            if self.ranks.rank:
                return None
            known = self._read_all(name)
            if known is not None and all(map(settled, known)):
                return known
            columns, n = compute(), self.num_responses
            places = [[row * n + number for row in rows for number in range(n)] for rows in self.shards]
            parts = [{title: [column[i] for i in some] for title, column in columns.items()} for some in places]
            return [self._write(name, shard, part) for shard, part in enumerate(parts)]

        self._parts[name] = self.ranks.on_all(first_rank)[0]

    def responses(self, shard: int) -> list[Response]:
        """The responses of a shard, n for each of its prompts."""
        part = self._parts[RESPONSES][shard]
        return [Response(*pair) for pair in zip(part["token_ids"], part["finished"], strict=True)]

    def texts(self, shard: int) -> list[str]:
        """The same as text."""
        return self._parts[RESPONSES][shard]["response"]

    def asked(self, shard: int) -> list[ProbePrompt]:
        """The prompt of each response of a shard."""
        return [self.prompts[row] for row in self.shards[shard] for _ in range(self.num_responses)]

    def values(self, name: str, column: str) -> list[list[Any]]:
        """A column as P lists of n values, in the caller's order."""
        found: list[list[Any]] = [[] for _ in self.prompts]
        for rows, part in zip(self.shards, self._parts[name], strict=True):
            for place, row in enumerate(rows):
                start = place * self.num_responses
                found[row] = part[column][start : start + self.num_responses]
        return found

    def tensor(self, name: str, column: str) -> Tensor:
        """A column of numbers, ``(P, n)`` float64."""
        return torch.tensor(self.values(name, column), dtype=torch.float64)

    def save(self) -> None:
        """Writes all columns that there are, of earlier evaluations too, into one file, prompts in their order."""
        if self.folder is None or self.file is None or self.ranks.rank:
            return
        names = sorted(folder.name for folder in (self.folder / "shards").iterdir())
        for name in names:  # those of other evaluations; one that was interrupted is left out
            if name not in self._parts and (parts := self._read_all(name)) is not None:
                self._parts[name] = parts
        numbers = range(self.num_responses)
        columns: Columns = {
            "row_id": [prompt.row_id for prompt in self.prompts for _ in numbers],
            "number": [number for _ in self.prompts for number in numbers],
            "prompt": [prompt.text for prompt in self.prompts for _ in numbers],
        }
        for name in sorted(self._parts, key=lambda name: (name != RESPONSES, name)):
            for title in self._parts[name][0] if self.shards else ():
                columns[title] = [value for values in self.values(name, title) for value in values]
        write_table(self.file, pa.table(columns))

    def _read(self, name: str, shard: int) -> Columns | None:
        """A shard's columns; ``None`` where they are not there, or are not what was written."""
        table = None if self.folder is None else read_table(self.folder / _shard_file(name, shard))
        if table is None or len(table) != len(self.shards[shard]) * self.num_responses:
            return None
        columns: Columns = table.to_pydict()
        return columns

    def _read_all(self, name: str) -> list[Columns] | None:
        """All shards' columns; ``None`` where one is missing."""
        parts = [part for shard in range(len(self.shards)) if (part := self._read(name, shard)) is not None]
        return parts if len(parts) == len(self.shards) else None

    def _write(self, name: str, shard: int, columns: Columns) -> Columns:
        if self.folder is not None:
            write_table(self.folder / _shard_file(name, shard), pa.table(columns))
        return columns


def _shard_file(name: str, shard: int) -> str:
    return f"shards/{name}/{shard:05}.parquet"
