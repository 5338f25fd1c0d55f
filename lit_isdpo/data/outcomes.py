"""The outcome of reading rows: the reasons to leave one out, the changes in the others, and the counts of both."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from lit_isdpo.types import InputError

if TYPE_CHECKING:
    from lit_isdpo.data.sampling import TrainingOrder
    from lit_isdpo.data.tokenized_rows import Rows

Split = Literal["train", "val", "test"]
_SPELLED_ROWS = 32  # that `hints` looks at
_MOST_REASONS = 12  # the commonest reasons, which messages and tables list one by one
_SPELLED = 1.25  # bytes per token; in text of its own kind, a tokenizer's tokens have three and more
_LOG_WIDTH = 120  # columns of a table that goes to a file


class Reason(StrEnum):
    """Why a row or a pair is left out."""

    MALFORMED = "malformed row"
    TWO_PROMPTS = "two different prompts"
    NO_PREFERENCE = "no two responses with different scores"
    EMPTY_PROMPT = "empty prompt"
    LONG_PROMPT = "over-long prompt"
    EMPTY_RESPONSE = "empty response"
    IDENTICAL = "identical pair"
    IDENTICAL_TOKENS = "identical after truncation"
    NO_ROW = "token without a row in the model's embedding"
    CUT_BEHAVIOR = "truncated, so that its behavior log-probs do not hold"
    TEMPLATE = "refused by the chat template"
    NO_BEGINNING = "prompt not rendered as the beginning of prompt and response"
    REWRITTEN = "response not rendered as given"
    DUPLICATE = "duplicated row"


class Change(StrEnum):
    """A change in a row that is kept, or something odd about it."""

    OTHER_PROMPT = "the prompt column is not in the conversation"
    PROMPT_REMOVED = "prompt removed from responses that repeat it"
    PROMPT_REPEATED = "responses that begin with their prompt"
    PROMPT_REWRITTEN = "prompt not rendered as given"
    RESPONSE_BLANKS = "blanks inside a response changed by the chat template"
    RESPONSE_EXTENDED = "text added to a response by the chat template"
    SPECIAL_IN_PROMPT = "special token inside a prompt"
    SPECIAL_IN_RESPONSE = "special token inside a response"
    FIRST_MESSAGES_CUT = "first messages left out"
    PROMPT_CUT = "prompt cut"
    RESPONSE_CUT = "response cut"
    INNER_TERMINATOR = "terminator inside a response"


class RowError(ValueError):
    """A row cannot be used. It is counted and left out, never repaired.

    Args:
        reason: why.
        problem: which field has which fault; rows are counted by it too.
        shown: the row's own text there, for the listing.
    """

    def __init__(self, reason: Reason, problem: str = "", shown: str = "") -> None:
        super().__init__(noted(f"{reason.value}: {problem}" if problem else reason.value, shown))
        self.reason = reason


def noted(words: str, shown: str = "") -> str:
    """A note about a row: words that rows are counted by and, after a line break, the row's own text."""
    shown = " ".join(shown.split()).encode(errors="backslashreplace").decode()  # half a surrogate is no text
    return f"{words}\n{shown}" if shown else words


def count_notes(notes: Sequence[str]) -> dict[str, int]:
    r"""Notes by their words, without a row's own text and places in lists, the commonest first.

    >>> count_notes(["malformed row: prompt[3].content is a number", "prompt cut\n3 tokens"])
    {'malformed row: prompt[].content is a number': 1, 'prompt cut': 1}
    """
    counts: Counter[str] = Counter()
    for note, number in Counter(notes).items():
        counts[words_of(note)] += number
    return dict(counts.most_common())


def words_of(note: str) -> str:
    """The words that a note is counted by."""
    return re.sub(r"\[\d+\]", "[]", note.partition("\n")[0])


class SourceCounts(NamedTuple):
    """The outcome of reading one source.

    ``kept``, ``held_out`` and ``dropped``, which is by reason, add up to ``lines``: the rows that were read or, if a
    row holds several responses, the pairs that were made of it. ``changed`` counts changes in lines that are kept or
    held out; one line may have several. ``example`` shows the text of a row that was dropped for the commonest reason.
    """

    source: str
    format: str
    read: int
    kept: int
    held_out: int
    dropped: dict[str, int]
    changed: dict[str, int]
    example: str = ""

    @property
    def lines(self) -> int:
        """Lines of the table."""
        return self.kept + self.held_out + self.num_dropped

    @property
    def num_dropped(self) -> int:
        """Lines that are left out."""
        return sum(self.dropped.values())


