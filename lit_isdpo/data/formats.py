r"""The formats that rows come in, how they are recognised, and what is made of a row of each.

It is longer than most modules because of the table of formats and of what a row may hold besides its format's columns.
A new format is one function in ``readers.py`` and one line of ``FORMATS``. Four of them, as pairs:

    strings      prompt "2 + 2 =", chosen " 4", rejected " 5"
    messages     chosen [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], rejected alike
    transcripts  chosen "\n\nHuman: 2 + 2?\n\nAssistant: 4", rejected alike
    ranked       prompt "2 + 2 =", responses [" 4", " 5", " 22"], scores [9, 3, 1]
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from lit_isdpo.data.pairing import Pairing, by_score, choose_pairs
from lit_isdpo.data.readers import (
    Reader,
    Reason,
    Row,
    RowError,
    ScoredReader,
    decoded,
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
    read_system,
    read_tools,
    read_transcript,
    read_ultrafeedback,
)
from lit_isdpo.types import Answer, Conversation, InputError, Message, PreferenceExample, Prompt, SFTExample

Kind = Literal["pairs", "demonstrations"]
BEHAVIOR_COLUMNS = ("chosen_behavior_logps", "rejected_behavior_logps")
OF_ANY_FORMAT = ("prompt", "system", "tools", *BEHAVIOR_COLUMNS)  # columns that are read where they are there
PROMPT_REMOVED = "prompt removed from responses that repeat it"  # changes
PROMPT_REPEATED = "responses that begin with their prompt"
_NO_CHANCE = 20  # characters; responses may begin with a shorter prompt by chance ("Hi" and "Hi there")


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
        lambda row, column: is_transcript(row.get(column)),
        r'strings such as "\n\nHuman: ...\n\nAssistant: ..."',
    ),
    "dialogues": Format(
        read_dialogue,
        "prompt, chosen, rejected",
        "prompt, completion | chosen",
        lambda row, column: is_transcript(row.get("prompt")) and isinstance(row.get(column), str),
        r'strings, the prompt such as "\n\nHuman: ...\n\nAssistant:"',
    ),
    "messages": Format(
        read_messages,
        "chosen, rejected",
        "messages | completion | chosen",
        lambda row, column: is_list_of(row.get(column), "role"),
        "lists of {role, content}; a prompt column is optional",
    ),
    "strings": Format(
        read_strings,
        "prompt, chosen, rejected",
        "prompt, completion | chosen",
        lambda row, column: isinstance(row.get(column), str),
        "strings",
    ),
    "queries": Format(
        read_query,
        "query, chosen, rejected",
        "query, reference_response | chosen",
        lambda row, column: isinstance(row.get(column), str),
        'strings, the responses with "<|endoftext|>" at their end',
    ),
    "comparisons": Format(
        read_comparison,
        "info, choice, summaries",
        "info, choice, summaries",
        lambda row, column: is_list_of(row.get(column), "text"),
        "a post, 0 or 1, and a list of two {text}",
    ),
    "ranked": RankedFormat(
        read_ranked,
        "prompt | question | instruction, scores | ranks, responses",
        lambda row, column: isinstance(decoded(row.get(column)), list),
        "lists of as many strings and numbers",
        score_column="scores",
    ),
    "nectar": RankedFormat(
        read_nectar,
        "prompt, answers",
        lambda row, column: is_list_of(row.get(column), "answer", "rank"),
        "lists of {answer, rank}",
    ),
    "ultrafeedback": RankedFormat(
        read_ultrafeedback,
        "instruction, completions",
        lambda row, column: is_list_of(row.get(column), "response", "overall_score"),
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


def detect_format(columns: Sequence[str], rows: Iterable[Row], *, kind: Kind = "pairs", name: str = "") -> str:
    """Recognises a format by the columns and by the values of the first row that has some.

    Args:
        columns: the data set's columns.
        rows: its first rows.
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
    possible = [key for key in FORMATS if not missing[key]]
    for row in rows:
        for key in possible:
            if FORMATS[key].holds(row, required[key][-1]):
                return key
    # Reversed, as of two formats with the same columns the plainer one comes later.
    nearest = min(reversed(FORMATS), key=lambda key: (len(missing[key]) - len(required[key]), len(missing[key])))
    if missing[nearest]:
        hint = f"lacks {', '.join(missing[nearest])}"
    else:
        hint = f"has {FORMATS[nearest].looks} in them, and no row at the beginning has"
    formats = "; ".join(f"{key} ({known.columns(kind)})" for key, known in FORMATS.items())
    raise InputError(
        f"{name or 'the data set'}: the format of its columns {_listed(columns)} is not known"
        + f", the nearest, {nearest!r}, {hint}" * (missing[nearest] != required[nearest])
        + f"; known for {kind}: {formats}; if yours have other names, map them with data.columns, as in "
        + "{prompt: question}"
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
                f"{name or 'the data set'}: format {key!r} needs a column {column!r}; it has {_listed(columns)}; "
                "data.columns maps names"
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
    [SFTExample(prompt='2 + 2 =', completion=' 4', changes=())]
    """
    known = FORMATS[format]
    if isinstance(known, Format):
        prompt, response, changes = known.read(row, required_columns(format, "demonstrations", row)[-1])
    else:
        ranked = known.read(row)
        if not ranked.responses:
            raise RowError(Reason.EMPTY_RESPONSE)
        prompt, response, changes = ranked.prompt, ranked.responses[by_score(*ranked)[0]], ()
    (response,), repeated = _without_prompt(prompt, [response])
    return [SFTExample(_in_context(prompt, row), response, changes + repeated)]


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
    weight = 1.0 if weight_column is None else number(row.get(weight_column), weight_column)
    if weight < 0:
        raise RowError(Reason.MALFORMED, f"{weight_column} is below 0")
    if isinstance(known, RankedFormat):
        return _ranked_pairs(known, row, pairing, weight, margin_column)
    margin = 0.0 if margin_column is None else number(row.get(margin_column), margin_column)
    chosen, rejected = known.read(row, "chosen"), known.read(row, "rejected")
    if chosen.prompt != rejected.prompt:
        raise RowError(Reason.TWO_PROMPTS)
    logps = [_behavior_logps(row, column) for column in BEHAVIOR_COLUMNS]
    if (logps[0] is None) != (logps[1] is None):
        lacking, there = BEHAVIOR_COLUMNS if logps[0] is None else BEHAVIOR_COLUMNS[::-1]
        raise RowError(Reason.MALFORMED, f"{lacking} is missing and {there} is not")
    responses, repeated = _without_prompt(chosen.prompt, [chosen.completion, rejected.completion])
    changes = tuple(dict.fromkeys(chosen.changes + rejected.changes + repeated))
    prompt, (better, worse) = _in_context(chosen.prompt, row), responses
    return [PreferenceExample(prompt, better, worse, logps[0], logps[1], weight, margin, changes)]


def read_prompt(row: Row, format: str, kind: Kind) -> Prompt:
    """The prompt of a row, which all that is made of it shares.

    Raises:
        RowError: the row cannot be used.

    >>> read_prompt({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "strings", "pairs")
    '2 + 2 ='
    """
    known = FORMATS[format]
    if isinstance(known, Format):
        return _in_context(known.read(row, required_columns(format, kind, row)[-1]).prompt, row)
    return _in_context(known.read(row).prompt, row)


def _in_context(prompt: Prompt, row: Row) -> Prompt:
    """A prompt with what the columns ``system`` and ``tools`` say; a text is a user's turn in data that has them.

    Raises:
        RowError: the conversation begins with other words of the system.
    """
    system, tools = read_system(row), read_tools(row)
    if not {"system", "tools"} & row.keys():
        return prompt
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if system.strip():
        if turns[0]["role"] not in ("system", "developer"):
            turns.insert(0, Message(role="system", content=system))
        elif turns[0]["content"].strip() != system.strip():
            raise RowError(Reason.MALFORMED, "system is not what the conversation's system turn says")
    return Conversation(turns, tools)


def _without_prompt(prompt: Prompt, responses: Sequence[Answer]) -> tuple[Sequence[Answer], tuple[str, ...]]:
    """Responses without the prompt, if all of them begin with it, and what was changed in words.

    Some data sets hold prompt and response in one text beside the prompt, which would then be there twice.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        return responses, ()
    texts = [response for response in responses if isinstance(response, str) and response.startswith(prompt)]
    if len(texts) < len(responses):
        return responses, ()
    if len(prompt.strip()) < _NO_CHANCE:
        return responses, (PROMPT_REPEATED,)
    return [text[len(prompt) :] for text in texts], (PROMPT_REMOVED,)


def _behavior_logps(row: Row, column: str) -> float | None:
    if row.get(column) in (None, ""):
        return None
    value = number(row[column], column)
    if value > 1e-3:  # rounding aside
        raise RowError(Reason.MALFORMED, f"{column} is above 0, which no log-probability is")
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
        margins = [number(scores[better] - scores[worse], f"the margin of {margin_column}") for better, worse in chosen]
    else:
        margins = [number(row.get(margin_column), margin_column)] * len(chosen)
    context = _in_context(prompt, row)
    pairs = []
    for places, margin in zip(chosen, margins, strict=True):
        (better, worse), changes = _without_prompt(prompt, [responses[place] for place in places])
        pairs.append(PreferenceExample(context, better, worse, weight=weight, margin=margin, changes=changes))
    return pairs


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "(none)"
