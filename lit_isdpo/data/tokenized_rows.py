"""Tokenizes rows once, into a memory-mapped table that the next start finds again.

The table keeps a line for every row that was read, also for one that is dropped; if a row holds several responses,
a line for each pair that is made of it. A row's or pair's id is its line, and ``row`` is its place in the data. For the
rows of ``strings`` in formats.py and one with an empty response:

    prompt_ids        chosen_ids  rejected_ids  weight  margin  changes  dropped         prompt_key            row
    [1, 17, 10, 17]   [19, 2]     [20, 2]       1.0     0.0     []       None            -8054872367124087219  0
    []                []          []            None    None    []       empty response  0                     1

Besides ``prompt_key``, a hash of the prompt's ids, there is ``row_key``, one of all of a pair's ids.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_isdpo.data.collation import collate_examples, collate_pairs
from lit_isdpo.data.examples import (
    OF_ANY_FORMAT,
    check_format,
    check_pairing,
    detect_format,
    required_columns,
    to_examples,
    to_pairs,
)
from lit_isdpo.data.file_readers import quiet
from lit_isdpo.data.formats import Kind
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.raw_rows import RawRows, cache_file
from lit_isdpo.data.row_fields import Row
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_example, tokenize_pair
from lit_isdpo.types import InputError, TokenizedExample, TokenizedPair

# Part of the cache's key: raise it with every change to how rows are read, paired or tokenized that changes the table.
_TOKENS_VERSION = 6
_OTHERS = ("dropped", "prompt_key", "row_key", "row")  # columns besides those of an item
_ROWS_PER_PROCESS = 25_000  # fewer are tokenized before another process has begun
_SHOW_PROGRESS_FROM = 20_000  # rows; a bar that is gone within seconds only clutters the terminal


class RowType(NamedTuple):
    """The way of a row to a batch: it is read as examples, and each is tokenized to an item."""

    kind: Kind
    read: Callable[..., Any]
    tokenize: Callable[..., Any]
    item: type[TokenizedPair] | type[TokenizedExample]
    collate: Callable[..., Any]


PAIRS = RowType("pairs", to_pairs, tokenize_pair, TokenizedPair, collate_pairs)
DEMONSTRATIONS = RowType("demonstrations", to_examples, tokenize_example, TokenizedExample, collate_examples)


class Rows(Dataset[tuple[int, Any]]):
    """The rows of one split, handed out as ``(row id, item)``.

    Args:
        table: the tokenized rows of all sources, one after another, dropped ones included.
        positions: ``(N,)`` int64, this split's lines of the table; a line's position is its row id.
        row_type: whether they are pairs or demonstrations.
    """

    def __init__(self, table: Any, positions: Tensor, row_type: RowType) -> None:
        self.table, self.positions, self.row_type = table, positions, row_type

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """One read for a whole batch. The index -1 fills up: it gives the first row under the id -1."""
        positions = [int(self.positions[max(index, 0)]) for index in indices]
        columns = self.table[positions]
        item = self.row_type.item
        values = zip(*(columns[name] for name in item._fields), strict=True)
        ids = [position if index >= 0 else -1 for index, position in zip(indices, positions, strict=True)]
        return list(zip(ids, map(item._make, values), strict=True))

    def numbers(self, column: str) -> Tensor:
        """``(N,)`` values of a column of numbers."""
        return torch.tensor(self.table.data.column(column).to_numpy())[self.positions]

    def prompt_keys(self) -> Tensor:
        """``(N,)`` int64; rows have the same key when they have the same prompt tokens."""
        return self.numbers("prompt_key")

    def keys(self) -> Tensor:
        """``(N,)`` int64; rows have the same key when all of their tokens are the same, prompt and responses."""
        return self.numbers("row_key")

    def repeated(self) -> Tensor:
        """``(N,)`` bool, true at rows whose tokens are all those of an earlier row."""
        repeated = torch.ones(len(self), dtype=torch.bool)
        repeated[torch.from_numpy(np.unique(self.keys().numpy(), return_index=True)[1])] = False
        return repeated

    def lengths(self) -> Tensor:
        """``(N,)`` int64, tokens of each row: the prompt's, once, and the responses'."""
        return torch.stack(list(self.num_tokens().values())).sum(0)

    def num_tokens(self) -> dict[str, Tensor]:
        """``(N,)`` int64 tokens of each part of the rows: prompt, chosen and rejected, or prompt and completion."""
        counts = {}
        for name in self.row_type.item._fields:
            if name.endswith("_ids"):
                lengths = pc.list_value_length(self.table.data.column(name)).to_numpy().astype("int64")
                counts[name.removesuffix("_ids")] = torch.from_numpy(lengths)[self.positions]
        return counts


class TokenizedSource(NamedTuple):
    """The rows of one source.

    Attributes:
        table: a ``datasets.Dataset`` with a line for every row or pair, as shown at the head of this file.
        format: the format that the rows were read in.
        rows: the rows that were read.
    """

    table: Any
    format: str
    rows: RawRows

    def kept(self) -> Tensor:
        """``(N,)`` int64, the positions of the lines that are not dropped."""
        return torch.from_numpy(pc.is_null(self.table.data.column("dropped")).to_numpy().nonzero()[0])

    def dropped(self) -> list[str]:
        """The notes of the lines that are dropped."""
        notes: list[str] = self.table.data.column("dropped").drop_null().to_pylist()
        return notes

    def changes(self, lines: Tensor) -> list[str]:
        """The notes of ``(N,)`` lines that are not dropped."""
        notes: list[str] = pc.list_flatten(self.table.data.column("changes").take(lines.numpy())).to_pylist()
        return notes


@dataclass(frozen=True)
class Recipe:
    """How rows become items.

    Args:
        row_type: pairs or demonstrations.
        format: a key of ``formats.FORMATS``, or auto.
        encoder: writes the text of the rows.
        limits: the largest lengths.
        read_options: for pairs, those of ``to_pairs``.
    """

    row_type: RowType
    format: str
    encoder: TextEncoder
    limits: Limits
    read_options: Mapping[str, Any] = field(default_factory=dict)

    def fitted(self, rows: RawRows, name: str) -> "Recipe":
        """The recipe with the format of some rows.

        Raises:
            InputError: the format does not fit, or a column that was named is not there.
        """
        columns, kind, format = rows.column_names(), self.row_type.kind, self.format
        rows.check_renamed(name)
        if format == "auto":
            format = detect_format(columns, rows.start(), kind=kind, name=name)
        check_format(format, columns, kind=kind, name=name)
        check_pairing(self.read_options.get("pairing", "best_worst"), format, name=name)
        for option in ("weight_column", "margin_column"):
            column = self.read_options.get(option)
            if column is not None and not rows.has(column):
                raise InputError(f"{name}: data.{option}: no column {column!r}; it has {', '.join(columns)}")
        return replace(self, format=format)

    def key(self) -> list[Any]:
        """All that decides about the items of a row, in plain types."""
        encoder = self.encoder
        return [
            *(self.row_type.kind, self.format, sorted(self.read_options.items()), _tokenizer_key(encoder.tokenizer)),
            *(encoder.chat_template, sorted(encoder.template_options.items()), encoder.first_without_row),
            sorted(asdict(self.limits).items()),
        ]

    def lines(
        self, batch: Mapping[str, list[Any]], indices: Sequence[int], *, parse: Callable[[Mapping[str, Any]], Row]
    ) -> dict[str, list[Any]]:
        """The lines of the table that some rows become, column by column."""
        lines: list[dict[str, Any]] = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            row = parse(dict(zip(batch, values, strict=True)))
            try:
                examples = self.row_type.read(row, format=self.format, **self.read_options)
            except RowError as error:
                lines.append(self._dropped(error) | {"row": index})
            else:
                lines += [self._line(example) | {"row": index} for example in examples]
        return {column: [line[column] for line in lines] for column in (*self.row_type.item._fields, *_OTHERS)}

    def _line(self, example: Any) -> dict[str, Any]:
        try:
            item = self.row_type.tokenize(example, self.encoder, self.limits)
        except RowError as error:
            return self._dropped(error)
        ids = [getattr(item, name) for name in item._fields if name.endswith("_ids")]
        keys = {"prompt_key": _key(ids[0]), "row_key": _key([n for part in ids for n in (*part, -1)])}
        return {**item._asdict(), "dropped": None, **keys}

    def _dropped(self, error: RowError) -> dict[str, Any]:
        fields = self.row_type.item._fields
        blank: dict[str, Any] = {name: [] if name.endswith("_ids") or name == "changes" else None for name in fields}
        return {**blank, "dropped": str(error), "prompt_key": 0, "row_key": 0}


def tokenize_rows(rows: RawRows, recipe: Recipe, *, name: str, num_proc: int | None = None) -> TokenizedSource:
    """Tokenizes the rows of one source, or finds them tokenized by an earlier run.

    Args:
        rows: those of the source.
        recipe: how they become items.
        name: the source, for messages.
        num_proc: number of processes; by default one for every ``_ROWS_PER_PROCESS`` rows, up to one per core.

    Raises:
        InputError: the format or the chat template does not fit, a column that was named is not there, or all weights
            are 0.
    """
    recipe = recipe.fitted(rows, name)
    fields, kind = recipe.row_type.item._fields, recipe.row_type.kind
    key = json.dumps([_TOKENS_VERSION, rows.fingerprint, sorted(rows.renamed.items()), *recipe.key()])
    fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    ids, number, words = datasets.List(datasets.Value("int32")), datasets.Value("float64"), datasets.Value("string")
    features = {field: ids if field.endswith("_ids") else number for field in fields}
    features |= dict.fromkeys(_OTHERS, datasets.Value("int64")) | {"changes": datasets.List(words), "dropped": words}
    named = {*OF_ANY_FORMAT, *(column for column in recipe.read_options.values() if column)}
    table = rows.needed(named.union(required_columns(recipe.format, kind, rows.column_names())))
    num_proc = num_proc or min(os.cpu_count() or 1, len(rows) // _ROWS_PER_PROCESS)
    with quiet() if len(rows) < _SHOW_PROGRESS_FROM else nullcontext():
        table = table.map(
            partial(recipe.lines, parse=rows.parser()),
            batched=True,  # a row may become several lines; few rows, as Nectar's 21 pairs a row are many tokens
            batch_size=100,
            with_indices=True,
            remove_columns=table.column_names,
            features=datasets.Features(features),
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(cache_file(f"tokens-{fingerprint}")),
            new_fingerprint=fingerprint,
            desc="Tokenizing",
        )
    source = TokenizedSource(table, recipe.format, rows)
    weight_column = recipe.read_options.get("weight_column")
    if weight_column and pc.max(table.data.column("weight")).as_py() == 0:
        raise InputError(
            f"{name}: data.weight_column: all weights in {weight_column!r} are 0, so that there is nothing to learn"
        )
    return source


def _key(numbers: Sequence[int]) -> int:
    """64 bits that differ for other token ids."""
    digest = hashlib.blake2b(array("q", numbers).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = [str(tokenizer.special_tokens_map), tokenizer.split_special_tokens]
    return [type(tokenizer).__name__, model, *special, tokenizer.chat_template]
