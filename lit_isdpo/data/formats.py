r"""The formats that rows come in, how they are recognised, and what is made of a row of each.

A new format is one function in ``readers.py`` and one line of ``FORMATS``. Four of them, as pairs:

    strings      prompt "2 + 2 =", chosen " 4", rejected " 5"
    messages     chosen [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], rejected alike
    transcripts  chosen "\n\nHuman: 2 + 2?\n\nAssistant: 4", rejected alike
    ranked       prompt "2 + 2 =", responses [" 4", " 5", " 22"], scores [9, 3, 1]
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

from lit_isdpo.data.pairing import Pairing, by_score, choose_pairs
from lit_isdpo.data.readers import (
    Reader,
    Reason,
    Row,
    RowError,
    ScoredReader,
    is_list_of,
    is_transcript,
    number,
    read_comparison,
    read_dialogue,
    read_messages,
    read_nectar,
    read_query,
    read_ranked,
    read_strings,
    read_transcript,
    read_ultrafeedback,
)
from lit_isdpo.types import InputError, Message, PreferenceExample, SFTExample

Kind = Literal["pairs", "demonstrations"]
BEHAVIOR_COLUMNS = ("chosen_behavior_logps", "rejected_behavior_logps")


class Format(NamedTuple):
    """A line of ``FORMATS`` for rows that hold a pair or a demonstration.

    Columns are listed as ``"prompt, completion | chosen"``: a prompt, and a completion or else a chosen response. The
    last one of a demonstration is where its response is read from.

    Attributes:
        read: row and response column -> demonstration.
        pairs: the columns of a preference pair, whose responses are read as ``chosen`` and ``rejected``.
        demonstrations: the columns of a demonstration.
        holds: whether a row with these columns looks like this format's, given the last of them.
        looks: the format in words, for messages.
    """

    read: Reader
    pairs: str
    demonstrations: str
    holds: Callable[[Row, str], bool]
    looks: str

    def columns(self, kind: Kind) -> str:
        """The columns of a kind of row, as a list in words."""
        return self.pairs if kind == "pairs" else self.demonstrations


class RankedFormat(NamedTuple):
    """A line of ``FORMATS`` for rows that hold several responses; attributes as in :class:`Format`.

    Attributes:
        read: row -> all its responses and their scores.
        responses: the columns.
        holds: as above.
        looks: as above.
        score_column: where the scores are a column of their own, which may be named as the margin.
    """

    read: ScoredReader
    responses: str
    holds: Callable[[Row, str], bool]
    looks: str
    score_column: str | None = None

    def columns(self, kind: Kind) -> str:
        """The columns of a row, the same for pairs and for demonstrations."""
        return self.responses


FORMATS: dict[str, Format | RankedFormat] = {  # the first that fits is taken
    "transcripts": Format(
        read_transcript,
        "chosen, rejected",
        "chosen",
        lambda row, column: is_transcript(row[column]),
        r'strings such as "\n\nHuman: ...\n\nAssistant: ..."',
    ),
    "dialogues": Format(
        read_dialogue,
        "prompt, chosen, rejected",
        "prompt, completion | chosen",
        lambda row, column: is_transcript(row["prompt"]) and isinstance(row[column], str),
        r'strings, the prompt such as "\n\nHuman: ...\n\nAssistant:"',
    ),
    "messages": Format(
        read_messages,
        "chosen, rejected",
        "messages | completion | chosen",
        lambda row, column: is_list_of(row[column], "role"),
        "lists of {role, content}; a prompt column is optional",
    ),
    "strings": Format(
        read_strings,
        "prompt, chosen, rejected",
        "prompt, completion | chosen",
        lambda row, column: isinstance(row[column], str),
        "strings",
    ),
    "queries": Format(
        read_query,
        "query, chosen, rejected",
        "query, reference_response | chosen",
        lambda row, column: isinstance(row[column], str),
        'strings, the responses with "<|endoftext|>" at their end',
    ),
    "comparisons": Format(
        read_comparison,
        "info, choice, summaries",
        "info, choice, summaries",
        lambda row, column: is_list_of(row[column], "text"),
        "a post, 0 or 1, and a list of two {text}",
    ),
    "ranked": RankedFormat(
        read_ranked,
        "prompt | question | instruction, scores | ranks, responses",
        lambda row, column: isinstance(row[column], list),
        "lists of as many strings and numbers",
        score_column="scores",
    ),
    "nectar": RankedFormat(
        read_nectar,
        "prompt, answers",
        lambda row, column: is_list_of(row[column], "answer", "rank"),
        "lists of {answer, rank}",
    ),
    "ultrafeedback": RankedFormat(
        read_ultrafeedback,
        "instruction, completions",
        lambda row, column: is_list_of(row[column], "response", "overall_score"),
        "lists of {response, overall_score}",
    ),
}


def required_columns(format: str, kind: Kind, columns: Collection[str]) -> list[str]:
    """The columns that a format reads, given those that the data set has.

    >>> required_columns("strings", "demonstrations", ["prompt", "chosen", "rejected"])
    ['prompt', 'chosen']
    """
    choices = [choice.split(" | ") for choice in FORMATS[format].columns(kind).split(", ")]
    return [next((name for name in choice if name in columns), " or ".join(choice)) for choice in choices]


def detect_format(columns: Sequence[str], first_rows: Sequence[Row], *, kind: Kind = "pairs", name: str = "") -> str:
    """Recognises a format by its columns and by the values in the first rows.

    Args:
        columns: the data set's columns.
        first_rows: a few rows, of which one with a value is enough.
        kind: what is to be read, preference pairs or demonstrations.
        name: the data set, for the message.

    Returns:
        A key of ``FORMATS``.

    Raises:
        InputError: no format fits; the message has the columns found, what is missing, and the formats known.

    >>> detect_format(["prompt", "chosen", "rejected"], [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    'strings'
    """
    required = {key: required_columns(key, kind, columns) for key in FORMATS}
    missing = {key: [name for name in names if name not in columns] for key, names in required.items()}
    for key, known in FORMATS.items():
        if not missing[key] and any(known.holds(row, required[key][-1]) for row in first_rows):
            return key
    # Reversed, as of two formats with the same columns the plainer one comes later.
    nearest = min(reversed(FORMATS), key=lambda key: (len(missing[key]) - len(required[key]), len(missing[key])))
    hint = f"lacks {', '.join(missing[nearest])}" if missing[nearest] else f"has {FORMATS[nearest].looks} in them"
    formats = "; ".join(f"{key} ({known.columns(kind)})" for key, known in FORMATS.items())
    raise InputError(
        f"{name or 'the data set'}: the format of its columns {_listed(columns)} is not known"
        + f", the nearest, {nearest!r}, {hint}" * (missing[nearest] != required[nearest])
        + f"; known for {kind}: {formats}"
    )


def check_format(key: str, columns: Sequence[str], *, kind: Kind = "pairs", name: str = "") -> str:
    """Returns a format that was named by hand.

    Raises:
        InputError: there is no such format, or the data set lacks one of its columns.
    """
    if key not in FORMATS:
        raise InputError(f"data.format: no format {key!r}; known: auto, {', '.join(FORMATS)}")
    for column in required_columns(key, kind, columns):
        if column not in columns:
            raise InputError(
                f"{name or 'the data set'}: format {key!r} needs a column {column!r}; it has {_listed(columns)}"
            )
    return key


def check_pairing(pairing: Pairing, format: str, *, name: str = "") -> None:
    """Refuses a choice of pairs where there is nothing to choose from.

    Raises:
        InputError: ``pairing`` is set although a row of the format is one pair.
    """
    if pairing != "best_worst" and isinstance(FORMATS[format], Format):
        ranked = ", ".join(key for key, known in FORMATS.items() if isinstance(known, RankedFormat))
        raise InputError(
            f"{name and name + ': '}data.pairing is {pairing!r}, but a row of format {format!r} is one pair; leave it "
            f"out, or name data with several responses to a prompt ({ranked})"
        )


def to_examples(row: Row, format: str) -> list[SFTExample]:
    """Reads a row as one demonstration: of a preference pair the chosen response, of several the best.

    Raises:
        RowError: the row cannot be used.

    >>> to_examples({"prompt": "2 + 2 =", "completion": " 4"}, "strings")
    [SFTExample(prompt='2 + 2 =', completion=' 4')]
    """
    known = FORMATS[format]
    if isinstance(known, Format):
        return [known.read(row, required_columns(format, "demonstrations", row)[-1])]
    ranked = known.read(row)
    if not ranked.responses:
        raise RowError(Reason.EMPTY_RESPONSE)
    return [SFTExample(ranked.prompt, ranked.responses[by_score(*ranked)[0]])]


def to_pairs(
    row: Row,
    format: str,
    *,
    pairing: Pairing = "best_worst",
    weight_column: str | None = None,
    margin_column: str | None = None,
) -> list[PreferenceExample]:
    """Reads a row as preference pairs: one, or as many as ``pairing`` makes of several responses.

    Args:
        row: the row.
        format: a key of ``FORMATS``.
        pairing: which of several responses become pairs, see ``pairing.choose_pairs``.
        weight_column: holds the factor of the row's loss, at least 0.
        margin_column: holds the row's margin. Where it is the ``scores`` of several responses, the margin of a pair is
            the difference of its scores.

    Raises:
        RowError: the row cannot be used.

    >>> to_pairs({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "strings")[0].rejected
    ' 5'
    """
    known = FORMATS[format]
    weight = 1.0 if weight_column is None else number(row[weight_column])
    if weight < 0:
        raise RowError(Reason.MALFORMED)
    if isinstance(known, RankedFormat):
        return _ranked_pairs(known, row, pairing, weight, margin_column)
    margin = 0.0 if margin_column is None else number(row[margin_column])
    chosen, rejected = known.read(row, "chosen"), known.read(row, "rejected")
    if chosen.prompt != rejected.prompt:
        raise RowError(Reason.TWO_PROMPTS)
    chosen_logps, rejected_logps = (_behavior_logps(row, column) for column in BEHAVIOR_COLUMNS)
    if (chosen_logps is None) != (rejected_logps is None):
        raise RowError(Reason.MALFORMED)
    texts = (chosen.prompt, chosen.completion, rejected.completion)
    return [PreferenceExample(*texts, chosen_logps, rejected_logps, weight, margin)]


def read_prompt(row: Row, format: str, kind: Kind) -> str | list[Message]:
    """The prompt of a row, which all that is made of it shares.

    Raises:
        RowError: the row cannot be used.

    >>> read_prompt({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "strings", "pairs")
    '2 + 2 ='
    """
    known = FORMATS[format]
    if isinstance(known, Format):
        return known.read(row, required_columns(format, kind, row)[-1]).prompt
    return known.read(row).prompt


def _behavior_logps(row: Row, column: str) -> float | None:
    if row.get(column) is None:
        return None
    value = number(row[column])
    if value > 1e-3:  # rounding aside
        raise RowError(Reason.MALFORMED)
    return value


def _ranked_pairs(
    known: RankedFormat, row: Row, pairing: Pairing, weight: float, margin_column: str | None
) -> list[PreferenceExample]:
    prompt, responses, scores = known.read(row)
    chosen = choose_pairs(prompt, responses, scores, pairing)
    if not chosen:
        raise RowError(Reason.NO_PREFERENCE)
    if margin_column is None:
        margins = [0.0] * len(chosen)
    elif margin_column == known.score_column:
        margins = [number(scores[better] - scores[worse]) for better, worse in chosen]
    else:
        margins = [number(row[margin_column])] * len(chosen)
    return [
        PreferenceExample(prompt, responses[better], responses[worse], weight=weight, margin=margin)
        for (better, worse), margin in zip(chosen, margins, strict=True)
    ]


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "(none)"
