"""Shows the data as a fit will see it, before anything is trained: what is masked, what is learned, what is odd."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_isdpo.data import outcomes
from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.encoding import special_ids, terminator_ids
from lit_isdpo.data.outcomes import Split
from lit_isdpo.data.tokenized_rows import PAIRS, Rows
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError, PreferenceBatch, SFTBatch

SHADES = {  # of two neighboring tokens
    "prompt": ("white", "bright_black"),
    "chosen": ("green", "bright_green"),
    "rejected": ("red", "bright_red"),
    "completion": ("green", "bright_green"),
}
SPECIAL = "bold magenta"
_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 24
_MOST_BYTES = 4  # of a character in UTF-8
_SHOWN_TOKENS = 400  # of a part; the middle of a longer one is left out
_LENGTH_BIAS = 0.6  # share of the longer responses among the chosen ones that is worth a word


def inspect_data(
    module: LanguageModule,
    datamodule: TextDataModule,
    trainer: Trainer,
    *,
    split: Split = "train",
    num_pairs: int = 3,
    rows: Sequence[int] | None = None,
    listing: str | None = None,
) -> None:
    """Prints counts, lengths, what the labels prefer, and some rows token by token. No weights are loaded.

    Args:
        module: its tokenizer is used.
        datamodule: nothing of it is read yet.
        trainer: both are attached to it.
        split: whose rows are shown.
        num_pairs: how many, spread over the split.
        rows: which, instead, by their number in the data as messages tell it.
        listing: file of JSON lines for the rows that are left out, were changed or repeat another.

    Raises:
        InputError: whatever is wrong with the data, but not that much of it must be left out.
    """
    if num_pairs < 0:
        raise InputError(f"num_pairs must be at least 0, not {num_pairs}.")
    trainer.strategy.connect(module)
    module.trainer = datamodule.trainer = trainer
    splits = datamodule.splits
    splits.max_dropped_fraction = None
    console = outcomes.console()
    splits.load("train" if datamodule.sources["train"] else split)
    if len(splits.rows.get("train", ())):
        splits.load("val")
    if splits.parts("test"):
        splits.load("test")
    console.print(outcomes.table(splits.counts, unit=splits.row_type.kind), markup=False)
    if listing is not None:
        _write_listing(Path(listing), [row for name in splits.counts for row in _noted(datamodule, name)], console)
    if split not in splits.rows:
        raise InputError(f"split: there are no {split} rows in data; there are: {', '.join(splits.rows)}.")
    if not len(splits.rows[split]):
        console.print(f"\nNo row of {split} can be used.")
        return
    console.print(_lengths(datamodule, split))
    if splits.row_type is PAIRS:
        _print_labels(datamodule, split, console)
    legend = Text("\nTokens: ")
    for name in splits.rows[split].num_tokens():
        legend.append(name, SHADES[name][0]).append(" (masked), " if name == "prompt" else " (trained on), ")
    console.print(legend.append("special", SPECIAL).append("; | parts them where there is no color."))
    for row_id in _chosen_rows(datamodule, split, num_pairs, rows):
        console.print()
        for line in show_row(datamodule, split, row_id, separator="" if console.is_terminal else "|"):
            console.print(line, soft_wrap=True)


def _noted(datamodule: TextDataModule, split: Split) -> Iterator[dict[str, Any]]:
    """The rows of a split's own sources that are to be listed; those held out are listed with the training rows."""
    rows = datamodule.splits.noted(split)
    return (row for row in rows if row["split"] == split)


def _write_listing(file: Path, rows: list[dict[str, Any]], console: Console) -> None:
    try:
        file.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"listing: cannot write {str(file)!r}: {error.strerror}.") from error
    console.print(f"\nListed {len(rows):,} rows in {file}", soft_wrap=True)


