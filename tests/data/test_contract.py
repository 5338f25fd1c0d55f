"""Every word that a row gives is trained on, or the row is counted and its fault named."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_isdpo.data.examples import to_examples, to_pairs
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.splits import Splits
from lit_isdpo.types import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (  # has places for all that a message may hold
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ ' id ' + m.tool_call_id if m.tool_call_id else '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
OPENING = (  # opens the thought, and closes it before the content
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SWITCHED = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is not false %}<think>\n{% endif %}",
)
NO_TOOL_TURNS = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('system', 'user', 'assistant') %}"
)
BEHIND = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ ' ok' if m.role == 'assistant' }}")
LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {"properties": {"item": {}}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"item": 'a "lamp"'}}}


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def pair(prompt: Any, chosen: Any = "yes", rejected: Any = "no", **columns: Any) -> dict[str, Any]:
    """A row whose responses are messages, where they are not given as something else."""
    both = [[turn("assistant", text)] if isinstance(text, str) else text for text in (chosen, rejected)]
    return {"prompt": prompt, "chosen": both[0], "rejected": both[1], **columns}


Read = Callable[..., tuple[list[str], Splits]]


@pytest.fixture
def read(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Read:
    """Reads rows with a chat template: the text of the first kept row's prompt and responses, and all splits."""

    def read(rows: Any, template: str | None = None, cls: type = PreferenceDataModule, **options: Any) -> Any:
        data = cls(**{"val": rows, "max_length": 4000, "max_dropped_fraction": 1.0} | options)
        data.tokenizer = make_tokenizer(template=template)
        data.setup("validate")
        item = data.splits.rows["val"][0][1]
        parts = [getattr(item, name) for name in item._fields if name.endswith("_ids")]
        texts = [data.tokenizer.decode(ids, skip_special_tokens=False) for ids in parts]
        return texts, data.splits

    return read


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# Types


