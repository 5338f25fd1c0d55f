"""Any row: it becomes well-formed examples or is malformed, and what is tokenized of it keeps the rules of a pair."""

import math
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.examples import Pairing, read_prompt, to_examples, to_pairs
from lit_isdpo.data.formats import FORMATS, Kind
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_example, tokenize_pair
from lit_isdpo.types import Message, PreferenceExample, SFTExample
from tests.data.conftest import _make_tokenizer

SETTINGS = settings(suppress_health_check=list(HealthCheck))
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZERS = {
    "plain": _make_tokenizer(),
    "chat": _make_tokenizer(template=TEMPLATE),
    "no BOS": _make_tokenizer(bos=False),
}
ODD = [
    "",
    " ",
    "\n\t",
    "\x00",
    "a\x00b",
    "\ud800",
    "a\udfff",
    "\u05d0\u0301\u202e\u200b",
    "\U0001f469\u200d\U0001f469",
    "<|im_end|>",
    "a<eos>",
    "<eos>",
    "<bos>a",
    "<pad>",
    "<|im_start|>assistant\n",
    "Human: a",
    "\n\nHuman: a\n\nAssistant: b",
    "\n\nHuman: a\n\nAssistant:",
    "\n\nAssistant: b\n\nHuman: a",
    "None",
    "\ufeff",
]
texts = st.sampled_from(ODD) | st.text(st.characters(codec=None), max_size=12)
numbers = (
    st.integers(-3, 3)
    | st.floats()
    | st.sampled_from([10**400, -(10**400), 2**63, 1e308, -1e308, 1e39, True, False, -0.0, 1.0, 5e-324])
)
scalars = st.none() | texts | numbers
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "narrator"]) | scalars,
            "content": texts | scalars,
        }
    ),
    max_size=4,
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "answer", "rank", "response"]) | texts, inner, max_size=3
        )
    ),
    max_leaves=6,
)
dialogue = st.builds(
    lambda turns, end: "".join(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in turns) + end,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    st.sampled_from(["", "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: ", "\n\nHuman: why?"]),
)
EXPECTED: dict[str, st.SearchStrategy[Any]] = {
    "prompt": texts | dialogue | messages,
    "chosen": texts | dialogue | messages,
    "rejected": texts | dialogue | messages,
    "completion": texts | dialogue | messages,
    "messages": messages,
    "query": texts,
    "reference_response": texts,
    "question": texts,
    "instruction": texts,
    "info": st.fixed_dictionaries(
        dict.fromkeys(("subreddit", "title", "post"), texts | scalars), optional={"article": texts | scalars}
    ),
    "summaries": st.lists(st.fixed_dictionaries({"text": texts | scalars}), min_size=1, max_size=3),
    "choice": st.sampled_from([0, 1, True, 0.0, 1.0, 2, -1, math.nan, "1", None, [0]]),
    "responses": st.lists(texts, max_size=4),
    "scores": st.lists(numbers, max_size=4),
    "ranks": st.lists(numbers, max_size=4),
    "answers": st.lists(st.fixed_dictionaries({"answer": texts | scalars, "rank": scalars}), max_size=4),
    "completions": st.lists(st.fixed_dictionaries({"response": texts, "overall_score": scalars}), max_size=4),
}
OTHERS = ("chosen_behavior_logps", "rejected_behavior_logps", "weight", "margin")


