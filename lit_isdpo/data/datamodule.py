"""Rows of named data sets to batches: reading, tokenizing once, splitting, and handing out batches in a resumable order.

    sources -> rows -> formats -> tokenization -> a memory-mapped table -> TrainingOrder -> collation -> batches

Both data modules differ only in what a row becomes: a pair or a demonstration.
"""

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lit_isdpo.data.collation import collate_examples, collate_pairs
from lit_isdpo.data.formats import Kind, RowError, check_format, detect_format, to_example, to_pair
from lit_isdpo.data.sampling import EvaluationOrder, TrainingLoader, TrainingOrder
from lit_isdpo.data.sources import OpenSource, Sources, as_sources, open_source
from lit_isdpo.data.tokenization import (
    ChatTemplate,
    TruncationMode,
    load_tokenizer,
    pad_token_id,
    tokenize_example,
    tokenize_pair,
)
from lit_isdpo.types import InputError, TokenizedExample, TokenizedPair

# Part of the key of the token cache: to be raised with every change of formats.py or tokenization.py that changes ids.
TOKENS_VERSION = 1


class SourceCounts(NamedTuple):
    """What became of the rows of one source. ``read`` = ``kept`` + ``held_out`` + the dropped ones."""

    source: str
    format: str
    read: int
    kept: int
    held_out: int
    dropped: dict[str, int]


class ProbePrompt(NamedTuple):
    """A prompt to sample responses to, and the data's own response.

    Attributes:
        prompt_ids: token ids.
        text: the prompt without special tokens.
        response: the chosen response (or the demonstration), as it was tokenized, without special tokens.
        row_id: the row that it was taken from.
    """

    prompt_ids: list[int]
    text: str
    response: str
    row_id: int


class Rows(Dataset[tuple[int, Any]]):
    """The rows of one split: positions in a tokenized table. A row's id is its place in the sources as they were read.

    Args:
        table: the tokenized rows of all sources, dropped ones included.
        positions: ``(N,)`` int64, the rows of this split.
        item: the type that a row is handed out as.
    """

    def __init__(self, table: Any, positions: Tensor, item: type[TokenizedPair] | type[TokenizedExample]) -> None:
        self.table, self.positions, self.item = table, positions, item

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """One read for a whole batch. An index of -1 fills up: the first row, under the id -1."""
        positions = [int(self.positions[max(index, 0)]) for index in indices]
        columns = self.table[positions]
        items = [self.item(*values) for values in zip(*(columns[name] for name in self.item._fields), strict=True)]
        ids = [-1 if index < 0 else position for index, position in zip(indices, positions, strict=True)]
        return list(zip(ids, items, strict=True))


class _TokenizedDataModule(LightningDataModule):
    """Reads rows, tokenizes them once, and serves them in batches.

    Args:
        train: training rows: a file, folder, glob or hub id, a source ``{path, split, weight, revision, name}``, or a list
            of either as a mixture.
        val: validation rows. Default: the validation split of ``train``, else a held-out part of its rows.
        test: test rows. Default: the test split of ``train``.
        format: the rows' format: strings, messages, transcripts, or auto to recognise it by the columns.
        tokenizer: folder or hub id of a tokenizer. Default: the model's own.
        batch_size: rows of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: rows of a forward on one rank; how often gradients are accumulated follows from it. Default: no
            accumulation.
        max_length: longest prompt with its response, in tokens; longer responses are cut, and get no EOS.
        max_prompt_length: longest prompt, in tokens. Default: half of ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept.
        chat_template: use the tokenizer's chat template for conversations where it has one (auto), for string prompts
            too (always), or write plain transcripts (never).
        val_size: how much of the training rows is held out where there are no validation rows: a fraction, or a number
            of rows. Rows with the same prompt stay together, so that it can be somewhat more.
        seed: of the order of the training rows and of the held-out part.
        num_workers: processes that collate batches in the background.
        eval_batch_size: rows of a forward on one rank in evaluations. Default: ``micro_batch_size``.
        num_proc: processes that tokenize.
    """

    kind: ClassVar[Kind]
    item: ClassVar[type[TokenizedPair] | type[TokenizedExample]]
    features: ClassVar[dict[str, Any]]

    def __init__(
        self,
        train: Sources,
        val: Sources | None = None,
        test: Sources | None = None,
        format: str = "auto",
        tokenizer: str | None = None,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation_mode: TruncationMode = "keep_end",
        chat_template: ChatTemplate = "auto",
        val_size: float | int = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        given = {"train": train, "val": val, "test": test}
        self.sources = {split: as_sources(value, f"data.{split}") for split, value in given.items()}
        self.format = format
        self.tokenizer_path = tokenizer
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.max_length = max_length
        self.max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        self.truncation_mode = truncation_mode
        self.chat_template = chat_template
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self.eval_batch_size = eval_batch_size
        self.num_proc = num_proc
        self._check_arguments()
        # Plain types only: a sharded checkpoint is loaded with weights_only=True.
        plain = {split: [asdict(source) for source in self.sources[split]] or None for split in given}
        options = dict(format=format, tokenizer=tokenizer, batch_size=batch_size, micro_batch_size=micro_batch_size)
        self.save_hyperparameters({**plain, **options, "max_length": max_length, "seed": seed}, logger=False)

        self.counts: dict[str, list[SourceCounts]] = {}
        self._rows: dict[str, Rows] = {}
        self._order: TrainingOrder | None = None