@pytest.mark.parametrize("text", ["2024-01-10", '"quoted"', "null", "1e3", "[1]", '{"a": 1}', "true", "12:30:00"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_text_stays_the_text_that_it_is(read: Read, tmp_path: Path, text: str, suffix: str) -> None:
    rows = [{"prompt": f"{text} {i}", "chosen": text, "rejected": f"{text}!", "other": i or text} for i in range(3)]
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(file, rows)
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        with file.open("w", newline="") as content:
            writer = csv.DictWriter(content, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    texts, splits = read(str(file))
    assert texts == [f"<bos>{text} 0", f"{text}<eos>", f"{text}!<eos>"]
    assert (splits.counts["val"][0].kept, splits.counts["val"][0].dropped) == (3, {})


def test_nested_text_stays_the_text_that_it_is(read: Read, tmp_path: Path) -> None:
    summaries = [{"text": '"a"'}, {"text": "2024-01-10"}]
    posts = ['"quoted"', 5, "null"]
    rows = [
        {"info": {"subreddit": "r", "title": "t", "post": post}, "summaries": summaries, "choice": 1} for post in posts
    ]
    texts, splits = read(write(tmp_path / "a.jsonl", rows))
    assert texts == ['<bos>SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: "quoted"\n\nTL;DR:', "2024-01-10<eos>", '"a"<eos>']
    assert splits.counts["val"][0].dropped == {"malformed row: info.post is a number": 1}


def test_a_column_may_come_late_and_rows_may_differ(read: Read, tmp_path: Path) -> None:
    first = [{"prompt": None, "chosen": None, "rejected": None}] * 20
    rows = [{"prompt": f"p{i}", "chosen": "a" * 90, "rejected": "b"} for i in range(200)]
    late = [{"prompt": "p", "chosen": "c", "rejected": "d", "note": {"a": [1]}}, pair([turn("user", "u")])]
    texts, splits = read(write(tmp_path / "a.jsonl", first + rows + late))
    assert texts[0] == "<bos>p0"
    (counts,) = splits.counts["val"]
    assert (counts.format, counts.read, counts.kept) == ("strings", 222, 201)
    assert counts.dropped == {"malformed row: prompt is missing": 20, "malformed row: chosen is a list": 1}


def test_tables_with_and_without_a_column_go_together(read: Read, tmp_path: Path) -> None:
    for number, more in enumerate(({}, {"note": "x"}, {"weight": 2.0})):
        datasets.Dataset.from_list([{"prompt": f"p{number}", "chosen": "a", "rejected": "b", **more}]).to_parquet(
            tmp_path / f"{number}.parquet"
        )
    _, splits = read(str(tmp_path))
    assert splits.counts["val"][0].kept == 3


# Messages


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", ["object", "text"])
def test_calls_and_tools_reach_the_template(
    read: Read, tmp_path: Path, kind: str, content: str | None, arguments: str
) -> None:
    function = (
        CALL["function"] if arguments == "object" else {"name": "look_up", "arguments": '{"item": "a \\"lamp\\""}'}
    )
    prompt = [
        turn("user", "How many?"),
        turn("assistant", content, tool_calls=[{**CALL, "function": function}]),
        turn("tool", "3 left", name="look_up", tool_call_id="c1"),
    ]
    other = {**CALL, "function": {"name": "wait", "arguments": {"seconds": 3}}}
    rows = [pair(prompt, tools=[LOOK_UP]), pair([turn("user", "Why?"), turn("assistant", "", tool_calls=[other])])]
    if arguments == "text":
        rows = rows[:1]
    file = str(tmp_path / f"a.{kind}")
    if kind == "jsonl":
        write(Path(file), rows)
    else:  # every object of a typed column has the keys of all
        encoded = [row | {"tools": json.dumps(row["tools"]) if "tools" in row else None} for row in rows]
        datasets.Dataset.from_list(encoded).to_parquet(file)
    texts, splits = read(file, TOOLS)
    assert splits.counts["val"][0].dropped == {}
    assert texts[0] == (
        f"<|im_start|>system\n{json.dumps(LOOK_UP)}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        f"<|im_start|>assistant\n<call>{json.dumps(CALL['function'])}</call><|im_end|>\n"
        "<|im_start|>tool look_up\n3 left id c1<|im_end|>\n<|im_start|>assistant\n"
    )
    assert splits.counts["val"][0].changed == {}
    assert splits.prompt("val", 0).tools == [LOOK_UP]  # type: ignore[union-attr]


def test_tools_and_turns_that_a_template_leaves_out_are_counted(read: Read, tmp_path: Path) -> None:
    only_first = CHATML.replace("in messages %}", "in messages if m.role != 'user' or m == messages[0] %}")
    repeated = [turn("user", "say b"), turn("assistant", "x"), turn("user", "b")]
    for row, template in ((pair([turn("user", "u")], tools=[LOOK_UP]), CHATML), (pair(repeated), only_first)):
        _, splits = read(write(tmp_path / "a.jsonl", [row]), template)
        assert splits.counts["val"][0].changed == {"prompt not rendered as given": 1}
        assert read(write(tmp_path / "a.jsonl", [row]), TOOLS)[1].counts["val"][0].changed == {}


def test_tools_stay_where_the_first_messages_are_left_out(read: Read, tmp_path: Path) -> None:
    prompt = [turn("user", "a" * 99), turn("assistant", "b"), turn("user", "c")]
    file = write(tmp_path / "a.jsonl", [pair(prompt, tools=[{"name": "look_up"}])])
    texts, splits = read(file, TOOLS, max_prompt_length=90)
    assert splits.counts["val"][0].changed == {"first messages left out": 1}
    assert texts[0].startswith('<|im_start|>system\n{"name": "look_up"}<|im_end|>\n<|im_start|>user\nc<|im_end|>')


def test_a_response_may_think_and_call(read: Read, tmp_path: Path) -> None:
    chosen = [turn("assistant", "1", reasoning_content="0 + 1")]
    rejected = [turn("assistant", None, tool_calls=[CALL])]
    file = write(tmp_path / "a.jsonl", [pair([turn("user", "0 + 1?")], chosen, rejected)] * 2)
    texts, _ = read(file, TOOLS)
    call = json.dumps(CALL["function"])
    assert texts[1:] == ["<think>0 + 1</think>1<|im_end|>", f"<call>{call}</call><|im_end|>"]
    for template in (CHATML, None):
        with pytest.raises(InputError, match="none of the 2 rows can be used: 2 x response not rendered as given"):
            read(file, template)


def test_the_same_answer_after_two_thoughts_is_a_pair(read: Read, tmp_path: Path) -> None:
    chosen, rejected = ([turn("assistant", "1", reasoning_content=thought)] for thought in ("good", "bad"))
    texts, _ = read(write(tmp_path / "a.jsonl", [pair([turn("user", "?")], chosen, rejected)]), TOOLS)
    assert texts[1:] == ["<think>good</think>1<|im_end|>", "<think>bad</think>1<|im_end|>"]


def test_a_typed_table_may_have_any_column(read: Read) -> None:
    rows = datasets.Dataset.from_list([{"line": "p"}])
    with pytest.raises(InputError, match="the format of its columns line is not known"):
        read(rows)


def test_other_roles_are_the_templates_business(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("developer", "Be kind."), turn("user", "Hi")])])
    assert read(file, CHATML)[0][0].startswith("<|im_start|>developer\nBe kind.<|im_end|>\n")
    texts, splits = read(file, NO_TOOL_TURNS)
    assert "kind" not in texts[0]
    assert splits.counts["val"][0].changed == {"prompt not rendered as given": 1}
    assert read(file)[0][0] == "<bos>Be kind.\n\nHuman: Hi\n\nAssistant:"


