r"""The formats that rows come in. A new format is one function and one line of ``FORMATS``.

Four of them, as pairs:

    strings      prompt "2 + 2 =", chosen " 4", rejected " 5"
    messages     chosen [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], rejected alike
    transcripts  chosen "\n\nHuman: 2 + 2?\n\nAssistant: 4", rejected alike
    ranked       prompt "2 + 2 =", responses [" 4", " 5", " 22"], scores [9, 3, 1]

A function that reads one column of responses gives a demonstration; a pair is two demonstrations with the same prompt.
A function that reads several scored responses gives them all. The result is only well formed: tokenization asks whether
a response is empty or equals the other one.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from lit_isdpo.data.outcomes import Change
from lit_isdpo.data.row_fields import (
    Row,
    answer_of,
    decoded,
    is_list_of,
    is_transcript,
    item_text,
    joined,
    list_in,
    malformed,
    messages_in,
    number,
    object_in,
    open_dialogue,
    prompt_in,
    text_in,
    transcript_turns,
    turns_in,
)
from lit_isdpo.types import Answer, Message, Prompt, SFTExample

Kind = Literal["pairs", "demonstrations"]


class Scored(NamedTuple):
    """Responses to one prompt; of two, the one with the higher score is the better one."""

    prompt: Prompt
    responses: Sequence[Answer]
    scores: Sequence[float]
    changes: tuple[str, ...] = ()


# A prompt and the response in one column


def read_strings(row: Row, column: str) -> SFTExample:
    """A prompt and a response, used as they stand; the prompt may also be a list of messages.

    >>> read_strings({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "chosen")
    SFTExample(prompt='2 + 2 =', completion=' 4', changes=())
    """
    return SFTExample(prompt_in(row, "prompt"), text_in(row.get(column), column))


def read_messages(row: Row, column: str) -> SFTExample:
    """A conversation that ends in an assistant turn: the last turn is the response, all before it the prompt.

    A ``prompt`` column is used if the conversation does not hold it. A string becomes a user turn if the conversation
    is only the response. A list of messages comes before the conversation; turns at its end that the conversation
    begins with are not repeated, and blanks around their text do not matter.

    >>> read_messages({"prompt": "2 + 2?", "chosen": [{"role": "assistant", "content": "4"}]}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4', changes=())
    """
    *before, last = turns_in(row.get(column), column)
    changes: tuple[str, ...] = ()
    prompt = messages_in(row.get("prompt"))
    if isinstance(prompt, list) and prompt:
        before = joined(turns_in(prompt, "prompt"), before)
    elif isinstance(prompt, str) and prompt.strip():
        if not before:
            before = [Message(role="user", content=text_in(prompt, "prompt"))]
        elif not any(prompt.strip() in turn["content"] for turn in before):
            changes = (Change.OTHER_PROMPT,)
    if last["role"] != "assistant":
        raise malformed(f"the last turn of {column} has another role than assistant")
    if not before:
        raise malformed(f"no prompt stands before the response, neither in {column} nor in prompt")
    return SFTExample(before, answer_of(last), changes)


def read_transcript(row: Row, column: str) -> SFTExample:
    r"""A whole dialogue in one string, as in Anthropic/hh-rlhf; the last assistant turn is the response.

    >>> read_transcript({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4', changes=())
    """
    *before, last = transcript_turns(text_in(row.get(column), column), column)
    return SFTExample(before, last["content"].removeprefix(" "))


def read_dialogue(row: Row, column: str) -> SFTExample:
    r"""A dialogue up to "\n\nAssistant:", and the answer of the assistant, as in Dahoas/full-hh-rlhf.

    >>> read_dialogue({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4"}, "chosen")
    SFTExample(prompt=[{'role': 'user', 'content': '2 + 2?'}], completion='4', changes=())
    """
    before, opening = open_dialogue(row.get("prompt"))
    text = opening + text_in(row.get(column), column)
    return SFTExample(before, text if before[-1].get("prefix") else text.removeprefix(" "))


def read_query(row: Row, column: str) -> SFTExample:
    """A TL;DR query and a response, as in vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144.

    Its responses were written for GPT-2's tokenizer and end in that one's terminator, which is no text. It puts query
    and response together without the query's outer blanks (column ``query_chosen``), and so does this.

    >>> read_query({"query": "POST: ... TL;DR:", "chosen": " Short.<|endoftext|>"}, "chosen")
    SFTExample(prompt='POST: ... TL;DR:', completion=' Short.', changes=())
    """
    query, response = text_in(row.get("query"), "query"), text_in(row.get(column), column)
    return SFTExample(query.strip(), response.removesuffix("<|endoftext|>"))


def read_comparison(row: Row, column: str) -> SFTExample:
    """A judged pair of summaries with the post that they are of, as in openai/summarize_from_feedback (comparisons).

    The prompts are those of arXiv 2009.01325: Reddit posts with their subreddit and title, and articles, which have
    neither (and here no line break behind "TL;DR:").

    >>> info = {"subreddit": "AskReddit", "title": "Why?", "post": "I wonder.", "article": None}
    >>> summaries = [{"text": " No.", "policy": "sup1"}, {"text": " He wonders.", "policy": "ref"}]
    >>> read_comparison({"info": info, "summaries": summaries, "choice": 1}, "chosen").completion
    ' He wonders.'
    """
    info, summaries = object_in(row.get("info"), "info"), list_in(row.get("summaries"), "summaries")
    if len(summaries) != 2:
        raise malformed("summaries has another number of items than 2")
    choice = number(int(row["choice"]) if row.get("choice") in (True, False) else row.get("choice"), "choice")
    if choice not in (0, 1):
        raise malformed("choice is neither 0 nor 1")
    if info.get("article") is not None:
        prompt = f"Article:\n{text_in(info['article'], 'info.article')}\n\nTL;DR:"
    else:
        subreddit, title, post = (text_in(info.get(name), f"info.{name}") for name in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    place = int(1 - choice if column == "rejected" else choice)
    return SFTExample(prompt, item_text(summaries, place, "text", "summaries"))


# A prompt and several responses with their scores


def read_ranked(row: Row) -> Scored:
    """Responses with scores (higher is better) or ranks (1 is best).

    A ``prompt`` is used as it stands or is a list of messages; a ``question`` or an ``instruction`` is a user turn.

    >>> read_ranked({"question": "2 + 2?", "responses": ["4", "5"], "ranks": [1, 2]})
    Scored(prompt=[{'role': 'user', 'content': '2 + 2?'}], responses=['4', '5'], scores=[-1.0, -2.0], changes=())
    """
    if "prompt" in row:
        prompt = prompt_in(row, "prompt")
    else:
        column = "question" if "question" in row else "instruction"
        prompt = [Message(role="user", content=text_in(row.get(column), column))]
    sign, column = (1, "scores") if "scores" in row else (-1, "ranks")
    marks, responses = list_in(row.get(column), column), list_in(row.get("responses"), "responses")
    if len(marks) != len(responses):
        raise malformed(f"{column} has another number of items than responses")
    return Scored(
        prompt,
        [text_in(response, f"responses[{i}]") for i, response in enumerate(responses)],
        [sign * number(mark, f"{column}[{i}]") for i, mark in enumerate(marks)],
    )


def read_nectar(row: Row) -> Scored:
    r"""A dialogue up to "\n\nAssistant: " and answers with ranks, as in berkeley-nest/Nectar.

    >>> answers = [{"answer": "4", "model": "a", "rank": 1.0}, {"answer": "5", "model": "b", "rank": 2.0}]
    >>> read_nectar({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ", "answers": answers}).scores
    [-1.0, -2.0]
    """
    before, _ = open_dialogue(row.get("prompt"))
    texts, ranks = _scored_items(row, "answers", "answer", "rank")
    return Scored(before, texts, [-rank for rank in ranks])


def read_ultrafeedback(row: Row) -> Scored:
    """An instruction and completions with overall scores, as in openbmb/UltraFeedback.

    >>> completions = [{"response": "4", "overall_score": 9.0}, {"response": "5", "overall_score": 1.0}]
    >>> read_ultrafeedback({"instruction": "2 + 2?", "completions": completions}).scores
    [9.0, 1.0]
    """
    prompt = [Message(role="user", content=text_in(row.get("instruction"), "instruction"))]
    return Scored(prompt, *_scored_items(row, "completions", "response", "overall_score"))


def _scored_items(row: Row, column: str, text: str, mark: str) -> tuple[list[str], list[float]]:
    items = list_in(row.get(column), column)
    texts = [item_text(items, place, text, column) for place in range(len(items))]
    return texts, [number(item.get(mark), f"{column}[{place}].{mark}") for place, item in enumerate(items)]


class Format(NamedTuple):
    """A line of ``FORMATS``.

    Columns are listed as ``"prompt, completion | chosen"``: a prompt, and a completion or else a chosen response.

    Attributes:
        read: row and column of a response -> demonstration; of a ranked format: row -> its responses and scores.
        pairs: the columns of a preference pair, whose responses are read as ``chosen`` and ``rejected``.
        demonstrations: the columns of a demonstration; its response is read from the last one.
        holds: whether a row with these columns looks like this format's, given the last of them.
        looks: the format in words, for messages.
        is_ranked: whether a row holds several scored responses.
        score_column: the column of nothing but the scores, which may be named as the margin.
    """

    read: Callable[..., SFTExample | Scored]
    pairs: str
    demonstrations: str
    holds: Callable[[Row, str], bool]
    looks: str
    is_ranked: bool = False
    score_column: str | None = None

    def columns(self, kind: Kind) -> str:
        """The columns of a kind of row, as a list in words."""
        return self.pairs if kind == "pairs" else self.demonstrations


def _is_text(row: Row, column: str) -> bool:
    return isinstance(row.get(column), str)


def _lists(*keys: str) -> Callable[[Row, str], bool]:
    return lambda row, column: is_list_of(row.get(column), *keys)


_JUDGED = "info, choice, summaries"
_SEVERAL = "prompt | question | instruction, scores | ranks, responses"
FORMATS: dict[str, Format] = {  # the first that fits is taken
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
        lambda row, column: is_transcript(row.get("prompt")) and _is_text(row, column),
        r'strings, the prompt such as "\n\nHuman: ...\n\nAssistant:"',
    ),
    "messages": Format(
        read_messages,
        "chosen, rejected",
        "messages | completion | chosen",
        _lists("role"),
        "lists of {role, content}; a prompt column is optional",
    ),
    "strings": Format(read_strings, "prompt, chosen, rejected", "prompt, completion | chosen", _is_text, "strings"),
    "queries": Format(
        read_query,
        "query, chosen, rejected",
        "query, reference_response | chosen",
        _is_text,
        'strings, the responses with "<|endoftext|>" at their end',
    ),
    "comparisons": Format(
        read_comparison, _JUDGED, _JUDGED, _lists("text"), "a post, 0 or 1, and a list of two {text}"
    ),
    "ranked": Format(
        read_ranked,
        _SEVERAL,
        _SEVERAL,
        lambda row, column: isinstance(decoded(row.get(column)), list),
        "lists of as many strings and numbers",
        is_ranked=True,
        score_column="scores",
    ),
    "nectar": Format(
        read_nectar,
        "prompt, answers",
        "prompt, answers",
        _lists("answer", "rank"),
        "lists of {answer, rank}",
        is_ranked=True,
    ),
    "ultrafeedback": Format(
        read_ultrafeedback,
        "instruction, completions",
        "instruction, completions",
        _lists("response", "overall_score"),
        "lists of {response, overall_score}",
        is_ranked=True,
    ),
}