def check_dropped(counts: SourceCounts, split: Split, limit: float) -> None:
    """Stops if more of a source is left out than the user expects: a column, format or template may be wrong.

    Args:
        counts: of the source.
        split: that it was read for.
        limit: the share of its lines that may be left out, between 0 and 1.

    Raises:
        InputError: it is more, or all; names the reasons.
    """
    reasons = list(counts.dropped.items())
    why = ", ".join(f"{number:,} x {reason}" for reason, number in reasons[:_MOST_REASONS])
    why += f", and {len(reasons) - _MOST_REASONS} more reasons" if len(reasons) > _MOST_REASONS else ""
    why += f"; for example, {counts.example}" if counts.example else ""
    if counts.num_dropped == counts.lines:
        raise InputError(f"data.{split}: {counts.source}: none of the {counts.lines:,} rows can be used: {why}")
    if counts.num_dropped > limit * counts.lines:
        raise InputError(
            f"data.{split}: {counts.source}: {counts.num_dropped:,} of {counts.lines:,} rows must be left out ({why}), "
            f"more than data.max_dropped_fraction allows, which is {limit:g}; `lit-isdpo inspect --listing rows.jsonl` "
            "with the same config lists them"
        )


def metrics(counts: Mapping[Split, Sequence[SourceCounts]]) -> dict[str, float]:
    """The counts of each split over all of its sources, by log key.

    >>> metrics({"test": [SourceCounts("a.jsonl", "strings", 4, 3, 0, {"identical pair": 1}, {})]})["data/test/kept"]
    3.0
    """
    values: dict[str, float] = {}
    for split, sources in counts.items():
        for name in ("read", "kept", "held_out"):
            values[f"data/{split}/{name}"] = float(sum(getattr(source, name) for source in sources))
        dropped = sum(source.num_dropped for source in sources)
        values[f"data/{split}/dropped_fraction"] = dropped / max(1, sum(source.lines for source in sources))
        for name in ("dropped", "changed"):
            reasons: Counter[str] = Counter()
            for source in sources:
                for words, number in getattr(source, name).items():
                    reasons[words.partition(":")[0]] += number  # not by field: a key means the same for all data
            for reason, number in reasons.items():
                values[f"data/{split}/{name}/{reason.replace(',', '').replace(' ', '_')}"] = float(number)
    return values


def table(counts: Mapping[Split, Sequence[SourceCounts]], unit: str) -> Table:
    """The counts as a table, source by source.

    Args:
        counts: those of the splits to show.
        unit: the name of a line, for example ``pairs``.
    """
    grid = Table(box=None, pad_edge=False)
    grid.add_column("data", overflow="fold")
    grid.add_column(unit, justify="right")
    grid.add_column("share", justify="right")
    for split, sources in counts.items():
        for source in sources:
            several = f" of {source.read:,} rows" if source.read != source.lines else ""
            lines = [(f"{split}: {source.source} ({source.format}){several}, kept", source.kept)]
            if source.held_out:
                lines.append(("  held out for validation", source.held_out))
            for label, notes in (("left out:", source.dropped), ("kept, but", source.changed)):
                lines += [(f"  {label} {words}", number) for words, number in list(notes.items())[:_MOST_REASONS]]
                if rest := list(notes.values())[_MOST_REASONS:]:
                    lines.append((f"  {label} {len(rest)} more reasons", sum(rest)))
            for label, number in lines:
                grid.add_row(label, f"{number:,}", f"{number / max(1, source.lines):.1%}")
    return grid


def hints(order: "TrainingOrder", rows: "Rows", decode: Callable[[list[int]], Any]) -> list[str]:
    """Hints about training rows that are all in order.

    Args:
        order: of the rows.
        rows: of which the first are looked at.
        decode: token ids to text.
    """
    said = []
    if order.num_unused:
        said.append(
            f"An epoch has {order.steps_per_epoch:,} optimizer steps of {order.batch_size} rows; {order.num_unused:,} "
            "more rows do not fill one and are left out, others in each epoch."
        )
    items = [item for _, item in rows.__getitems__(range(min(len(rows), _SPELLED_ROWS)))]
    texts = [ids for item in items for ids in item[:2]]  # prompts and responses
    if sum(len(str(decode(ids)).encode()) for ids in texts) < _SPELLED * sum(map(len, texts)):
        said.append(
            "The tokenizer spells the training text nearly byte by byte, so it was made for other text, and so was its "
            "model; name one that knows this text: --model.policy.path."
        )
    return said


def console() -> Console:
    """Prints tables as wide as the terminal; without a terminal they are not squeezed."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, _LOG_WIDTH)
    return out