# Templates that write other words than the row's


@pytest.mark.parametrize(
    ("template", "response", "shown"),
    [
        (STRIPPING, "<think>a</think>b", "'<think>a</think>b' is rendered as 'b<|im_end|>'"),
        (OPENING, "a</think>b", "'a</think>b' is rendered as '</think>\\na</think>b<|im_end|>'"),
    ],
    ids=["left out", "closed twice"],
)
def test_a_response_that_is_rendered_otherwise_is_left_out(
    read: Read, tmp_path: Path, template: str, response: str, shown: str
) -> None:
    rows = [pair([turn("user", "u")], response, "c"), pair([turn("user", "u")], "d", "e")]
    _, splits = read(write(tmp_path / "a.jsonl", rows), template)
    (counts,) = splits.counts["val"]
    assert [words.partition(":")[0] for words in counts.dropped] == ["response not rendered as given"]
    assert counts.example == shown
    (listed,) = (row for row in splits.noted("val") if row["left_out"])
    assert listed["because"][0].endswith(shown)
    with pytest.raises(InputError) as error:
        read(str(tmp_path / "a.jsonl"), template, max_dropped_fraction=0.1)
    assert f"for example, {shown}, more than" in str(error.value).replace(")", "")


def test_one_row_that_does_not_begin_as_its_prompt_is_left_out(read: Read, tmp_path: Path) -> None:
    """Here the words of the system move into the last turn, as in a template of Mistral's."""
    template = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
        "{{ messages[0].content if loop.last and messages[0].role == 'system' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = [pair([turn("user", "u")])] * 3 + [pair([turn("system", "s"), turn("user", "u")])]
    _, splits = read(write(tmp_path / "a.jsonl", rows), template)
    (counts,) = splits.counts["val"]
    assert (counts.kept, list(counts.dropped)) == (3, ["prompt not rendered as the beginning of prompt and response"])
    assert counts.example.startswith(
        "the prompt goes on with 'su<|im_end|>[assistant]', and both together with 'u<|im_"
    )


def test_thoughts_that_a_template_takes_off_earlier_turns_are_counted(read: Read, tmp_path: Path) -> None:
    prompt = [turn("user", "u"), turn("assistant", "<think>a</think>b"), turn("user", "v")]
    texts, splits = read(write(tmp_path / "a.jsonl", [pair(prompt)]), STRIPPING)
    assert "assistant\nb<|im_end|>" in texts[0]
    assert splits.counts["val"][0].changed == {"prompt not rendered as given": 1}
    (listed,) = splits.noted("val")
    assert listed["because"][0].startswith("prompt not rendered as given: prompt[1]: '<think>a</think>b' is rendered")


def test_text_that_a_template_adds_to_a_response_is_counted(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("user", "u")])])
    for template, text in ((BEHIND, "yes ok<|im_end|>"), (OPENING, "</think>\nyes<|im_end|>")):
        texts, splits = read(file, template)
        assert texts[1] == text
        assert splits.counts["val"][0].changed == {"text added to a response by the chat template": 1}
        assert [row["because"] for row in splits.noted("val")] == [
            [f"text added to a response by the chat template: 'yes' is rendered as {text!r}"]
        ]
    assert read(file, CHATML)[1].counts["val"][0].changed == {}


def test_blanks_that_a_template_changes_in_a_response_are_counted(read: Read, tmp_path: Path) -> None:
    """Templates that know thoughts put line breaks around them."""
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'].replace('</think>', '\n</think>\n\n') }}")
    texts, splits = read(write(tmp_path / "a.jsonl", [pair([turn("user", "u")], "<think>a</think>b")]), template)
    assert texts[1] == "<think>a\n</think>\n\nb<|im_end|>"
    assert splits.counts["val"][0].changed == {"blanks inside a response changed by the chat template": 1}


def test_variables_of_the_template_are_handed_on(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("user", "u")])])
    with pytest.raises(InputError, match=r"none of the 1 rows .* may need data\.chat_template_kwargs"):
        read(file, SWITCHED)
    texts, _ = read(file, SWITCHED, chat_template_kwargs={"enable_thinking": False})
    assert texts[0].endswith("assistant\n")
    styled = CHATML.replace("{% for", "{{ style }}{% for", 1)
    for style in ("a", "b"):  # and not those of the run before
        assert read(file, styled, chat_template_kwargs={"style": style})[0][0].startswith(f"{style}<|im_start|>")


