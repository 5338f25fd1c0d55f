"""Local rows of exactly the schemas on the hub, read by the configs that name it. Nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lit_isdpo.data import datamodule
from lit_isdpo.data.examples import detect_format, to_examples, to_pairs
from lit_isdpo.data.formats import read_dialogue, read_query
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_example
from lit_isdpo.types import Message, PreferenceExample, SFTExample

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
CUE, HUMAN = "\n\nTL;DR:", "\n\nAssistant:"


def post(i):
    """A Reddit post; every fourth one is longer than any prompt may be."""
    return f"I wonder about {i}. " * (100 if i % 4 == 0 else 1)


def query(i):
    return f"SUBREDDIT: r/AskReddit\n\nTITLE: Why {i}?\n\nPOST: {post(i)}{CUE}"


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]


def dialogue(i):
    return turns(f"Hello {i}.", "Hello.", post(i))


def transcript(i):
    return f"\n\nHuman: Hello {i}.\n\nAssistant: Hello.\n\nHuman: {post(i)}\n\nAssistant:"


def comparison(i):
    return {
        "info": {
            "id": f"t3_{i}",
            "post": post(i),
            "title": f"Why {i}?",
            "subreddit": "AskReddit",
            "site": None,
            "article": None,
        },
        "summaries": [
            {"text": f" Bad {i}.", "policy": "sup1", "note": None},
            {"text": f" Good {i}.", "policy": "ref", "note": "ok"},
        ],
        "choice": 1,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


def preprocessed_comparison(i):
    return comparison(i) | {
        "query_token": [50277, 1, 2],
        "query": query(i),
        "chosen": f" Good {i}.<|endoftext|>",
        "chosen_token": [1, 0],
        "chosen_token_len": 2,
        "rejected": f" Bad {i}.<|endoftext|>",
        "rejected_token": [2, 0],
        "rejected_token_len": 2,
        "chosen_policy": "ref",
        "rejected_policy": "sup1",
        "policies": "ref--sup1",
        "query_chosen": f"{query(i)} Good {i}.<|endoftext|>",
        "query_chosen_token": [1, 2, 1, 0],
        "query_chosen_token_len": 4,
        "query_rejected": f"{query(i)} Bad {i}.<|endoftext|>",
        "query_rejected_token": [1, 2, 2, 0],
        "query_rejected_token_len": 4,
        "query_token_len": 2,
        "query_chosen_token_response_label": [50277, 50277, 1, 0],
        "query_rejected_token_response_label": [50277, 50277, 2, 0],
    }


def preprocessed_demonstration(i):
    return {
        "id": f"t3_{i}",
        "subreddit": "AskReddit",
        "title": f"Why {i}?",
        "post": post(i),
        "summary": f"Good {i}.",
        "query_token": [50277, 1, 2],
        "query": query(i),
        "reference_response": f" Good {i}.<|endoftext|>",
        "reference_response_token": [1, 0],
        "reference_response_token_len": 2,
        "query_reference_response": f"{query(i)} Good {i}.<|endoftext|>",
        "query_reference_response_token": [1, 2, 1, 0],
        "query_reference_response_token_response_label": [50277, 50277, 1, 0],
        "query_reference_response_token_len": 4,
    }


def full_hh(i):
    good = f" Good {i}."
    return {"prompt": transcript(i), "response": good, "chosen": good, "rejected": f" Bad {i}."}


def binarized(i):
    chosen = [*dialogue(i), *turns("", f"Good {i}.")[1:]]
    return {
        "prompt": f"Hello {i}.",
        "prompt_id": f"{i:064x}",
        "chosen": chosen,
        "rejected": [*dialogue(i), *turns("", f"Bad {i}.")[1:]],
        "messages": chosen,
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }


def argilla(i):
    return {
        "source": "evol_instruct",
        "prompt": post(i),
        "chosen": turns(post(i), f"Good {i}."),
        "chosen-rating": 5.0,
        "chosen-model": "gpt-4",
        "rejected": turns(post(i), f"Bad {i}."),
        "rejected-rating": 3.0,
        "rejected-model": "alpaca-7b",
    }


def ultrafeedback(i):
    mark = {"Rating": "2", "Rationale": "It is."}
    typed = {**mark, "Type": ["1"], "Rationale For Rating": "So."}
    aspects = {"instruction_following": mark, "honesty": mark, "truthfulness": typed, "helpfulness": typed}
    scores = {"Middling": 5.0, "Good": 8.5, "Bad": 1.0, "Weak": 3.0}
    return {
        "source": "sharegpt",
        "instruction": post(i),
        "models": ["alpaca-7b", "gpt-4", "pythia-12b", "starchat"],
        "completions": [
            {
                "annotations": aspects,
                "custom_system_prompt": "Be honest.",
                "model": "m",
                "principle": "honesty",
                "response": f"{word} {i}.",
                "critique": "Fine.",
                "fine-grained_score": 3.0,
                "overall_score": score,
            }
            for word, score in scores.items()
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def nectar(i):
    words = ["Good", "Fair", "Middling", "Dull", "Poor", "Weak", "Bad"]
    return {
        "prompt": transcript(i) + " ",
        "answers": [
            {"answer": f"{word} {i}.", "model": "m", "rank": float(rank)} for rank, word in enumerate(words, start=1)
        ],
        "turns": 2,
        "num_responses": 7,
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    }


class Hub(NamedTuple):
    """A data set as it is on the hub, and what is to be made of its rows."""

    row: Callable[[int], dict[str, Any]]
    splits: tuple[str, ...]
    format: str
    prompt: Callable[[int], Any]
    space: str  # before a response; the turns of a conversation are kept without theirs
    kinds: tuple[str, ...] = ("pairs", "demonstrations")


HUB = {
    "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144": Hub(
        preprocessed_comparison, ("train", "validation", "validation_cnndm"), "queries", query, " "
    ),
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144": Hub(
        preprocessed_demonstration, ("train", "validation", "test"), "queries", query, " ", ("demonstrations",)
    ),
    "trl-lib/tldr-preference": Hub(
        lambda i: {"prompt": query(i), "chosen": f" Good {i}.", "rejected": f" Bad {i}."},
        ("train", "validation"),
        "strings",
        query,
        " ",
    ),
    "trl-lib/tldr": Hub(
        lambda i: {"prompt": query(i), "completion": f" Good {i}."},
        ("train", "validation", "test"),
        "strings",
        query,
        " ",
        ("demonstrations",),
    ),
    "openai/summarize_from_feedback": Hub(comparison, ("train", "validation"), "comparisons", query, " "),
    "Anthropic/hh-rlhf": Hub(
        lambda i: {"chosen": f"{transcript(i)} Good {i}.", "rejected": f"{transcript(i)} Bad {i}."},
        ("train", "test"),
        "transcripts",
        dialogue,
        "",
    ),
    "Dahoas/full-hh-rlhf": Hub(full_hh, ("train", "test"), "dialogues", dialogue, ""),
    "HuggingFaceH4/ultrafeedback_binarized": Hub(
        binarized,
        ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"),
        "messages",
        dialogue,
        "",
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": Hub(
        argilla, ("train",), "messages", lambda i: turns(post(i)), ""
    ),
    "openbmb/UltraFeedback": Hub(ultrafeedback, ("train",), "ultrafeedback", lambda i: turns(post(i)), ""),
    "berkeley-nest/Nectar": Hub(nectar, ("train",), "nectar", dialogue, ""),
    "HuggingFaceH4/ultrachat_200k": Hub(
        lambda i: {
            "prompt": f"Hello {i}.",
            "prompt_id": f"{i:064x}",
            "messages": [*dialogue(i), *turns("", f"Good {i}.")[1:]],
        },
        ("train_sft", "test_sft", "train_gen", "test_gen"),
        "messages",
        dialogue,
        "",
        ("demonstrations",),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_public_schema_is_recognised_and_read(name):
    hub = HUB[name]
    row = hub.row(1)
    prompt, good, bad = hub.prompt(1), f"{hub.space}Good 1.", f"{hub.space}Bad 1."
    if "pairs" in hub.kinds:
        assert detect_format(list(row), [row]) == hub.format
        assert to_pairs(row, hub.format) == [PreferenceExample(prompt, good, bad)]
    assert detect_format(list(row), [row], kind="demonstrations") == hub.format
    assert to_examples(row, hub.format) == [SFTExample(prompt, good)]


def test_an_article_is_a_prompt_without_subreddit():
    row = comparison(1)
    row["info"] |= {"article": "It rained.", "post": None, "subreddit": None}
    assert to_pairs(row, "comparisons")[0].prompt == "Article:\nIt rained.\n\nTL;DR:"
    articles = {"query": "Article:\nIt rained.\n\nTL;DR:\n", "chosen": " Rain.<|endoftext|>", "rejected": " Sun."}
    assert to_pairs(articles, "queries") == [PreferenceExample("Article:\nIt rained.\n\nTL;DR:", " Rain.", " Sun.")]


@pytest.mark.parametrize("eos", ["<eos>", "<|endoftext|>"])
def test_a_foreign_terminator_is_not_learned_and_the_own_one_once(make_tokenizer, eos):
    tokenizer = make_tokenizer(eos_token=eos)
    example = read_query(preprocessed_demonstration(1), "reference_response")
    ids = tokenize_example(example, TextEncoder(tokenizer), Limits(640, 512)).completion_ids
    assert tokenizer.decode(ids) == f" Good 1.{eos}"
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("\n\nHuman: a\n\nAssistant:", " b"),
        ("\n\nHuman: a\n\nAssistant: ", "b"),
        ("\n\nHuman: a\n\nAssistant: ", " b"),
        ("\n\nHuman:  a \n\nAssistant: c\n\n\n\nHuman: d\n\nAssistant:", "  b\n\nHuman: e "),
    ],
)
def test_without_a_template_a_dialogue_is_the_text_of_the_data(make_tokenizer, prompt, response):
    tokenizer = make_tokenizer(bos=False)
    example = read_dialogue({"prompt": prompt, "chosen": response}, "chosen")
    ids = tokenize_example(example, TextEncoder(tokenizer), Limits(640, 512))
    assert tokenizer.decode(ids.prompt_ids + ids.completion_ids) == f"{prompt}{response}<eos>"


def lay(folder, hub):
    for split in hub.splits:
        rows = [hub.row(i) for i in range(8)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_reads_its_data_and_keeps_the_cue(config, tmp_path, monkeypatch, tokenizer_path):
    """A folder of its schema lies where the config names the hub; a token is a byte, so that long posts are cut."""
    section = yaml.safe_load(config.read_text())
    assert list(section) == ["data"]
    options = section["data"]["init_args"]
    assert (options["batch_size"], options["max_prompt_length"], options["truncation_mode"]) == (128, 512, "keep_end")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val", "test"):
        sources = options.get(split, [])
        for source in sources if isinstance(sources, list) else [sources]:
            assert len(source.pop("revision", 40 * "0")) == 40
            assert source["split"] in HUB[source["path"]].splits
            if not Path(source["path"]).exists():
                Path(source["path"]).mkdir(parents=True)
                lay(Path(source["path"]), HUB[source["path"]])
    if "val" not in options:
        options["val_size"] = 2
    options |= {"tokenizer": tokenizer_path, "batch_size": 4}
    data = getattr(datamodule, section["data"]["class_path"].rpartition(".")[2])(**options)
    for stage in ("fit", "test") if "test" in options else ("fit",):
        data.setup(stage)
    for counts in [counts for split in data.splits.counts.values() for counts in split]:
        assert (counts.dropped, counts.lines) == ({}, counts.read)
    for split, rows in data.splits.rows.items():
        cut = 0
        for prompt in data.prompts(split, len(rows)):
            assert prompt.text.endswith((CUE, HUMAN))
            assert prompt.response.startswith(" Good ")
            assert "<|endoftext|>" not in prompt.response
            assert len(prompt.prompt_ids) <= 512
            cut += len(prompt.prompt_ids) == 512
        assert cut or split == "val"  # what is held out may be short
