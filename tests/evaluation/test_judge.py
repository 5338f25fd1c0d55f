"""The judge against a local server: both orders, every fault, and nothing asked twice."""

import json
import logging
import math
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lit_isdpo.evaluation import endpoint
from lit_isdpo.evaluation.judge import Judge, Verdict, parse_preference, summarize
from lit_isdpo.types import InputError
from tests.evaluation.chat_server import ChatServer, Reply

KEY = "sk-secret"
MANY = [f"bad {i}" for i in range(50)]
TEMPLATE = "{prompt}\nA={response_a}\nB={response_b}\nEnd with the line Preferred: A, B or tie."


@pytest.fixture(autouse=True)
def _quick_and_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def make_judge(tmp_path: Path) -> Callable[..., Judge]:
    (tmp_path / "plain.txt").write_text(TEMPLATE)

    def make(server: ChatServer | None = None, **options: Any) -> Judge:
        defaults = {
            "model": "judge-1",
            "template": str(tmp_path / "plain.txt"),
            "base_url": "http://127.0.0.1:9/v1" if server is None else server.base_url,
            "answers": str(tmp_path / "answers.jsonl"),
            "timeout_s": 5.0,
        }
        return Judge(**(defaults | options))

    return make


def prefers(*best_first: str) -> Callable[[str], str]:
    """A judge that knows what is better, wherever it is shown."""

    def answer(content: str) -> str:
        _, a, b, _ = content.split("\n")
        return "Comparison: so.\nPreferred: " + ("A" if best_first.index(a[2:]) < best_first.index(b[2:]) else "B")

    return answer


def test_a_judge_that_is_right(make_judge: Callable[..., Judge]) -> None:
    with ChatServer(prefers("good", "bad")) as server:
        verdicts = make_judge(server).compare(["x", "x", "x"], ["good", "bad", "bad "], ["bad", "good", " bad"])
    assert verdicts == [Verdict(1, 1, 1), Verdict(0, 0, 0), Verdict(0.5, 0.5, 0.5)]
    # The second pair asks the same two questions as the first, and equal responses are not asked about.
    shown = [body["messages"][0]["content"].split("\n")[1:3] for body in server.bodies]
    assert sorted(shown) == [["A=bad", "B=good"], ["A=good", "B=bad"]]
    assert summarize(verdicts) == {
        "judge/invalid_fraction": 0,
        "judge/inconsistent_fraction": 0,
        "judge/first_place_win_rate": 0.5,
    }


def test_a_judge_that_sees_the_place_alone_scores_one_half(make_judge: Callable[..., Judge]) -> None:
    with ChatServer(lambda content: "Preferred: A") as server:
        verdicts = make_judge(server).compare(["x", "y"], ["good", "bad"], ["bad", "good"])
    assert verdicts == [Verdict(0.5, 1, 0)] * 2
    assert summarize(verdicts)["judge/inconsistent_fraction"] == 1
    assert summarize(verdicts)["judge/first_place_win_rate"] == 1


@pytest.mark.parametrize(
    ("forth", "back", "score"),
    [("A", "B", 1), ("A", "tie", 0.75), ("tie", "tie", 0.5), ("B", "tie", 0.25), ("tie", "A", 0.25), ("B", "A", 0)],
)
def test_the_score_is_the_mean_of_both_orders(
    make_judge: Callable[..., Judge], forth: str, back: str, score: float
) -> None:
    with ChatServer(lambda content: f"Preferred: {forth if 'A=one' in content else back}") as server:
        assert make_judge(server).compare(["x"], ["one"], ["two"])[0].score == score