# Prompts


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_turns_that_prompt_and_conversation_share_come_once(read: Read, tmp_path: Path, blank: str) -> None:
    system, user = turn("system", "Be brief."), turn("user", "Say 0.")
    answers = [[turn("user", "Say 0." + blank), turn("assistant", text)] for text in ("0", "no")]
    for prompt in ([system, user], [user], "Say 0."):
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        texts, _ = read(write(tmp_path / "a.jsonl", [row]), CHATML)
        assert texts[0].count("Say 0.") == 1
        assert texts[0].count("Be brief.") == (prompt == [system, user])
    whole = {name: [system, *row[name]] for name in ("chosen", "rejected")}
    for prompt in ([user], [system, user], "Say 0."):
        assert to_pairs({**whole, "prompt": prompt}, "messages")[0].prompt == [system, answers[0][0]]


def test_a_prompt_column_that_says_something_else_is_counted(read: Read, tmp_path: Path) -> None:
    answers = [[turn("user", "u"), turn("assistant", text)] for text in ("a", "b")]
    row = {"prompt": "other", "chosen": answers[0], "rejected": answers[1]}
    _, splits = read(write(tmp_path / "a.jsonl", [row]), CHATML)
    assert splits.counts["val"][0].changed == {"the prompt column is not in the conversation": 1}


@pytest.mark.parametrize(
    ("prompt", "texts", "change"),
    [
        ("Question: colour?\nAnswer:", (" red", " seven"), "prompt removed from responses that repeat it"),
        ("Hi", ("Hi red", "Hi seven"), "responses that begin with their prompt"),
    ],
    ids=["convention", "chance"],
)
def test_responses_that_repeat_their_prompt(
    read: Read, tmp_path: Path, prompt: str, texts: tuple[str, str], change: str
) -> None:
    chosen, rejected = (text if text.startswith(prompt) else prompt + text for text in texts)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    found, splits = read(write(tmp_path / "a.jsonl", [row]))
    assert found == [f"<bos>{prompt}", *(f"{text}<eos>" for text in texts)]
    assert splits.counts["val"][0].changed == {change: 1}
    (example,) = to_examples({"prompt": prompt, "completion": chosen}, "strings")
    assert (example.completion, example.changes) == (texts[0], (change,))
    one = to_pairs({**row, "rejected": "else"}, "strings")[0]
    assert (one.chosen, one.changes) == (chosen, ()), "one of two may well repeat the question"


