"""Recognises the format of rows, and makes preference pairs and demonstrations of them."""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from typing import Literal, cast

from lit_isdpo.data.formats import FORMATS, Kind, Scored
from lit_isdpo.data.outcomes import Change, Reason, RowError
from lit_isdpo.data.row_fields import Row, number, text_in, tools_in
from lit_isdpo.types import Answer, Conversation, InputError, Message, PreferenceExample, Prompt, SFTExample

Pairing = Literal["best_worst", "best_random", "all"]
BEHAVIOR_COLUMNS = ("chosen_behavior_logps", "rejected_behavior_logps")
OF_ANY_FORMAT = ("prompt", "system", "tools", *BEHAVIOR_COLUMNS)  # these columns are read if they exist
_NO_CHANCE = 20  # characters; responses may begin with a shorter prompt by chance ("Hi" and "Hi there")


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
        kind: preference pairs or demonstrations.
        name: the data set, for the message.

    Returns:
        A key of ``FORMATS``.

    Raises:
        InputError: no format fits; the message names the columns, the missing ones and the known formats.

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
    near = f", the nearest, {nearest!r}, {hint}" if missing[nearest] != required[nearest] else ""
    formats = "; ".join(f"{key} ({known.columns(kind)})" for key, known in FORMATS.items())
    raise InputError(
        f"{name or 'the data set'}: the format of its columns {', '.join(columns) or '(none)'} is not known{near}; "
        f"known for {kind}: {formats}; if yours have other names, map them with data.columns, as in "
        "{prompt: question}"
    )


def check_format(key: str, columns: Sequence[str], *, kind: Kind = "pairs", name: str = "") -> str:
    """Returns a format that was named by hand.

    Raises:
        InputError: there is no such format, or the data set lacks one of its columns.
    """
    if key not in FORMATS:
        raise InputError(f"data.format is {key!r}; known: auto, {', '.join(FORMATS)}")
    for column in required_columns(key, kind, columns):
        if column not in columns:
            raise InputError(
                f"{name or 'the data set'}: format {key!r} needs a column {column!r}; it has "
                f"{', '.join(columns) or '(none)'}; data.columns maps names"
            )
    return key


def check_pairing(pairing: Pairing, format: str, *, name: str = "") -> None:
    """Refuses a choice of pairs for rows that are one pair.

    Raises:
        InputError: ``pairing`` is set although a row of the format is one pair.
    """
    if pairing != "best_worst" and not FORMATS[format].is_ranked:
        ranked = ", ".join(key for key, known in FORMATS.items() if known.is_ranked)
        raise InputError(
            f"{name and name + ': '}data.pairing is {pairing!r}, but a row of format {format!r} is one pair; leave it "
            f"out, or name data with several responses to a prompt ({ranked})"
        )


