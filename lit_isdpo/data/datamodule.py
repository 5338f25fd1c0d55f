"""The data modules: from named data sets to batches, in an order that a resumed run goes on with.

sources -> files -> rows -> formats -> tokenization -> a memory-mapped table -> splits -> order -> collation -> batches

A data module asks nobody about the model and the run: a module hands over what it must know (``read_for``).
"""

import warnings
from abc import ABC, abstractmethod
from functools import cached_property, partial
from typing import Any, get_args

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_isdpo.data import outcomes
from lit_isdpo.data.collation import Layout, Reader, stack_rows
from lit_isdpo.data.encoding import check_template_options, load_tokenizer, pad_token_id
from lit_isdpo.data.examples import Pairing, check_pairing
from lit_isdpo.data.formats import FORMATS
from lit_isdpo.data.outcomes import Split
from lit_isdpo.data.sampling import TrainingLoader, TrainingOrder, evaluation_order, split_batch, training_order
from lit_isdpo.data.sources import Given, OpenSource, as_sources
from lit_isdpo.data.splits import Duplicates, Splits
from lit_isdpo.data.tokenization import ChatTemplate, Limits, TextEncoder, TruncationMode
from lit_isdpo.data.tokenized_rows import DEMONSTRATIONS, PAIRS, Recipe, RowType, TokenizedSource, tokenize_rows
from lit_isdpo.types import InputError, ProbePrompt, check_choice, check_least