def test_a_system_column_is_the_first_turn(read: Read, tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": "Say 0.", "chosen": "0", "rejected": "no"}
    without = {key: value for key, value in row.items() if key != "system"}
    file = write(tmp_path / "a.jsonl", [row, row | {"system": ""}, without, row | {"system": 3}])
    texts, splits = read(file, CHATML)
    assert texts[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay 0.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert splits.prompt("val", 0) == [turn("system", "Be brief."), turn("user", "Say 0.")]
    assert splits.prompt("val", 1) == splits.prompt("val", 2) == [turn("user", "Say 0.")], "all are read alike"
    assert splits.counts["val"][0].dropped == {"malformed row: system is a number": 1}
    assert read(file)[0] == ["<bos>Be brief.\n\nHuman: Say 0.\n\nAssistant:", " 0<eos>", " no<eos>"]
    said = pair([turn("system", "Be brief."), turn("user", "u")], system="Be brief.")
    assert [message["role"] for message in to_pairs(said, "messages")[0].prompt] == ["system", "user"]
    with pytest.raises(RowError, match="system is not what the conversation's system turn says"):
        to_pairs({**said, "system": "Be long."}, "messages")
    question = {"system": "Be brief.", "question": "q", "responses": ["a", "b"], "scores": [1, 2]}
    assert to_pairs(question, "ranked")[0].prompt == [turn("system", "Be brief."), turn("user", "q")]


def test_a_column_that_comes_late_counts_for_all_rows(read: Read, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "good": "a", "rejected": 'say "w"'} for i in range(1001)]
    late = {"prompt": "q", "good": "a", "rejected": "b", "system": "S", "w": 2, "chosen": "c"}
    file = write(tmp_path / "a.jsonl", [*rows, late])
    texts, splits = read(file, CHATML, columns={"chosen": "good"}, weight_column="w")
    assert splits.counts["val"][0].dropped == {"malformed row: w is missing": 1001}
    assert texts[0].startswith("<|im_start|>system\nS")
    texts, _ = read(file, CHATML, columns={"chosen": "good"})
    assert texts[0] == "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="no column 'v'"):
        read(file, columns={"chosen": "good"}, weight_column="v")


@pytest.mark.parametrize("cls", [PreferenceDataModule, SFTDataModule])
def test_lists_that_are_written_as_json_text_are_lists(read: Read, tmp_path: Path, cls: type) -> None:
    row = pair([turn("user", "u")], tools=[LOOK_UP])
    texts, splits = read(write(tmp_path / "a.jsonl", [{k: json.dumps(v) for k, v in row.items()}]), TOOLS, cls)
    assert splits.counts["val"][0].format == "messages"
    assert texts[0].startswith(f"<|im_start|>system\n{json.dumps(LOOK_UP)}<|im_end|>\n<|im_start|>user\nu<|im_end|>")
    assert texts[1] == "yes<|im_end|>"


def test_ranked_responses_may_stand_in_a_csv_file(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,responses,scores,w\nq,"[""a"", ""b""]","[1, 2]",0.5\nq,"[""a""]",x,1\n')
    texts, splits = read(str(file), weight_column="w", margin_column="scores")
    assert texts == ["<bos>q", "b<eos>", "a<eos>"]
    assert splits.rows["val"][0][1][5:7] == (0.5, 1.0)
    assert splits.counts["val"][0].dropped == {"malformed row: scores is a text and no list": 1}


@pytest.mark.parametrize("answers", [("re", "no"), ([turn("assistant", "re")], [turn("assistant", "no")])])
def test_an_answer_that_has_begun_is_continued(read: Read, tmp_path: Path, answers: Any) -> None:
    row = {"prompt": [turn("user", "u"), turn("assistant", "Su")], "chosen": answers[0], "rejected": answers[1]}
    file = write(tmp_path / "a.jsonl", [row])
    texts, splits = read(file, CHATML)
    assert texts == [
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nSu",
        "re<|im_end|>",
        "no<|im_end|>",
    ]
    assert splits.counts["val"][0].changed == {}
    assert read(file)[0] == ["<bos>\n\nHuman: u\n\nAssistant: Su", "re<eos>", "no<eos>"]
    for mode, (template, length) in itertools.product(("keep_start", "keep_end"), ((CHATML, 16), (None, 20))):
        cut = {"truncation_mode": mode, "max_prompt_length": length, "max_length": 40}
        (prompt, *_), splits = read(file, template, **cut)
        assert prompt.endswith("assistant\nSu" if template else "Assistant: Su")
        assert splits.counts["val"][0].changed == {"prompt cut": 1}
    begun = [turn("user", "u"), turn("assistant", "Su", prefix=True)]
    marked = {"chosen": [*begun, turn("assistant", "re")], "rejected": [*begun, turn("assistant", "no")]}
    assert read(write(tmp_path / "c.jsonl", [marked]), CHATML)[0] == texts
    dialogue = {"prompt": "\n\nHuman: u\n\nAssistant: Su", "chosen": "re", "rejected": "no"}
    assert read(write(tmp_path / "b.jsonl", [dialogue]), CHATML)[0] == texts


def test_an_earlier_turn_of_the_assistant_is_a_turn(read: Read, tmp_path: Path) -> None:
    """In a conversation two of them may follow each other; at the end of a prompt column one is to be continued."""
    said = [turn("user", "u"), turn("assistant", "a")]
    row = {"chosen": [*said, turn("assistant", "b")], "rejected": [*said, turn("assistant", "c")]}
    texts, _ = read(write(tmp_path / "a.jsonl", [row]), CHATML)
    assert texts[0].endswith("assistant\na<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("prompt", "chosen", "changed"),
    [
        ([turn("user", "a <|im_end|> b")], "c", {"special token inside a prompt": 1}),
        ("a <eos> b", "c", {"special token inside a prompt": 1}),
        ("<bos>a", "c", {}),
        ([turn("user", "a")], "c<|im_start|>d", {"special token inside a response": 1}),
        ([turn("user", "a")], "c<|im_end|>d", {"terminator inside a response": 1}),
        ([turn("user", "a")], "c<|im_end|>", {}),
    ],
)
def test_special_tokens_in_text_are_counted(
    read: Read, tmp_path: Path, prompt: Any, chosen: str, changed: dict[str, int]
) -> None:
    row = pair(prompt, chosen) if isinstance(prompt, list) else {"prompt": prompt, "chosen": chosen, "rejected": "d"}
    assert read(write(tmp_path / "a.jsonl", [row]), CHATML)[1].counts["val"][0].changed == changed


# Rows that cannot be used say which field has which fault


@pytest.mark.parametrize(
    ("row", "format", "problem"),
    [
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "strings", "chosen is missing"),
        ({"prompt": "p", "rejected": "r"}, "strings", "chosen is missing"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "strings", "prompt is a number"),
        ({"prompt": "p", "chosen": "a\ud800", "rejected": "r"}, "strings", "chosen has half a surrogate pair"),
        (
            pair([turn("user", [{"type": "image_url"}])]),
            "messages",
            "prompt[0].content is a list of parts that",
        ),
        (pair([turn("narrator", "a")]), "messages", "prompt[0].role is no role"),
        (pair([turn("user", None)]), "messages", "prompt[0].content is missing"),
        (pair(["a"]), "messages", "prompt[0] is a text and no message"),
        (pair([turn("user", "a")], []), "messages", "chosen is an empty list"),
        (pair([turn("user", "a")], [turn("user", "b")]), "messages", "the last turn of chosen has another role"),
        (pair(None), "messages", "no prompt stands before the response"),
        (pair([turn("user", "a")], tools="x"), "messages", "tools is a text and no list"),
        (
            pair([turn("assistant", "", tool_calls=[3]), turn("user", "a")]),
            "messages",
            "prompt[0].tool_calls[0] is",
        ),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "transcripts", "chosen does not end with a turn of"),
        ({"chosen": "Hello", "rejected": "Human: b"}, "transcripts", "chosen does not begin with"),
        ({"prompt": "p", "responses": ["a"], "scores": [1, 2]}, "ranked", "scores has another number of items"),
        ({"prompt": "p", "responses": ["a", 3], "scores": [1, 2]}, "ranked", "responses[1] is a number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "ranked", "scores[1] is missing"),
        (
            {"instruction": "p", "completions": [{"response": "a"}]},
            "ultrafeedback",
            "completions[0].overall_score is",
        ),
        ({"info": "x", "summaries": [], "choice": 0}, "comparisons", "info is a text and no object"),
    ],
)
def test_a_malformed_row_names_the_field_and_the_problem(row: dict[str, Any], format: str, problem: str) -> None:
    with pytest.raises(RowError) as error:
        to_pairs(row, format)
    assert str(error.value).startswith(f"malformed row: {problem}")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "w is missing"),
        ("", "w is empty"),
        ("much", "w is a text that is no number"),
        (float("nan"), "w is NaN"),
        ("nan", "w is NaN"),
        (float("inf"), "w is infinite"),
        (10**400, "w is more than float32 can hold"),
        (True, "w is a truth value"),
        (-1, "w is below 0"),
        ([1], "w is a list"),
    ],
)
def test_a_weight_that_is_no_number_says_what_it_is(value: object, problem: str) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "w": value}
    with pytest.raises(RowError) as error:
        to_pairs(row, "strings", weight_column="w")
    assert str(error.value).partition("\n")[0] == f"malformed row: {problem}"