def to_examples(row: Row, format: str) -> list[SFTExample]:
    """Reads a row as one demonstration: the chosen response of a preference pair, the best one of several.

    Raises:
        RowError: the row cannot be used.

    >>> to_examples({"prompt": "2 + 2 =", "completion": " 4"}, "strings")
    [SFTExample(prompt='2 + 2 =', completion=' 4', changes=())]
    """
    found = _read(row, format, "demonstrations")
    if not found.responses:
        raise RowError(Reason.EMPTY_RESPONSE)
    best = by_score(found.prompt, found.responses, found.scores)[0] if len(found.responses) > 1 else 0
    (response,), repeated = _without_prompt(found.prompt, [found.responses[best]])
    return [SFTExample(_in_context(found.prompt, row), response, found.changes + repeated)]


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
        pairing: which of several responses become pairs, see :func:`choose_pairs`.
        weight_column: holds the factor of the row's loss, at least 0.
        margin_column: holds the row's margin. If it is the ``scores`` of several responses, the margin of a pair is the
            difference of its scores.

    Raises:
        RowError: the row cannot be used.

    >>> to_pairs({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "strings")[0].rejected
    ' 5'
    """
    known = FORMATS[format]
    weight = 1.0 if weight_column is None else number(row.get(weight_column), weight_column)
    if weight < 0:
        raise RowError(Reason.MALFORMED, f"{weight_column} is below 0")
    found = _read(row, format, "pairs")
    scores = found.scores
    chosen = choose_pairs(found.prompt, found.responses, scores, pairing) if known.is_ranked else [(0, 1)]
    if not chosen:
        raise RowError(Reason.NO_PREFERENCE)
    logps = (None, None) if known.is_ranked else _behavior_logps(row)
    context = _in_context(found.prompt, row)
    pairs = []
    for better, worse in chosen:
        margin = 0.0
        if margin_column is not None and margin_column == known.score_column:
            margin = number(scores[better] - scores[worse], f"the margin of {margin_column}")
        elif margin_column is not None:
            margin = number(row.get(margin_column), margin_column)
        responses, repeated = _without_prompt(found.prompt, [found.responses[better], found.responses[worse]])
        changes = found.changes + repeated
        pairs.append(PreferenceExample(context, responses[0], responses[1], *logps, weight, margin, changes))
    return pairs


def read_prompt(row: Row, format: str, kind: Kind) -> Prompt:
    """The prompt of a row; everything that is made of the row shares it.

    Raises:
        RowError: the row cannot be used.

    >>> read_prompt({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "strings", "pairs")
    '2 + 2 ='
    """
    return _in_context(_read(row, format, kind).prompt, row)


def _read(row: Row, format: str, kind: Kind) -> Scored:
    """The responses of a row; of a pair, the scores are 1 and 0."""
    known = FORMATS[format]
    columns: tuple[str, ...] = ("chosen", "rejected")
    if known.is_ranked:
        return cast(Scored, known.read(row))
    if kind == "demonstrations":
        columns = (required_columns(format, kind, row)[-1],)
    prompts, responses, changes = zip(*(known.read(row, column) for column in columns), strict=True)
    if prompts[-1] != prompts[0]:
        raise RowError(Reason.TWO_PROMPTS)
    return Scored(prompts[0], responses, (1.0, 0.0), tuple(dict.fromkeys(sum(changes, ()))))


def _in_context(prompt: Prompt, row: Row) -> Prompt:
    """A prompt with the columns ``system`` and ``tools``; in data that has them, a text is a user's turn.

    Raises:
        RowError: the conversation begins with other words of the system.
    """
    system, tools = "" if row.get("system") is None else text_in(row["system"], "system"), tools_in(row)
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
    """Responses without the prompt, if all of them begin with it, and the change.

    Some data sets hold prompt and response in one text beside the prompt, which would then be there twice.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        return responses, ()
    texts = [response for response in responses if isinstance(response, str) and response.startswith(prompt)]
    if len(texts) < len(responses):
        return responses, ()
    if len(prompt.strip()) < _NO_CHANCE:
        return responses, (Change.PROMPT_REPEATED,)
    return [text[len(prompt) :] for text in texts], (Change.PROMPT_REMOVED,)


def _behavior_logps(row: Row) -> tuple[float | None, float | None]:
    logps = []
    for column in BEHAVIOR_COLUMNS:
        value = None if row.get(column) in (None, "") else number(row[column], column)
        if value is not None and value > 1e-3:  # rounding aside
            raise RowError(Reason.MALFORMED, f"{column} is above 0, which no log-probability is")
        logps.append(value)
    if (logps[0] is None) != (logps[1] is None):
        lacking, there = BEHAVIOR_COLUMNS if logps[0] is None else BEHAVIOR_COLUMNS[::-1]
        raise RowError(Reason.MALFORMED, f"{lacking} is missing and {there} is not")
    return logps[0], logps[1]


def by_score(prompt: Prompt, responses: Sequence[Answer], scores: Sequence[float]) -> list[int]:
    """Indices of the responses, the best first.

    Responses with the same score are ordered by a hash of their text and the prompt, not by their place in the row: a
    data set may list its models by name, so that the place is the model's.

    >>> by_score("2 + 2 =", [" 5", " 4", " 22"], [1.0, 9.0, 3.0])
    [1, 2, 0]
    """
    return sorted(range(len(responses)), key=lambda index: (-scores[index], _digest(prompt, responses[index])))


def choose_pairs(
    prompt: Prompt, responses: Sequence[Answer], scores: Sequence[float], pairing: Pairing
) -> list[tuple[int, int]]:
    """Chooses pairs, as indices of (better, worse); responses with the same score make none.

    Args:
        prompt: the prompt of the responses.
        responses: their texts.
        scores: one each, higher is better.
        pairing: ``best_worst``; ``best_random``: the best and a worse one, picked by a hash of the texts, so that it is
            the same one in every run and wherever the row stands; ``all``: every pair with different scores.

    >>> choose_pairs("2 + 2 =", [" 5", " 4", " 22"], [1.0, 9.0, 3.0], "best_worst")
    [(1, 0)]
    >>> choose_pairs("2 + 2 =", [" 5", " 4", " 22"], [1.0, 9.0, 3.0], "all")
    [(1, 2), (1, 0), (2, 0)]
    """
    order = by_score(prompt, responses, scores)
    if pairing == "all":
        return [(better, worse) for better, worse in combinations(order, 2) if scores[better] > scores[worse]]
    worse = [index for index in order if scores[index] < scores[order[0]]]
    if not worse:
        return []
    if pairing == "best_worst":
        return [(order[0], worse[-1])]
    return [(order[0], min(worse, key=lambda index: _digest(responses[order[0]], responses[index])))]


def _digest(*content: object) -> bytes:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