def rows(format: str, kind: Kind) -> st.SearchStrategy[dict[str, Any]]:
    """Rows with the format's columns, as a data set that was recognised has them; what they hold may be anything."""

    def of(columns: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        wanted = {name: EXPECTED[name] if name not in OTHERS else numbers for name in columns}
        return st.fixed_dictionaries({name: value | anything for name, value in wanted.items()})

    choices = [choice.split(" | ") for choice in FORMATS[format].columns(kind).split(", ")]
    columns = st.tuples(*map(st.sampled_from, choices)).map(list)
    extra = st.lists(st.sampled_from(["prompt", *OTHERS[:2]]), unique=True)
    return st.builds(lambda a, b: list(dict.fromkeys([*a, *b, *OTHERS[2:]])), columns, extra).flatmap(of)


def is_text(value: object) -> bool:
    return isinstance(value, str) and value == value.encode().decode()


def is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(
            set(turn) - {"prefix"} == {"role", "content"}
            and turn["role"] in get_args(Message.__annotations__["role"])
            and is_text(turn["content"])
            and ("prefix" not in turn or (place == len(value) - 1 and turn["role"] == "assistant"))
            for place, turn in enumerate(value)
        )
    return is_text(value)


def read(function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except RowError:
        return []


@pytest.mark.parametrize("format", FORMATS)
@SETTINGS
@given(data=st.data())
def test_a_row_becomes_well_formed_pairs_or_is_malformed(format: str, data: st.DataObject) -> None:
    row = data.draw(rows(format, "pairs"))
    pairing = data.draw(st.sampled_from(get_args(Pairing))) if FORMATS[format].is_ranked else "best_worst"
    margin = data.draw(st.sampled_from([None, "margin", FORMATS[format].score_column]))
    assume(margin is None or margin in row)
    options = {"weight_column": data.draw(st.sampled_from([None, "weight"])), "margin_column": margin}
    pairs = read(to_pairs, row, format, pairing=pairing, **options)
    for pair in pairs:
        assert isinstance(pair, PreferenceExample)
        assert is_prompt(pair.prompt)
        assert is_text(pair.chosen)
        assert is_text(pair.rejected)
        assert (pair.chosen_behavior_logps is None) == (pair.rejected_behavior_logps is None)
        logps = [value for value in pair[3:5] if value is not None]
        assert all(math.isfinite(value) and value <= 1e-3 for value in logps)
        assert pair.weight >= 0
        check_tokens(pair, data)
    if pairs:
        assert read_prompt(row, format, "pairs") == pairs[0].prompt


def check_tokens(pair: PreferenceExample, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    max_length = data.draw(st.integers(2, 60))
    mode = data.draw(st.sampled_from(["keep_end", "keep_start"]))
    limits = Limits(max_length, data.draw(st.integers(1, max_length - 1)), mode)
    encoder = TextEncoder(tokenizer, data.draw(st.sampled_from(["auto", "never"] + ["always"] * (name == "chat"))))
    try:
        cut = tokenize_pair(pair, encoder, limits)
    except RowError:
        return
    whole = tokenize_pair(
        pair._replace(chosen_behavior_logps=None, rejected_behavior_logps=None),
        encoder,
        Limits(10**6, 10**5, mode),
    )
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert 1 <= len(cut.prompt_ids) <= limits.max_prompt_length
    assert cut.chosen_ids != cut.rejected_ids
    for ids, full in ((cut.chosen_ids, whole.chosen_ids), (cut.rejected_ids, whole.rejected_ids)):
        assert len(ids) >= 1
        assert len(cut.prompt_ids) + len(ids) <= max_length
        assert ids == full[: len(ids)]
        assert full[-1] in ends
        assert len(full) >= 2
    if cut.prompt_ids != whole.prompt_ids:
        kept = cut.prompt_ids[cut.prompt_ids[0] == tokenizer.bos_token_id :]
        start = mode == "keep_start"
        assert (
            kept == (whole.prompt_ids[: len(cut.prompt_ids)][-len(kept) :] if start else whole.prompt_ids[-len(kept) :])
            or not kept
        )
    batch = collate_pairs([cut], [0], pad_token_id=0)
    assert all(bool(field.isfinite().all()) for field in (batch.pair_weights, batch.margins))


@pytest.mark.parametrize("format", FORMATS)
@SETTINGS
@given(data=st.data())
def test_a_row_becomes_well_formed_demonstrations_or_is_malformed(format: str, data: st.DataObject) -> None:
    row = data.draw(rows(format, "demonstrations"))
    for demonstration in read(to_examples, row, format):
        assert isinstance(demonstration, SFTExample)
        assert is_prompt(demonstration.prompt)
        assert is_text(demonstration.completion)
        item = read(tokenize_example, demonstration, TextEncoder(TOKENIZERS["plain"]), Limits(40, 20))
        assert not item or len(item.prompt_ids) + len(item.completion_ids) <= 40


def test_a_megabyte_is_cut() -> None:
    pair = PreferenceExample("p" * 10**6, "\u05d0" * 10**5, "r" * 10**5)
    item = tokenize_pair(pair, TextEncoder(TOKENIZERS["plain"]), Limits(64, 32))
    assert [len(ids) for ids in item[:3]] == [32, 32, 32]
