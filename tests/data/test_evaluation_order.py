"""Which rows an evaluation reads, in which order, and that weights which mix pairs mix random ones."""

from itertools import chain
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_isdpo.data.sampling import EvaluationOrder, rows_read
from lit_isdpo.objective.weights import ImportanceWeighting, ShuffledImportanceWeighting
from lit_isdpo.types import InputError
from tests.conftest import pair_logps
from tests.data.test_datamodule import Reader, make_trainer

# Lightning 2.6 asks torch's tree specifications in a way that newer torch warns about.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


class Mixer(Reader):
    """A reader whose weights mix the pairs of a micro-batch."""

    mixes_pairs = True


@pytest.fixture
def long(tmp_path, write_rows) -> tuple[str, Tensor]:
    """1,024 pairs of strongly varying length, the short ones first, and the length of each."""
    normal = torch.randn(1024, generator=torch.Generator().manual_seed(0)).sort().values
    sizes = (20 * normal.exp()).long().clamp(1, 200)
    rows = [
        {"prompt": f"{row:04}", "chosen": f" {'a' * size}", "rejected": " b"} for row, size in enumerate(sizes.tolist())
    ]
    return write_rows(tmp_path / "long.jsonl", rows), sizes.float()


def correlation(batches: list[list[int]], sizes: Tensor) -> float:
    """Of each pair's own weight with the one that it is given, if the length decides the weight."""
    own, given = [], []
    for rows in batches:
        pairs = pair_logps(-sizes[rows], torch.zeros(len(rows)))
        own.append(ImportanceWeighting()(pairs).log_weights)
        given.append(ShuffledImportanceWeighting()(pairs).log_weights)
    return torch.corrcoef(torch.stack([torch.cat(own), torch.cat(given)]))[0, 1].item()


def is_random(batches: list[list[int]], sizes: Tensor) -> bool:
    """Whether the correlation is that of a random order, within five standard deviations.

    Of N pairs in random order, each gives its standardised weight z to the next one of its micro-batch:

        r = 1/N sum_i z_i z_next(i)        E[r] = E[z_a z_b] = -1/(N - 1) of two different rows a and b,

    because the z sum to 0 and their squares to N. With 3 pairs or more in a micro-batch, the N products are of N
    different couples. Two products have a covariance of order 1/N^2, or of 1/N where they share a row, as N couples of
    products do. Hence Var[r] = E[z_a^2 z_b^2] / N = 1/N, but for terms of order 1/N^2.
    """
    num = sum(map(len, batches))
    assert min(map(len, batches)) >= 3
    return abs(correlation(batches, sizes) + 1 / (num - 1)) < 5 / sqrt(num)


@pytest.mark.parametrize("packing", [{}, {"packing_length": 4096}], ids=["padded", "packed"])
@pytest.mark.parametrize("micro_batch_size", [16, 64])
def test_weights_that_mix_pairs_go_to_random_ones(
    micro_batch_size: int, packing: dict[str, Any], make: Any, long: tuple[str, Tensor]
) -> None:
    """In training, validation and test; other weightings' micro-batches are of like length, which the bound sees."""
    file, sizes = long
    options = {"train": file, "val": file, "test": file, "batch_size": 64, "micro_batch_size": micro_batch_size}
    for reader in (Mixer(), Reader()):
        reader.shares_prompts = bool(packing)
        data = make(**options, **packing)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(reader, data)
        trainer.test(reader, data, verbose=False)
        for split in ("train", "val", "test"):
            batches = reader.seen[split]
            assert sorted(row for rows in batches for row in rows) == list(range(1024))
            assert is_random(batches, sizes) == isinstance(reader, Mixer), split


def test_a_step_has_the_rows_of_other_weightings(make: Any, long: tuple[str, Tensor]) -> None:
    """They are only shared out otherwise, and the first rows of an evaluation are the first ones of the file."""
    file, _ = long
    seen = []
    for reader in (Mixer(), Reader()):
        data = make(train=file, val=file, batch_size=64, micro_batch_size=16)
        make_trainer(max_epochs=1, limit_val_batches=0.5).fit(reader, data)
        seen.append(reader.seen)
    mixed, own = seen
    assert mixed["train"] != own["train"]
    for step in range(16):
        micro_batches = slice(4 * step, 4 * step + 4)
        assert set(chain(*mixed["train"][micro_batches])) == set(chain(*own["train"][micro_batches]))
    assert own["val"] == torch.arange(512).view(32, 16).tolist()
    assert mixed["val"] != own["val"]
    assert sorted(chain(*mixed["val"])) == list(range(512))


def test_steps_of_like_length_are_refused_where_weights_mix_pairs(make: Any) -> None:
    with pytest.raises(InputError, match=r"data\.length_window is 2, but model\.weighting mixes .*; leave the option"):
        make_trainer(max_steps=1).fit(Mixer(), make(length_window=2))
    make_trainer(max_steps=1).fit(Mixer(), make(length_window=0))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, [[4, 3], [2, 1], [0]]),
        (1.0, [[4, 3], [2, 1], [0]]),
        (1, [[0, 1]]),
        (True, [[0, 1]]),
        (2, [[0, 1], [2, 3]]),
        (0.7, [[0, 1], [2, 3]]),
        (3, [[0, 1], [2, 3], [4]]),
    ],
    ids=repr,
)
def test_the_longest_rows_come_first_only_where_a_limit_leaves_all(
    limit: float | None, expected: list[list[int]], make: Any, tmp_path: Any, write_rows: Any
) -> None:
    """To Lightning the number 1.0 is all batches, and the number 1 is one."""
    rows = [{"prompt": "p", "chosen": f" {'a' * row}", "rejected": " b"} for row in range(1, 6)]
    file = write_rows(tmp_path / "five.jsonl", rows)
    data, reader = make(train=file, val=file, test=file, eval_batch_size=2), Reader()
    trainer = make_trainer(limit_val_batches=limit, limit_test_batches=limit)
    trainer.validate(reader, data, verbose=False)
    trainer.test(reader, data, verbose=False)
    assert reader.seen["val"] == reader.seen["test"] == expected


def test_rows_that_lightning_reads() -> None:
    for num_rows, batch_size, world_size in ((5, 2, 1), (17, 2, 3), (100, 4, 2), (3, 8, 2)):
        batches = -(-num_rows // (batch_size * world_size))
        orders = [EvaluationOrder(num_rows, world_size=world_size, rank=rank) for rank in range(world_size)]
        for limit in (0, 1, 2, batches, 1000, 0.0, 0.3, 0.5, 1.0):
            taken = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
            read = {row for order in orders for row in list(order)[: taken * batch_size] if row >= 0}
            assert rows_read(limit, num_rows, batch_size, world_size) == len(read)
            assert read == set(range(len(read)))


def test_a_mixed_evaluation_is_the_same_each_time_and_reads_every_row_once() -> None:
    order = list(EvaluationOrder(50, mixed=20))
    assert order == list(EvaluationOrder(50, mixed=20))
    assert sorted(order[:20]) == list(range(20)) != order[:20]
    assert order[20:] == list(range(20, 50))
    ranks = [list(EvaluationOrder(10, mixed=10, world_size=3, rank=rank)) for rank in range(3)]
    assert sorted(chain(*ranks)) == [-1, -1, *range(10)]