def test_numbers_may_be_written_as_text() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "w": " 0.5", "m": "-2", "chosen_behavior_logps": "-1.5"}
    found = to_pairs(row | {"rejected_behavior_logps": "-2"}, "strings", weight_column="w", margin_column="m")
    assert found[0][3:7] == (-1.5, -2.0, 0.5, -2.0)
    with pytest.raises(RowError, match="rejected_behavior_logps is missing and chosen_behavior_logps is not"):
        to_pairs(row, "strings")


def test_parts_that_are_all_text_are_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, "0", {"text": "?"}]
    (found,) = to_pairs(pair([turn("user", parts)], [turn("assistant", parts)]), "messages")
    assert (found.prompt, found.chosen) == ([turn("user", "What is 0?")], "What is 0?")


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"function": "look_up"}, "function is a text and no object"),
        ({"function": None}, "function is missing and no object"),
        ({}, "name is missing"),
        ("x", " is a text and no object"),
        (5, " is a number and no object"),
    ],
)
def test_a_call_of_a_tool_that_says_no_name_is_malformed(call: Any, problem: str) -> None:
    with pytest.raises(RowError) as error:
        to_pairs(pair([turn("user", "u")], [turn("assistant", None, tool_calls=[call])]), "messages")
    assert str(error.value).startswith("malformed row: chosen[0].tool_calls[0]")
    assert str(error.value).endswith(problem)
    with pytest.raises(RowError, match=r"chosen\[0\]\.function_call is the older form of tool_calls"):
        to_pairs(pair([turn("user", "u")], [turn("assistant", "a", function_call={"name": "f"})]), "messages")


@pytest.mark.parametrize("tools", [[{"function": "f"}], [{"function": None}], ["x"], [5]])
def test_tools_that_are_no_objects_are_malformed(tools: Any) -> None:
    with pytest.raises(RowError, match=r"malformed row: tools\[0\]"):
        to_pairs(pair([turn("user", "u")], tools=tools), "messages")


def test_half_a_surrogate_in_what_is_shown_is_written_out(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("\ud83d", "u")]), pair([turn("user", "u")])])
    _, splits = read(file)
    assert splits.counts["val"][0].example == r"\ud83d"


@pytest.mark.parametrize("body", ["{{ 1 // 0 }}", "{{ m.content.index('?') }}", "{{ 10.0 ** 400 }}"])
def test_whatever_a_template_raises_is_a_refusal(read: Read, tmp_path: Path, body: str) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("user", "u")])])
    with pytest.raises(InputError, match="1 x refused by the chat template"):
        read(file, CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + body))


