"""Responses in files: what is there is not computed again, what is torn is, and every rank sees all of it."""

import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lit_isdpo.evaluation.store import RESPONSES, Columns, ResponseSet
from lit_isdpo.types import InputError, ProbePrompt, Ranks, Response

IDS = [[1, 5, 6, 7], [1, 8], [1, 9, 10], [1, 11]]  # by length: 1, 3, 2, 0
PROMPTS = [ProbePrompt(ids, f"prompt {row}", "", 10 + row, "") for row, ids in enumerate(IDS)]
ABOUT = {"weights": "a", "seed": 0}


class Draw:
    """Two responses a prompt, which name it; counts what it is asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.shards: list[int] = []
        self.fails_at = fails_at

    def __call__(self, rows: list[int], shard: int) -> list[list[Response]]:
        if shard == self.fails_at:
            raise KeyboardInterrupt
        self.shards.append(shard)
        return [[Response([row, number], number == 0) for number in range(2)] for row in rows]


def filled(root: Path, draw: Draw, ranks: Ranks = Ranks(), about: dict[str, Any] = ABOUT) -> ResponseSet:  # noqa: B008
    responses = ResponseSet(root, about, PROMPTS, num_responses=2, shard_size=3, ranks=ranks)

    def columns(shard: int) -> Columns:
        drawn = [one for some in draw(responses.shards[shard], shard) for one in some]
        ids = [one.token_ids for one in drawn]
        return {"token_ids": ids, "finished": [one.finished for one in drawn], "response": list(map(str, ids))}

    responses.fill(RESPONSES, columns, "sampling")
    return responses


def scored(responses: ResponseSet, name: str = "length") -> list[int]:
    """Fills a column with each prompt's number, and returns the shards that it was computed for."""
    shards = []

    def columns(shard: int) -> Columns:
        shards.append(shard)
        return {name: [float(prompt.row_id - 10) for prompt in responses.asked(shard)]}

    responses.fill(name, columns, "scoring")
    return shards


def test_shards_go_by_length_and_tensors_by_the_callers_order(tmp_path: Path) -> None:
    responses = filled(tmp_path, Draw())
    assert responses.shards == [[1], [3], [2], [0]], "whole prompts: two responses fit into three places"
    assert scored(responses) == [0, 1, 2, 3]
    assert responses.tensor("length", "length").tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert responses.tensor(RESPONSES, "finished").tolist() == [[1, 0]] * 4
    assert responses.values(RESPONSES, "response")[2] == ["[2, 0]", "[2, 1]"]


def test_a_second_evaluation_computes_nothing_and_other_weights_everything(tmp_path: Path) -> None:
    first = filled(tmp_path, Draw())
    scored(first)
    again = Draw()
    second = filled(tmp_path, again)
    assert again.shards == []
    assert scored(second) == []
    assert scored(second, "another") == [0, 1, 2, 3]
    assert second.tensor("length", "length").equal(first.tensor("length", "length"))
    other = Draw()
    filled(tmp_path, other, about={**ABOUT, "weights": "b"})
    assert other.shards == [0, 1, 2, 3]


def test_an_interrupted_one_goes_on_and_torn_files_are_written_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Draw(fails_at=2))
    rest = Draw()
    responses = filled(tmp_path, rest)
    assert rest.shards == [2, 3]
    torn = responses.folder / "shards" / RESPONSES / "00001.parquet"
    torn.write_bytes(torn.read_bytes()[:100])
    (responses.folder / "shards" / RESPONSES / "00003.parquet").write_bytes(b"")
    again = Draw()
    filled(tmp_path, again)
    assert again.shards == [1, 3]


def test_everything_side_by_side_in_one_file(tmp_path: Path) -> None:
    responses = filled(tmp_path, Draw())
    scored(responses)
    responses.save()
    later = filled(tmp_path, Draw())  # knows nothing of "length", and keeps it
    scored(later, "another")
    later.save()
    table = pd.read_parquet(responses.file)
    assert list(table) == ["row_id", "number", "prompt", "token_ids", "finished", "response", "another", "length"]
    assert table.row_id.tolist() == [10, 10, 11, 11, 12, 12, 13, 13]
    assert table.number.tolist() == [0, 1] * 4
    assert table.response[5] == "[2, 1]"
    assert table.length.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def on_two_ranks(work: Any) -> list[Any]:
    """What ``work(ranks)`` gives, or raises, on each of two ranks."""
    barrier, parts, results = threading.Barrier(2, timeout=10), [None, None], [None, None]

    def run(rank: int) -> None:
        def gather(own: Any) -> list[Any]:
            parts[rank] = own
            barrier.wait()
            everyone = list(parts)
            barrier.wait()
            return everyone

        try:
            results[rank] = work(Ranks(rank, 2, gather))
        except InputError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_ranks_share_the_work_and_know_the_same(tmp_path: Path) -> None:
    draws = [Draw(), Draw()]
    sets = on_two_ranks(lambda ranks: filled(tmp_path, draws[ranks.rank], ranks))
    assert [draw.shards for draw in draws] == [[0, 2], [1, 3]]
    assert sets[0].values(RESPONSES, "response") == sets[1].values(RESPONSES, "response")
    alone = Draw()
    assert filled(tmp_path, alone).values(RESPONSES, "response") == sets[0].values(RESPONSES, "response")
    assert alone.shards == [], "another number of ranks goes on with the same shards"


def test_where_one_rank_fails_all_do(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        def columns() -> Columns:
            raise InputError("the key is wrong")

        filled(tmp_path, Draw(), ranks).fill_at_once("judge", columns)

    assert on_two_ranks(work) == ["the key is wrong"] * 2


def test_what_is_not_settled_is_asked_again(tmp_path: Path) -> None:
    calls = []

    def columns() -> Columns:
        calls.append(1)
        return {"score": [1.0] * 7 + [-1.0 if len(calls) == 1 else 0.0]}

    for _ in range(3):
        responses = filled(tmp_path, Draw())
        responses.fill_at_once("judge", columns, lambda part: -1.0 not in part["score"])
    assert len(calls) == 2
    assert responses.tensor("judge", "score").tolist() == [*[[1.0, 1.0]] * 3, [1.0, 0.0]], (
        "prompt by prompt in the caller's order"
    )