def _lengths(datamodule: TextDataModule, split: Split) -> Table:
    """Quantiles and histograms of the tokens of each part of a row."""
    counts = datamodule.splits.rows[split].num_tokens()
    responses = [count for name, count in counts.items() if name != "prompt"]
    counts["prompt + longest" if len(responses) > 1 else "prompt + completion"] = counts["prompt"] + torch.stack(
        responses
    ).amax(0)
    grid = Table(title=f"\nTokens of {split}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    grid.add_column("")
    for name in ("least", "5%", "median", "95%", "most", "mean"):
        grid.add_column(name, justify="right")
    longest = max(int(count.max()) for count in counts.values())
    grid.add_column(f"0 to {longest:,}")
    for name, count in counts.items():
        ends = [int(count.double().quantile(q, interpolation="nearest")) for q in (0.0, 0.05, 0.5, 0.95, 1.0)]
        numbers = [f"{number:,}" for number in ends]
        grid.add_row(name, *numbers, f"{count.double().mean():,.1f}", bars(count, longest))
    return grid


def bars(values: Tensor, end: int, num_bins: int = _BINS) -> str:
    """A histogram from 0 to ``end`` as a line of blocks; any number but 0 is seen.

    >>> bars(torch.tensor([1, 1, 1, 1, 9]), 10, num_bins=5)
    '█   ▂'
    """
    counts = torch.histc(values.double(), bins=num_bins, min=0, max=end)
    return "".join(_BARS[int((count / counts.max() * (len(_BARS) - 1)).ceil())] for count in counts)


def _print_labels(datamodule: TextDataModule, split: Split, console: Console) -> None:
    """Prints what the labels of the pairs prefer besides what they mean."""
    splits = datamodule.splits
    rows = splits.rows[split]
    labels = profile_labels(rows, terminator_ids(datamodule.tokenizer))
    unequal = labels.chosen_longer + labels.rejected_longer
    share = labels.chosen_longer / max(1, unequal)
    grid = Table(title=f"\nLabels of {split}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    grid.add_column("")
    grid.add_column("pairs", justify="right")
    grid.add_column("share", justify="right")

    def add(label: str, number: int) -> None:
        grid.add_row(label, f"{number:,}", f"{number / len(rows):.1%}")

    add("the chosen response is longer", labels.chosen_longer)
    add("the rejected response is longer", labels.rejected_longer)
    add("both are equally long", len(rows) - unequal)
    add("the chosen response was cut", labels.chosen_cut)
    add("the rejected response was cut", labels.rejected_cut)
    add("another pair says the opposite", labels.contradicted)
    for other, others in splits.rows.items():
        if other != "train" and "train" in splits.rows:
            number = num_shared_prompts(others, splits.rows["train"])
            grid.add_row(
                f"{other} rows whose prompt is trained on", f"{number:,}", f"{number / max(1, len(others)):.1%}"
            )
    grid.add_row("different prompts", f"{labels.num_prompts:,}", "")
    grid.add_row("most pairs of one prompt", f"{labels.most_pairs:,}", "")
    grid.add_row("responses chosen here and rejected there", f"{labels.both_ways:,}", "")
    grid.add_row("tokens, chosen minus rejected, mean", f"{labels.mean_difference:+.1f}", "")
    console.print(grid)
    favor = "long" if share > _LENGTH_BIAS else "short" if share < 1 - _LENGTH_BIAS else None
    console.print(
        f"Of responses of different length the longer one is chosen in {share:.1%}"
        + (
            f": the labels favor {favor} responses, and a policy will learn that too (R-DPO takes it out)."
            if favor
            else "."
        ),
        soft_wrap=True,
    )


class LabelProfile(NamedTuple):
    """What the labels of N pairs prefer, besides what they mean.

    Attributes:
        chosen_longer: pairs whose chosen response has more tokens.
        rejected_longer: pairs whose rejected response has.
        mean_difference: tokens, chosen minus rejected, mean over pairs.
        chosen_cut: pairs whose chosen response has no terminator, as it was cut.
        rejected_cut: likewise.
        num_prompts: different prompts.
        most_pairs: of one prompt.
        both_ways: responses that are chosen in one pair and rejected in another of the same prompt.
        contradicted: pairs whose two responses stand in another one the other way round.
    """

    chosen_longer: int
    rejected_longer: int
    mean_difference: float
    chosen_cut: int
    rejected_cut: int
    num_prompts: int
    most_pairs: int
    both_ways: int
    contradicted: int


def profile_labels(rows: Rows, terminator_ids: list[int]) -> LabelProfile:
    """Reads all pairs of a split once.

    Args:
        rows: at least one pair.
        terminator_ids: tokens that end a response.
    """
    lengths = rows.num_tokens()
    difference = (lengths["chosen"] - lengths["rejected"]).double()
    prompts = rows.prompt_keys().tolist()
    sides = [list(_responses(rows, f"{name}_ids")) for name in ("chosen", "rejected")]
    cut = [sum(last not in terminator_ids for _, last in side) for side in sides]
    texts = ([key for key, _ in side] for side in sides)
    pairs = list(zip(prompts, *texts, strict=True))
    known = set(pairs)
    return LabelProfile(
        chosen_longer=int((difference > 0).sum()),
        rejected_longer=int((difference < 0).sum()),
        mean_difference=float(difference.mean()),
        chosen_cut=cut[0],
        rejected_cut=cut[1],
        num_prompts=len(set(prompts)),
        most_pairs=max(Counter(prompts).values()),
        both_ways=len({(prompt, text) for prompt, text, _ in pairs} & {(prompt, text) for prompt, _, text in pairs}),
        contradicted=sum((prompt, worse, better) in known for prompt, better, worse in pairs),
    )


def num_shared_prompts(rows: Rows, others: Rows) -> int:
    """Rows of a split whose prompt is one of another split's."""
    return int(torch.isin(rows.prompt_keys(), others.prompt_keys()).sum())


def _responses(rows: Rows, column: str) -> Iterator[tuple[bytes, int]]:
    """A hash of each row's tokens, and the last one."""
    start = 0
    for chunk in rows.table.data.column(column).chunks:  # one by one: a table may hold more tokens than one array can
        values: NDArray[np.int32] = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy()
        inside = rows.positions[(rows.positions >= start) & (rows.positions < start + len(chunk))] - start
        for at in inside.tolist():
            tokens = values[offsets[at] : offsets[at + 1]]
            yield hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), int(tokens[-1])
        start += len(chunk)


def _chosen_rows(datamodule: TextDataModule, split: Split, number: int, wanted: Sequence[int] | None) -> list[int]:
    """The ids of the rows to show."""
    rows: Rows = datamodule.splits.rows[split]
    if wanted is None:
        return rows.positions[torch.linspace(0, len(rows) - 1, min(number, len(rows))).long()].tolist()
    numbers = rows.table.data.column("row").to_numpy()
    found = [int(line) for line in rows.positions.tolist() if numbers[line] in wanted]
    missing = sorted(set(wanted) - {int(numbers[line]) for line in found})
    if missing:
        raise InputError(
            f"rows: {missing} are no {split} rows: held out (--split val) or left out (--listing FILE says why)."
        )
    return found


def show_row(datamodule: TextDataModule, split: Split, row_id: int, *, separator: str = "") -> list[Text]:
    """A row as lines of text, read off the very batch that a model would get.

    Args:
        datamodule: with the split read.
        split: that the row is of.
        row_id: the row.
        separator: between tokens.
    """
    rows = datamodule.splits.rows[split]
    index = int((rows.positions == row_id).nonzero()[0])
    batch: PreferenceBatch | SFTBatch = datamodule.collate("plain")(rows.__getitems__([index]))
    head = Text(datamodule.row_name(split, row_id), "bold")
    if isinstance(batch, PreferenceBatch):
        weight, margin = float(batch.pair_weights[0]), float(batch.margins[0])
        head.append(f", weight {weight:g}" * (weight != 1) + f", margin {margin:g}" * (margin != 0))
        if not batch.behavior_logps.isnan().any():
            head.append(", behavior log-probs {:.2f} and {:.2f}".format(*batch.behavior_logps.tolist()))
    lines = [head]
    tokens = batch.tokens
    names = [name for name in rows.num_tokens() if name != "prompt"]
    for name, ids, attended, completion, trained, positions in zip(
        names,
        tokens.input_ids,
        tokens.attention_mask,
        tokens.completion_ids,
        tokens.completion_mask,
        tokens.logit_positions,
        strict=True,
    ):
        learned = (positions[trained] % len(ids)) + 1  # what position t predicts stands at t + 1
        assert torch.equal(ids[learned], completion[trained])
        masked = attended.clone()
        masked[learned] = False
        if name == names[0]:
            lines += _part("prompt", ids[masked].tolist(), datamodule.tokenizer, separator)
        lines += _part(name, ids[learned].tolist(), datamodule.tokenizer, separator)
    return lines


def _part(name: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, separator: str) -> list[Text]:
    if name == "prompt":
        heading = f"  prompt, {len(ids)} tokens, masked"
    else:
        ends = ids[-1] in terminator_ids(tokenizer)
        heading = f"  {name}, {len(ids)} tokens, trained on, {'ends' if ends else 'cut, so that nothing ends it'}"
    text = Text()
    for number, (piece, special) in enumerate(pieces(ids, tokenizer)):
        if len(ids) > _SHOWN_TOKENS and abs(number - len(ids) / 2) < (len(ids) - _SHOWN_TOKENS) / 2:
            if not text.plain.endswith(" ... "):
                text.append(" ... ", "dim")
            continue
        if separator and text.plain:
            text.append(separator, "dim")
        text.append(_visible(piece), SPECIAL if special else SHADES[name][number % 2])
    return [Text(heading, "bold " + SHADES[name][0]), text]


def _visible(text: str) -> str:
    """Line breaks get a sign, and control characters, which a terminal would obey, are written out."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown).replace("\n", "⏎\n")


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The text of each token, and whether it is a special one; a character of several tokens is one piece.

    A token is decoded behind the one before it: by itself SentencePiece's would lose its blank.
    """

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    special = special_ids(tokenizer)
    group: list[int] = []  # of a character, as far as it has come
    before: list[int] = []  # the group before it
    for at, token in enumerate(ids):
        if token in special:
            yield str(tokenizer.convert_ids_to_tokens(token)), True
            group, before = [], [token]
            continue
        group.append(token)
        text = decode(before + group)
        if text.endswith("�") and len(group) < _MOST_BYTES and at + 1 < len(ids):
            continue
        yield text.removeprefix(decode(before)), False
        group, before = [], group