def test_an_indentation_that_a_template_takes_off_is_counted(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("user", "u")], "    return x\n")])
    texts, splits = read(file, CHATML.replace("m['content']", "m['content'] | trim"))
    assert texts[1] == "return x<|im_end|>"
    assert splits.counts["val"][0].changed == {"blanks inside a response changed by the chat template": 1}


def test_special_tokens_that_are_read_as_text_are_text(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """Two tokenizers that differ in nothing else have rows of their own."""
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a<eos>b", "rejected": "c"}] * 2)
    lengths = []
    for split in (False, True):
        data = PreferenceDataModule(val=file)
        data.tokenizer = make_tokenizer()
        data.tokenizer.split_special_tokens = split
        data.setup("validate")
        lengths.append(len(data.splits.rows["val"][0][1].chosen_ids))
        assert ("terminator inside a response" in data.splits.counts["val"][0].changed) == (not split)
        assert "special token inside a response" not in data.splits.counts["val"][0].changed
    assert lengths == [4, 8]


def test_problems_are_counted_without_their_places_and_listed_with_them(read: Read, tmp_path: Path) -> None:
    bad = [pair([turn("user", "a")] * i + [turn("user", i)]) for i in range(20)]
    file = write(tmp_path / "a.jsonl", [*bad, pair([turn("user", "a")])])
    _, splits = read(file, CHATML)
    assert splits.counts["val"][0].dropped == {"malformed row: prompt[].content is a number": 20}
    assert [row["because"] for row in splits.noted("val")][7] == ["malformed row: prompt[7].content is a number"]


# Names of columns, and rows in memory


ROWS = [{"question": f"q{i}", "good": f"a{i}", "bad": "b", "prompt": "other", "size": i + 1} for i in range(6)]
COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad", "weight": "size"}


def test_columns_are_mapped_for_all_sources_or_one(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "b.parquet")
    for path in (file, str(tmp_path / "b.parquet")):
        texts, splits = read(path, columns=COLUMNS, weight_column="weight")
        assert texts == ["<bos>q0", "a0<eos>", "b<eos>"]
        assert splits.rows["val"][5][1].weight == 6.0
        own = {"path": path, "columns": {"rejected": "prompt"}}
        assert read(own, columns=COLUMNS, weight_column="weight")[0][2] == "other<eos>"
    with pytest.raises(InputError, match=r"a\.jsonl: data\.columns: no column 'nothing'; it has question, good, bad"):
        read(file, columns={"prompt": "nothing"})
    with pytest.raises(InputError, match=r"map them with data\.columns, as in \{prompt: question\}"):
        read(file)
    with pytest.raises(InputError, match="is not known, the nearest"):
        read(file, columns=COLUMNS | {"prompt": None})


def test_a_column_that_is_hidden_is_not_read(read: Read, tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": "p", "chosen": "a", "rejected": "b"}
    assert read(write(tmp_path / "a.jsonl", [row]), columns={"system": None})[0][0] == "<bos>p"


PLAIN = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r", "w": i} for i in range(6)]


@pytest.mark.parametrize(
    "make_rows",
    [
        lambda: PLAIN,
        lambda: tuple(PLAIN),
        lambda: pd.DataFrame(PLAIN),
        lambda: datasets.Dataset.from_list(PLAIN),
        lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(PLAIN)),
        lambda: [row | {"w": np.float32(row["w"])} for row in PLAIN],
        lambda: [datasets.Dataset.from_list(PLAIN)],
        lambda: {"path": pd.DataFrame(PLAIN), "first": 6},
    ],
    ids=["list", "tuple", "DataFrame", "Dataset", "DatasetDict", "numpy", "list of one", "source"],
)
def test_rows_in_memory_are_read(tokenizer_path: str, make_rows: Callable[[], Any]) -> None:
    data = PreferenceDataModule(
        train=make_rows(), tokenizer=tokenizer_path, batch_size=2, val_size=1, weight_column="w"
    )
    data.setup("fit")
    (counts,) = data.splits.counts["train"]
    assert (counts.read, counts.kept, counts.held_out) == (6, 5, 1)
    assert "in memory" in counts.source
    assert sorted(data.splits.rows["train"].table["weight"]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert data.splits.folders("train") == []
    json.dumps(dict(data.hparams), default=str)
    assert "rows" not in data.hparams["train"][0]


def test_the_splits_of_a_dictionary_are_found(tokenizer_path: str) -> None:
    splits = {name: datasets.Dataset.from_list(PLAIN[:size]) for name, size in (("train", 6), ("dev", 3), ("test", 2))}
    data = PreferenceDataModule(train=datasets.DatasetDict(splits), tokenizer=tokenizer_path, batch_size=2)
    for stage in ("fit", "test"):
        data.setup(stage)
    assert {name: len(rows) for name, rows in data.splits.rows.items()} == {"train": 6, "val": 3, "test": 2}


@pytest.mark.parametrize("kind", ["numpy", "pandas", "arrow"])
def test_the_format_of_a_dataset_does_not_matter(tokenizer_path: str, kind: str) -> None:
    rows = datasets.Dataset.from_list(PLAIN).with_format(kind)
    data = PreferenceDataModule(train=rows, tokenizer=tokenizer_path, batch_size=2, val_size=1)
    data.setup("fit")
    assert isinstance(data.splits.rows["train"][0][1].chosen_ids, list)


def test_columns_that_nobody_reads_may_hold_anything(read: Read) -> None:
    rows = [row | {"path": "a", "day": pd.Timestamp(0), "data": b"x", "set": {1}} for row in PLAIN]
    assert read(rows)[1].counts["val"][0].kept == 6
    assert read(pd.DataFrame(rows))[1].counts["val"][0].kept == 6
    features = datasets.Features({name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")})
    table = {name: [row[name] for row in PLAIN] for name in features} | {"image": [{"bytes": b"x", "path": None}] * 6}
    features["image"] = datasets.Image()
    assert read(datasets.Dataset.from_dict(table, features=features))[1].counts["val"][0].kept == 6
    _, splits = read([*rows, rows[0] | {"chosen": pd.Timestamp(0)}])
    assert splits.counts["val"][0].dropped == {"malformed row: chosen is an object": 1}


@pytest.mark.parametrize("notes", [(None, "x"), (1, "x"), (1, 1.5), ({"a": 1}, {"a": 1, "b": "c"})])
def test_tables_may_differ_in_the_type_of_a_column(read: Read, tmp_path: Path, notes: tuple[Any, Any]) -> None:
    for number, note in enumerate(notes):
        rows = [{"prompt": f"p{number}", "chosen": "null", "rejected": "b", "w": [1, 1.5][number], "note": note}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{number}.parquet")
    texts, splits = read(str(tmp_path), weight_column="w")
    assert splits.counts["val"][0].kept == 2
    assert texts[1] == "null<eos>"
    assert splits.rows["val"][1][1].weight == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenize": True}, "'tokenize' is no name for a variable"),
        ({1: "a", "b": "c"}, "1 is no name for a variable"),
        ({"day": {1}}, "day must be a plain value"),
    ],
)
def test_variables_that_no_template_can_have_are_refused(options: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^data\.chat_template_kwargs: {message}"):
        PreferenceDataModule(train="a", chat_template_kwargs=options)


def test_a_template_may_put_a_blank_before_an_answer_that_has_begun(read: Read, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content }}"
    row = {"prompt": [turn("user", "u"), turn("assistant", "Su")], "chosen": "re", "rejected": "no"}
    texts, splits = read(write(tmp_path / "a.jsonl", [row]), template + "{% endfor %}")
    assert texts == ["[INST]u[/INST] Su", "re<eos>", "no<eos>"]
    assert splits.counts["val"][0].changed == {}


def test_the_name_of_who_speaks_is_text(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair([turn("user", "u", name="Alice")])])
    assert "Alice" in read(file, TOOLS)[0][0]
    for template in (CHATML, None):
        assert read(file, template)[1].counts["val"][0].changed == {"prompt not rendered as given": 1}


def test_other_rows_in_memory_are_other_rows(tokenizer_path: str) -> None:
    for prompt in ("a", "b"):
        rows = [row | {"prompt": f"{prompt}{i}"} for i, row in enumerate(PLAIN)]
        data = PreferenceDataModule(train=rows, tokenizer=tokenizer_path, batch_size=2, val_size=1)
        data.setup("fit")
        assert data.prompts("val", 1)[0].text[0] == prompt


def test_rows_in_memory_that_are_none_are_refused(tokenizer_path: str) -> None:
    for rows, message in (
        (datasets.Dataset.from_list(PLAIN).with_transform(lambda batch: batch), "the rows in memory have a transform"),
        ([{"path": "a", "wieght": 2}], "is neither a path nor"),
        (3, "3 is neither a path nor"),
    ):
        with pytest.raises(InputError, match=message):
            PreferenceDataModule(train=rows, tokenizer=tokenizer_path).setup("fit")
    missing = pd.DataFrame([{"prompt": "p", "chosen": float("nan"), "rejected": "r"}, PLAIN[0]])
    data = PreferenceDataModule(val=missing, tokenizer=tokenizer_path, max_dropped_fraction=0.5)
    data.setup("validate")
    assert data.splits.counts["val"][0].dropped == {"malformed row: chosen is missing": 1}
