"""Shows the data as a fit will see it, before anything is trained: which tokens are masked, and which rows are odd."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
LONGER, SHORTER = "the chosen response is longer", "the rejected response is longer"
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
    """Prints counts, lengths, the bias of the labels, and some rows token by token. No weights are loaded.

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
    module.trainer = trainer
    module.hand_over(datamodule)
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
        # Rows that were held out are listed once, with the training rows.
        listed = [row for name in splits.counts for row in splits.noted(name) if row["split"] == name]
        _write_listing(Path(listing), listed, console)
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
    both = "prompt + longest" if len(responses) > 1 else "prompt + completion"
    counts[both] = counts["prompt"] + torch.stack(responses).amax(0)
    grid = _grid(f"Tokens of {split}", "least", "5%", "median", "95%", "most", "mean")
    longest = max(int(count.max()) for count in counts.values())
    grid.add_column(f"0 to {longest:,}")
    for name, count in counts.items():
        ends = [int(count.double().quantile(q, interpolation="nearest")) for q in (0.0, 0.05, 0.5, 0.95, 1.0)]
        grid.add_row(name, *(f"{number:,}" for number in ends), f"{count.double().mean():,.1f}", bars(count, longest))
    return grid


def bars(values: Tensor, end: int, num_bins: int = _BINS) -> str:
    """A histogram from 0 to ``end`` as a line of blocks; any number but 0 is seen.

    >>> bars(torch.tensor([1, 1, 1, 1, 9]), 10, num_bins=5)
    '█   ▂'
    """
    counts = torch.histc(values.double(), bins=num_bins, min=0, max=end)
    return "".join(_BARS[int((count / counts.max() * (len(_BARS) - 1)).ceil())] for count in counts)


def _print_labels(datamodule: TextDataModule, split: Split, console: Console) -> None:
    """Prints what the labels of the pairs prefer, for example the longer response."""
    splits = datamodule.splits
    rows = splits.rows[split]
    of_pairs, others = profile_labels(rows, terminator_ids(datamodule.tokenizer))
    grid = _grid(f"Labels of {split}", "pairs", "share")
    shares = [(label, number, len(rows)) for label, number in of_pairs.items()]
    for name in splits.rows if "train" in splits.rows else ():
        if name != "train":
            number = num_shared_prompts(splits.rows[name], splits.rows["train"])
            shares.append((f"{name} rows whose prompt is trained on", number, len(splits.rows[name])))
    for label, number, total in shares:
        grid.add_row(label, f"{number:,}", f"{number / max(1, total):.1%}")
    for label, value in others.items():
        grid.add_row(label, value, "")
    console.print(grid)
    share = of_pairs[LONGER] / max(1, of_pairs[LONGER] + of_pairs[SHORTER])
    favor = "long" if share > _LENGTH_BIAS else "short" if share < 1 - _LENGTH_BIAS else None
    advice = f": the labels favor {favor} responses, and a policy will learn that too (R-DPO takes it out)."
    said = f"Of responses of different length the longer one is chosen in {share:.1%}"
    console.print(said + (advice if favor else "."), soft_wrap=True)


def _grid(title: str, *columns: str) -> Table:
    grid = Table("", title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        grid.add_column(column, justify="right")
    return grid


def profile_labels(rows: Rows, terminator_ids: list[int]) -> tuple[dict[str, int], dict[str, str]]:
    """Reads all pairs of a split once, and counts what their labels prefer, for example the longer response.

    Args:
        rows: at least one pair.
        terminator_ids: tokens that end a response; a response that was cut has none.

    Returns:
        Numbers of pairs, and other numbers as text.
    """
    lengths = rows.num_tokens()
    difference = (lengths["chosen"] - lengths["rejected"]).double()
    prompts = rows.prompt_keys().tolist()
    sides = [list(_responses(rows, f"{name}_ids")) for name in ("chosen", "rejected")]
    cut = [sum(last not in terminator_ids for _, last in side) for side in sides]
    pairs = list(zip(prompts, *([key for key, _ in side] for side in sides), strict=True))
    known = set(pairs)
    chosen, rejected = ({(pair[0], pair[side]) for pair in pairs} for side in (1, 2))
    of_pairs = {
        LONGER: int((difference > 0).sum()),
        SHORTER: int((difference < 0).sum()),
        "both are equally long": int((difference == 0).sum()),
        "the chosen response was cut": cut[0],
        "the rejected response was cut": cut[1],
        "another pair says the opposite": sum((prompt, worse, better) in known for prompt, better, worse in pairs),
    }
    return of_pairs, {
        "different prompts": f"{len(set(prompts)):,}",
        "most pairs of one prompt": f"{max(Counter(prompts).values()):,}",
        "responses chosen here and rejected there": f"{len(chosen & rejected):,}",
        "tokens, chosen minus rejected, mean": f"{float(difference.mean()):+.1f}",
    }


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
    head = Text(datamodule.splits.row_name(split, row_id), "bold")
    if isinstance(batch, PreferenceBatch):
        weight, margin = float(batch.pair_weights[0]), float(batch.margins[0])
        if weight != 1:
            head.append(f", weight {weight:g}")
        if margin:
            head.append(f", margin {margin:g}")
        if not batch.behavior_logps.isnan().any():
            head.append(", behavior log-probs {:.2f} and {:.2f}".format(*batch.behavior_logps.tolist()))
    lines = [head]
    tokens = batch.tokens
    names = [name for name in rows.num_tokens() if name != "prompt"]
    for number, name in enumerate(names):
        ids, trained = tokens.input_ids[number], tokens.completion_mask[number]
        learned = (tokens.logit_positions[number][trained] % len(ids)) + 1  # position t predicts the token at t + 1
        assert torch.equal(ids[learned], tokens.completion_ids[number][trained])
        masked = tokens.attention_mask[number].clone()
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
    for number, (piece, special) in enumerate(token_texts(ids, tokenizer)):
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


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
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