_LEAST = {
    0: ("length_window", "num_workers"),
    1: ("batch_size", "micro_batch_size", "eval_batch_size", "packing_length", "num_proc"),
    2: ("max_length",),
}
_CHOICES = {
    "truncation_mode": get_args(TruncationMode),
    "chat_template": get_args(ChatTemplate),
    "duplicates": get_args(Duplicates),
    "predict_split": (None, *get_args(Split)),
}
_STAGES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class TextDataModule(LightningDataModule, ABC):
    """Reads rows, tokenizes them once, and serves them in batches.

    Args:
        train: training rows: a file, folder, glob or hub id, a source ``{path, split, weight, revision, name, first,
            columns}``, or a list of either as a mixture. In Python also rows in memory: a ``datasets.Dataset`` or
            ``DatasetDict``, a ``DataFrame``, or a list of mappings.
        val: validation rows. Default: the validation split of ``train``, else a held-out part of its rows.
        test: test rows. Default: the test split of ``train``.
        format: auto recognises it by the columns; else transcripts, dialogues, messages, strings, queries, comparisons,
            ranked, nectar or ultrafeedback (``formats.FORMATS``).
        columns: the names of columns in the data where they are others, as in ``{prompt: question, chosen:
            answer_good}``; ``null`` hides a column. Formats are recognised by the new names.
        tokenizer: folder or hub id of a tokenizer, where there is no model; with one it is the model's own.
        batch_size: rows of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: rows of a forward on one rank; how often gradients are accumulated follows from it. Default:
            no accumulation.
        max_length: of a prompt and its response together, in tokens; longer responses are cut and get no EOS.
        max_prompt_length: of a prompt, in tokens. Default: half of ``max_length``.
        truncation_mode: which end of a prompt that is too long is kept, where leaving out the first messages of a
            conversation does not help (``keep_end``); ``drop`` leaves the row out.
        chat_template: auto uses the tokenizer's chat template for conversations where there is one, always for string
            prompts too, never writes plain transcripts.
        chat_template_kwargs: further variables of the chat template, such as ``{enable_thinking: false}``.
        val_size: how much of the training rows is held out where there are no validation rows: a fraction, or a number
            of rows. Rows with the same prompt stay together, so that it can be somewhat more.
        seed: of the order of the training rows. Default: the run's ``seed_everything``, and 0 in Python.
        length_window: optimizer steps whose rows are grouped by length, so that little is padding. 1 deals the rows of
            each step out to its micro-batches by length, which changes gradients by no more than rounding; more makes
            the steps themselves less random, and quicker; 0 leaves rows in random order. Weightings that mix pairs
            read rows in random order, and refuse more than 1.
        packing_length: positions of a row in which several pairs are packed, for FlexAttention, which skips what no
            token sees. Default: a row a pair.
        num_workers: processes that collate batches in the background.
        eval_batch_size: rows of a forward on one rank in evaluations. Default: ``micro_batch_size``.
        num_proc: processes that tokenize. Default: one a core where there are many rows.
        max_dropped_fraction: of a source's rows. Where more must be left out, because they are malformed or empty, the
            run stops: a format, column or chat template may be wrong.
        duplicates: what becomes of rows whose tokens are all those of an earlier one. They are counted, and kept by
            default: pairs that were sampled may rightly come twice.
        predict_split: train, val or test: whose prompts ``predict`` responds to. Default: the test rows, or the
            validation rows where there are none. What is held out for validation is not among the training rows.

    Attributes:
        splits: the rows of each split that was set up, and what became of those that were read.

    Raises:
        InputError: an argument is out of range; in ``setup``: whatever is wrong with the data.
    """

    @property
    @abstractmethod
    def row_type(self) -> RowType:
        """Whether rows are pairs or demonstrations."""

    def __init__(
        self,
        train: Given | None = None,
        val: Given | None = None,
        test: Given | None = None,
        format: str = "auto",
        columns: dict[str, str | None] | None = None,
        tokenizer: str | None = None,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation_mode: TruncationMode = "keep_end",
        chat_template: ChatTemplate = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        val_size: int | float = 0.05,
        seed: int | None = None,
        length_window: int = 1,
        packing_length: int | None = None,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        num_proc: int | None = None,
        max_dropped_fraction: float = 0.25,
        duplicates: Duplicates = "keep",
        predict_split: Split | None = None,
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        given: dict[Split, Given | None] = {"train": train, "val": val, "test": test}
        self.sources = {split: as_sources(value, f"data.{split}") for split, value in given.items()}
        self.format = format
        self.tokenizer_path = tokenizer
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        self.seed = 0 if seed is None else seed
        self.packing_length = packing_length
        self.read_options: dict[str, Any] = {}  # of row_type.read
        for least, names in _LEAST.items():
            for name in names:
                check_least(f"data.{name}", arguments[name], least)
        for name, choices in {"format": ("auto", *FORMATS), **_CHOICES}.items():
            check_choice(f"data.{name}", arguments[name], choices)
        if not 1 <= self.max_prompt_length < max_length:
            raise InputError(
                f"data.max_prompt_length is {self.max_prompt_length}; it must be at least 1 and less than "
                f"data.max_length, which is {max_length}"
            )
        check_template_options(chat_template_kwargs or {})
        # Plain types only: the metadata of a sharded checkpoint is loaded with weights_only=True.
        plain = {split: [source.plain() for source in sources] or None for split, sources in self.sources.items()}
        # Ignored, because Lightning compares all arguments with what it is to save, and a DataFrame is not compared so.
        self.save_hyperparameters({**arguments, **dict.fromkeys(plain)}, ignore=list(plain), logger=False)
        self.hparams.update(plain)
        self.splits = Splits(
            self.sources,
            self.row_type,
            val_size=val_size,
            max_dropped_fraction=max_dropped_fraction,
            duplicates=duplicates,
            read=self._read,
        )
        self.reader = Reader()
        self._order: TrainingOrder | None = None

    def read_for(self, reader: Reader) -> None:
        """Tells who will read the rows. A module must call it before each run, in ``configure_callbacks``."""
        self.reader = reader
        self._order = None  # it was another reader's

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that ``tokenizer`` names, else the one of the model that is being trained."""
        found = self.reader.tokenizer if self.tokenizer_path is None else load_tokenizer(self.tokenizer_path)
        if found is None:
            raise InputError("data.tokenizer: without a model, a tokenizer must be named")
        return found

    @property
    def encoder(self) -> TextEncoder:
        """Writes prompts and responses as the model reads them."""
        template, options = self.hparams["chat_template"], self.hparams["chat_template_kwargs"] or {}
        return TextEncoder(self.tokenizer, template, options, self.reader.first_without_row)

    def prepare_data(self) -> None:
        """Reads and tokenizes on one rank of a node, so that the others find the tokens in ``setup``."""
        if self.reader == Reader():  # else every rank would read all rows
            raise InputError("data: no module has told who reads the rows; call TextDataModule.read_for.")
        self._load(self.reader.stage)

    def setup(self, stage: str) -> None:
        """Reads and tokenizes what the stage needs, and settles how optimizer steps are put together."""
        self._load(stage)
        if stage == "fit" and self._order is None:
            self._order = training_order(
                self.splits.rows["train"],
                [counts.kept for counts in self.splits.counts["train"]],
                self.sources["train"],
                self.reader,
                batch_size=self.batch_size,
                micro_batch_size=self.rows_per_forward,
                seed=self.seed,
                length_window=self.hparams["length_window"],
                balanced=self.packing_length is not None,
            )
            for note in outcomes.hints(self._order, self.splits.rows["train"], self.tokenizer.decode):
                rank_zero_info(note)

    def _load(self, stage: str) -> None:
        wanted = _STAGES.get(stage, (self.split_to_predict,))
        if stage == "predict" and wanted == ("train",) and not self.splits.parts("val"):
            wanted = ("train", "val")  # which are held out of them
        missing = [split for split in wanted if split not in self.splits.rows]
        for split in missing:
            self.splits.load(split)
        if missing and self.reader.rank() == 0:
            counts = {split: self.splits.counts[split] for split in missing}
            outcomes.console().print(outcomes.table(counts, unit=self.row_type.kind), markup=False)

    def _read(self, source: OpenSource, name: str, label: str) -> TokenizedSource:
        """A split of a source, tokenized; messages call it ``label``."""
        limits = Limits(self.max_length, self.max_prompt_length, self.hparams["truncation_mode"])
        recipe = Recipe(self.row_type, self.format, self.encoder, limits, self.read_options)
        rows = source.read(name, self.hparams["columns"])
        return tokenize_rows(rows, recipe, name=label, num_proc=self.hparams["num_proc"])

    @property
    def split_to_predict(self) -> Split:
        """Whose prompts ``predict`` responds to."""
        return self.hparams["predict_split"] or ("test" if self.splits.parts("test") else "val")

    @property
    def rows_per_forward(self) -> int:
        """Rows of a training forward on one rank; known once the number of ranks is."""
        return self.split_batch(self.reader.world_size)[0]

    def split_batch(self, world_size: int) -> tuple[int, int]:
        """Rows of a micro-batch, and micro-batches of an optimizer step, on each of ``world_size`` ranks."""
        return split_batch(self.batch_size, self.micro_batch_size, world_size)

    @property
    def order(self) -> TrainingOrder:
        """Which training rows make up which batch; an epoch leaves out, each time, rows that fill no last step."""
        assert self._order is not None, "setup('fit') comes first"
        return self._order

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches, from the trainer's optimizer step on."""
        if self.packing_length is not None and self.reader.layout == "plain":
            raise InputError("data.packing_length: rows are packed where pairs share prompts, which they do not here.")
        return TrainingLoader(
            self.splits.rows["train"],
            batch_size=self.rows_per_forward,
            sampler=self.order,
            persistent_workers=self.hparams["num_workers"] > 0,
            **self._loader_options(self.reader.layout),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation row once over the ranks."""
        return self._evaluation_loader("val", self.reader.layout)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test row once over the ranks."""
        return self._evaluation_loader("test", self.reader.layout)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The rows of ``split_to_predict``, each once over the ranks, in their own order."""
        return self._evaluation_loader(self.split_to_predict, "plain", in_own_order=True)

    def _evaluation_loader(self, split: Split, layout: Layout, *, in_own_order: bool = False) -> DataLoader[Any]:
        rows, batch_size = self.splits.rows[split], self.eval_batch_size or self.rows_per_forward
        limit, by_length = self.reader.limits.get(split, 1.0), self.hparams["length_window"] > 0
        order = evaluation_order(rows, self.reader, limit, batch_size, by_length=by_length, in_own_order=in_own_order)
        return DataLoader(rows, batch_size=batch_size, sampler=order, **self._loader_options(layout))

    def _loader_options(self, layout: Layout) -> dict[str, Any]:
        # Rows are tokenized already and quick to stack: Lightning's advice to add workers is beside the point.
        few_workers = r"The '\w+_dataloader' does not have many workers"
        warnings.filterwarnings("ignore", few_workers, category=PossibleUserWarning)
        num_workers, pin_memory = self.hparams["num_workers"], self.reader.pin_memory
        return {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": self.collate(layout)}

    def collate(self, layout: Layout) -> Any:
        """What makes a batch of ``(row id, item)``."""
        options = {"layout": layout, "row_budget": self.packing_length} if layout == "shared" else {}
        return partial(
            stack_rows, collate=partial(self.row_type.collate, pad_token_id=pad_token_id(self.tokenizer), **options)
        )

    def prompts(self, split: Split, num: int) -> list[ProbePrompt]:
        """The first ``num`` different prompts of a split that was set up; fewer where there are not so many."""
        return self.splits.prompts(split, num, partial(self.tokenizer.decode, skip_special_tokens=True))

    def state_dict(self) -> dict[str, Any]:
        """What the order of the training rows follows from; the place in it is the trainer's step."""
        return {} if self._order is None else self._order.state(self.splits.rows["train"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Says so where a resumed run does not go on with the rows of the run before."""
        now = self.state_dict()
        other = [key for key in now if key in state_dict and state_dict[key] != now[key]]
        if other:
            rank_zero_warn(
                f"data: the checkpoint was trained with other {', '.join(other)}; training goes on at its step in the "
                "order of the new ones, so that rows may be repeated or left out"
            )


class PreferenceDataModule(TextDataModule):
    """Preference pairs: a prompt, the response that was chosen, and the one that was rejected.

    Args:
        pairing: what is made of a row with several scored or ranked responses: best_worst, best_random (the best with a
            worse one that a hash of the texts picks), or all pairs with different scores.
        weight_column: column with the factor of each pair's loss, a number of at least 0.
        margin_column: column with what each pair's scaled preference must exceed. Where it is the scores of several
            responses, it is the difference of the pair's.
        **options: those of :class:`TextDataModule`.

    Raises:
        InputError: as there.
    """

    row_type = PAIRS

    def __init__(
        self,
        *,
        pairing: Pairing = "best_worst",
        weight_column: str | None = None,
        margin_column: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_choice("data.pairing", pairing, get_args(Pairing))
        if self.format != "auto":
            check_pairing(pairing, self.format)
        self.read_options = {"pairing": pairing, "weight_column": weight_column, "margin_column": margin_column}
        self.hparams.update(self.read_options)


class SFTDataModule(TextDataModule):
    """Demonstrations: a prompt and a response to it; of preference pairs the chosen one, of several the best."""

    row_type = DEMONSTRATIONS