def test_the_request_is_the_protocols(make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    with ChatServer(prefers("good", "bad")) as server:
        judge = make_judge(server, api_key_env="MY_KEY", max_tokens=None, extra_body={"seed": 3})
        judge.compare(["x"], ["good"], ["bad"])
        make_judge(server, api_key_env=None).compare(["x"], ["good"], ["bad"])
    content = TEMPLATE.format(prompt="x", response_a="good", response_b="bad")
    expected = {"model": "judge-1", "messages": [{"role": "user", "content": content}], "temperature": 0.0, "seed": 3}
    assert expected in server.bodies[:2]
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in server.headers[2]
    assert KEY not in repr(judge.identity) + judge_file(judge).read_text()


def judge_file(judge: Judge) -> Path:
    return judge._answers


FAULTS = {
    "busy": Reply(429),
    "busy for a while": Reply(429, headers={"Retry-After": "0.02"}),
    "broken": Reply(500, "<html>"),
    "overloaded": Reply(503, '{"error": {"message": "overloaded"}}'),
    "slow": Reply(200, "{}", delay_s=0.3),
    "reset": Reply(200, is_reset=True),
    "no JSON": Reply(200, "<html>"),
    "no choices": Reply(200, '{"choices": []}'),
    "an error inside": Reply(200, '{"error": {"message": "no"}}'),
    "not a dictionary": Reply(200, "[]"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_passing_fault_is_asked_again(make_judge: Callable[..., Judge], fault: Reply) -> None:
    with ChatServer(prefers("good", "bad"), [fault, fault]) as server:
        verdicts = make_judge(server, timeout_s=0.1 if fault.delay_s else 5.0).compare(["x"], ["good"], ["bad"])
    assert verdicts == [Verdict(1, 1, 1)]
    assert len(server.bodies) == 4


def test_waits_double_and_honour_the_server(make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.02)
    faults = [Reply(500), Reply(500), Reply(500), Reply(503, headers={"Retry-After": "0.3"})]
    with ChatServer(prefers("good", "bad"), faults) as server:
        make_judge(server, concurrency=1).compare(["x"], ["good"], ["bad"])
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    # With jitter a wait is between half of its length and the whole.
    assert all(wait >= least for wait, least in zip(waits, [0.01, 0.02, 0.04, 0.3], strict=False)), waits


@pytest.mark.parametrize("fault", [Reply(500, KEY), Reply(429, headers={"Retry-After": "86400"})])
def test_an_endpoint_that_stays_down_ends_the_run(
    make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch, fault: Reply
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        ChatServer(lambda content: fault) as server,
        pytest.raises(InputError, match=r"judge\.base_url: http://127\.0\.0\.1:\d+/v1 does not answer") as error,
    ):
        make_judge(server, max_attempts=2, concurrency=1).compare(["x"] * 50, ["good"] * 50, MANY)
    assert KEY not in str(error.value)
    assert len(server.bodies) < 50  # three questions of 100, and what is asked until the run hears of it


def test_nobody_there(make_judge: Callable[..., Judge]) -> None:
    with pytest.raises(InputError, match=r"does not answer .ConnectError"):
        make_judge(max_attempts=2).compare(["x"], ["good"], ["bad"])


@pytest.mark.parametrize(
    ("status", "option"),
    [(401, "api_key_env"), (403, "api_key_env"), (404, "model"), (405, "base_url"), (307, "base_url")],
)
def test_wrong_settings_end_the_run_at_once(
    make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch, status: int, option: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    words = f'{{"error": {{"message": "not {KEY}\\nhere"}}}}'
    with (
        ChatServer(lambda content: Reply(status, words)) as server,
        pytest.raises(InputError, match=rf"judge\.{option}.*{status}: not \*\*\* here") as error,
    ):
        make_judge(server, concurrency=1).compare(["x"] * 2, ["good"] * 2, ["bad", "worse"])
    assert len(server.bodies) == 1  # of four
    assert KEY not in str(error.value)


def test_a_key_that_is_wanted_and_not_there(make_judge: Callable[..., Judge]) -> None:
    with ChatServer(lambda content: Reply(401)) as server, pytest.raises(InputError, match="wants a key, and none was"):
        make_judge(server).compare(["x"], ["good"], ["bad"])
    with pytest.raises(InputError, match="environment variable OPENAI_API_KEY is not set"):
        make_judge(base_url="https://judge.example/v1")
    assert make_judge(base_url="https://judge.example/v1", api_key_env=None)


def test_one_question_that_breaks_the_server_is_left_out(
    make_judge: Callable[..., Judge], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(content: str) -> str | Reply:
        if content.startswith("poison"):
            return Reply(500, "crash")
        return Reply(400, "too long") if content.startswith("long") else prefers("good", "bad")(content)

    with ChatServer(answer) as server:
        judge = make_judge(server, max_attempts=2)
        verdicts = judge.compare(["x", "poison", "long", "y"], ["good"] * 4, ["bad"] * 4)
        asked = len(server.bodies)
        again = judge.compare(["x", "poison", "long", "y"], ["good"] * 4, ["bad"] * 4)
    assert [verdict.score for verdict in verdicts] == pytest.approx([1, math.nan, math.nan, 1], nan_ok=True)
    assert summarize(verdicts)["judge/invalid_fraction"] == 0.5
    assert "4 of 8 questions stay without an answer" in caplog.text
    assert [verdict.score for verdict in again] == pytest.approx([1, math.nan, math.nan, 1], nan_ok=True)
    assert asked == 4 + 2 * 2 + 2
    assert len(server.bodies) - asked == 2 * 2 + 2  # what had an answer is not asked again


def test_an_endpoint_that_refuses_all_ends_the_run(make_judge: Callable[..., Judge]) -> None:
    with (
        ChatServer(lambda content: Reply(400, '{"error": {"message": "max_tokens is not supported"}}')) as server,
        pytest.raises(InputError, match=r"refuses the request .400: max_tokens is not supported.*judge\.max_tokens"),
    ):
        make_judge(server, concurrency=1).compare(["x"] * 50, ["good"] * 50, MANY)
    assert len(server.bodies) < 50


def test_answers_without_a_verdict_are_asked_again_and_then_invalid(
    make_judge: Callable[..., Judge], caplog: pytest.LogCaptureFixture
) -> None:
    with ChatServer(lambda content: "I like both" if "A=good" in content else "Preferred: B") as server:
        judge = make_judge(server)
        (verdict,) = judge.compare(["x"], ["good"], ["bad"])
        assert [math.isnan(value) for value in verdict] == [True, True, False]
        assert "1 of 2 answers hold no verdict, such as 'I like both'" in caplog.text
        assert len(server.bodies) == 3 + 1
        judge.compare(["x"], ["good"], ["bad"])
        assert len(server.bodies) == 3 + 1  # the file has its three answers


def test_the_first_valid_answer_counts(make_judge: Callable[..., Judge]) -> None:
    empty = Reply(200, '{"choices": [{"message": {"content": null}}]}')
    with ChatServer(prefers("good", "bad"), [empty, empty]) as server:
        # No text is an answer and not a fault: it needs no other attempt.
        assert make_judge(server, max_attempts=1).compare(["x"], ["good"], ["bad"]) == [Verdict(1, 1, 1)]
    assert len(server.bodies) == 4


def test_an_interrupted_run_goes_on_where_it_was(make_judge: Callable[..., Judge]) -> None:
    responses = [f"{i}" for i in range(10)]
    ranked = prefers("good", *responses)

    sent: list[bool] = []

    def interrupting(content: str) -> str:
        if len(interrupted.bodies) >= 7 and not sent:  # two threads may pass 7 together
            sent.append(True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return ranked(content)

    busy = Reply(429, headers={"Retry-After": "60"})  # nobody waits for that
    with ChatServer(interrupting, [busy]) as interrupted, pytest.raises(KeyboardInterrupt):
        make_judge(interrupted, concurrency=2).compare(["x"] * 10, ["good"] * 10, responses)
    file = judge_file(make_judge())
    num_kept = file.read_text().count("\n")
    assert num_kept == len(interrupted.bodies) - 1 < 19  # all but the busy one

    # A process that is killed may leave half of a line.
    file.write_bytes(file.read_bytes()[:-20])
    with ChatServer(ranked) as server:
        verdicts = make_judge(server).compare(["x"] * 10, ["good"] * 10, responses)
        assert make_judge(server).compare(["x"] * 10, ["good"] * 10, responses) == verdicts == [Verdict(1, 1, 1)] * 10
    assert len(server.bodies) == 20 - num_kept + 1
    assert sum(line.startswith('{"key"') for line in file.read_text().splitlines()) == 21


def test_a_file_that_cannot_be_used(make_judge: Callable[..., Judge], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"judge\.answers: .* cannot be used: Is a directory"):
        make_judge(answers=str(tmp_path)).compare(["x"], ["good"], ["bad"])


def test_lines_of_another_kind_are_passed_over(make_judge: Callable[..., Judge]) -> None:
    file = judge_file(make_judge())
    file.write_text('\n[1]\n{"key": 1, "answer": 2}\n{"key": "k"}\n\xff\n')
    with ChatServer(prefers("good", "bad")) as server:
        assert make_judge(server).compare(["x"], ["good"], ["bad"]) == [Verdict(1, 1, 1)]


@pytest.mark.parametrize(
    ("answer", "preference"),
    [
        ("Preferred: A", 1),
        ('Comparison: B lacks the point.\n\nPreferred: "B"', 0),
        ("**Preferred:** [[A]]\n", 1),
        ("Comparison: ...\nMore helpful: <B>", 0),
        ("PREFERRED SUMMARY: Summary A.", 1),
        ("Preferred:\nB", 0),
        ("Preferred: tie", 0.5),
        ("More helpful: neither", 0.5),
        ("Both are fine, but the second is shorter.\n**B**", 0),
        ("<think>Preferred: A</think>\nPreferred: B", 0),
        ("Preferred: A, hmm.</think>Preferred: B", 0),
        ("Preferred: A\nPreferred: A", 1),
        ("Preferred: A\nPreferred: B", None),
        ("<think>\nPreferred: A", None),
        ('Preferred: <"A" or "B">', None),
        ("Preferred: A because it says more", None),
        ("Preferred: C", None),
        ("A is better", None),
        ("I would not say that it is preferred: A", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_where_it_is_clear(answer: str, preference: float | None) -> None:
    assert parse_preference(answer) == preference


@pytest.mark.parametrize("template", ["tldr", "dialogue"])
def test_shipped_templates(make_judge: Callable[..., Judge], template: str) -> None:
    prompt = [{"role": "user", "content": "What is {response_b}?"}]
    turns = [*prompt, {"role": "assistant", "content": "A letter."}, {"role": "user", "content": "Which?"}]
    with ChatServer(lambda content: "Preferred: A") as server:
        make_judge(server, template=template, concurrency=1).compare(
            [prompt, turns, " SUBREDDIT: r/x\n"], ["{prompt}"] * 3, ["a\nb"] * 3
        )
    one, _, many, _, text, _ = (body["messages"][0]["content"] for body in server.bodies)
    assert ":\nWhat is {response_b}?\n\n" in one
    assert " A:\n{prompt}\n\n" in one
    assert " B:\na\nb\n\nFIRST" in one
    assert ":\nHuman: What is {response_b}?\n\nAssistant: A letter.\n\nHuman: Which?\n\n" in many
    assert ":\nSUBREDDIT: r/x\n\n" in text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "neither one of dialogue, tldr nor a readable text file"),
        ("{prompt} {response_a} Preferred: A", "has no place for {response_b}"),
        ("{prompt} {response_a} {response_b} Which is better?", "does not ask for a line 'Preferred: ...'"),
    ],
)
def test_templates_that_cannot_work(
    make_judge: Callable[..., Judge], tmp_path: Path, text: str | None, fault: str
) -> None:
    file = tmp_path / "other.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=rf"judge\.template: .*{fault}"):
        make_judge(template=str(file))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", ""),
        ("concurrency", 0),
        ("max_attempts", 0),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("timeout_s", 0.0),
        ("timeout_s", math.nan),
        ("extra_body", {"model": "other"}),
        ("extra_body", {"temperature": 1}),
        ("extra_body", {"at": {1, 2}}),
        ("extra_body", {"top_p": math.nan}),
        ("base_url", "localhost:8000/v1"),
        ("base_url", "http:///v1"),
        ("base_url", "http://host:port/v1"),
        ("base_url", "https://me:secret@judge.example/v1"),
        ("base_url", "http://localhost/v1/chat/completions"),
    ],
)
def test_options_out_of_range(make_judge: Callable[..., Judge], option: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^judge\.{option}\b"):
        make_judge(**{option: value})


def test_a_key_that_is_none(make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "schl\u00fcssel")
    with pytest.raises(InputError, match="what the environment variable OPENAI_API_KEY holds cannot be a key"):
        make_judge()


def test_the_identity_is_of_what_judges(make_judge: Callable[..., Judge]) -> None:
    identity = make_judge().identity
    assert identity.startswith("judge-1/plain/")
    same = make_judge(base_url="http://elsewhere/v1", answers="b.jsonl", concurrency=1, timeout_s=1.0, max_attempts=2)
    assert same.identity == identity
    others = [make_judge(**{name: value}).identity for name, value in OTHERS]
    assert len({identity, *others}) == 1 + len(OTHERS)


OTHERS: list[tuple[str, Any]] = [
    ("model", "judge-2"),
    ("template", "tldr"),
    ("temperature", 1.0),
    ("max_tokens", 9),
    ("extra_body", {"a": 1}),
]


def test_a_judge_in_a_config(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--judge", type=Judge | None)
    init_args = {"model": "m", "base_url": "http://localhost/v1", "extra_body": {"seed": 0}}
    config = parser.parse_string(
        json.dumps({"judge": {"class_path": "lit_isdpo.evaluation.judge.Judge", "init_args": init_args}})
    )
    judge = parser.instantiate_classes(config).judge
    assert judge.identity.startswith("m/tldr/")
    assert pickle.loads(pickle.dumps(judge)).identity == judge.identity  # as processes that are spawned need it
    with pytest.raises(SystemExit):
        parser.parse_args(["--judge=Judge", "--judge.concurrency=many"])


def test_nothing_to_judge(make_judge: Callable[..., Judge], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert make_judge().compare([], [], []) == []
    assert all(math.isnan(value) for value in summarize([]).values())
