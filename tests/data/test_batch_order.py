import torch

from lit_isdpo.data.sampling import EvaluationOrder, TrainingOrder


def order(num_rows=(23,), **options):
    options = {"weights": [1.0] * len(num_rows), "batch_size": 8, "micro_batch_size": 2} | options
    return TrainingOrder(num_rows, **options)


def test_an_epoch_reads_every_row_at_most_once_and_leaves_others_out_in_the_next():
    left_out = []
    for epoch in range(2):
        rows = list(order(optimizer_step=lambda epoch=epoch: epoch * 2))
        assert len(rows) == len(set(rows)) == 16
        left_out.append(set(range(23)) - set(rows))
    assert left_out[0] != left_out[1]


def test_the_order_is_the_seeds():
    assert list(order(seed=1)) == list(order(seed=1))
    assert list(order(seed=1)) != list(order(seed=2))
    torch.manual_seed(5)
    rows = list(order())
    assert list(order()) == rows, "the global random state has no part in it"


def test_ranks_and_micro_batches_only_share_a_batch_out():
    """Batch 8: four ranks with micro-batches of 1 or 2, or one rank with 8, step on the same rows."""
    whole = order(micro_batch_size=8)
    expected = [set(whole.epoch_order(0)[step * 8 : step * 8 + 8].tolist()) for step in range(2)]
    for world_size, micro_batch_size in ((1, 8), (1, 2), (2, 2), (4, 1), (4, 2)):
        ranks = [
            list(order(world_size=world_size, rank=rank, micro_batch_size=micro_batch_size))
            for rank in range(world_size)
        ]
        per_step = 8 // world_size
        assert [len(rows) for rows in ranks] == [len(order(world_size=world_size))] * world_size
        steps = [[row for rows in ranks for row in rows[step * per_step :][:per_step]] for step in range(2)]
        assert [set(rows) for rows in steps] == expected
        assert all(len(rows) == 8 for rows in steps)


def test_iteration_begins_at_the_optimizer_step_and_crosses_epochs():
    straight = [row for step in (0, 2, 4) for row in order(optimizer_step=lambda step=step: step)]
    for step in range(4):
        rows = list(order(optimizer_step=lambda step=step: step))
        assert rows == straight[step * 8 : step * 8 + 16]


def test_weights_pass_over_a_source_that_often():
    """Rows 0-9 twice, rows 10-29 half: two epochs see each of the former four times, each of the latter once."""
    mixture = order((10, 20), weights=[2.0, 0.5], batch_size=10, micro_batch_size=10)
    epochs = [mixture.epoch_order(epoch) for epoch in range(2)]
    assert [len(rows) for rows in epochs] == [30, 30]
    assert torch.bincount(torch.cat(epochs), minlength=30).tolist() == [4] * 10 + [1] * 20
    assert not set(epochs[0].tolist()) & set(epochs[1].tolist()) & set(range(10, 30))


def test_the_order_is_pinned():
    """A run that began with an earlier version goes on in the same order."""
    assert list(order((6,), batch_size=3, micro_batch_size=3)) == [3, 4, 5, 0, 1, 2]


LENGTHS = torch.arange(23) * 7 % 23


def by_step(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + 8] for start in range(0, len(rows), 8)]


def test_lengths_deal_the_same_rows_out_to_the_micro_batches_of_a_step():
    plain, dealt = by_step(list(order())), by_step(list(order(lengths=LENGTHS)))
    assert [set(rows) for rows in dealt] == [set(rows) for rows in plain]
    assert dealt != plain
    for rows in dealt:
        assert LENGTHS[rows].tolist() == sorted(LENGTHS[rows].tolist(), reverse=True)
    ranks = [list(order(lengths=LENGTHS, world_size=2, rank=rank, micro_batch_size=2)) for rank in range(2)]
    assert ranks[0][:2] + ranks[1][:2] == dealt[0][:4], "ranks that wait for each other have rows of like length"


def test_balanced_micro_batches_are_equally_long_in_sum():
    """Rows of lengths 8 to 1, dealt to and fro to four micro-batches: 8 + 1, 7 + 2, 6 + 3, 5 + 4."""
    rows = list(order((8,), lengths=torch.arange(1, 9), balanced=True))
    assert (torch.tensor(rows) + 1).view(4, 2).tolist() == [[8, 1], [7, 2], [6, 3], [5, 4]]


def test_a_window_groups_its_steps_by_length_and_keeps_its_rows():
    """Rows of four steps in one window: each step holds eight neighbours, and the steps come in random order."""
    lengths = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    options = {"lengths": lengths, "length_window": 4}
    steps = by_step(list(order((32,), **options)))
    neighbours = [sorted(lengths[rows].tolist()) for rows in steps]
    assert sorted(neighbours) == [list(range(start, start + 8)) for start in range(0, 32, 8)]
    assert neighbours != sorted(neighbours)
    again = by_step(list(order((32,), **options, optimizer_step=lambda: 4)))
    assert again != steps, "another epoch, another order"
    assert list(order((32,), **options, optimizer_step=lambda: 2))[:16] == [row for rows in steps[2:] for row in rows]


def test_evaluation_reads_the_longest_rows_first_where_it_is_told_lengths():
    lengths = torch.tensor([3, 9, 1, 9])
    assert list(EvaluationOrder(4, lengths=lengths)) == [1, 3, 0, 2]
    assert list(EvaluationOrder(4, lengths=lengths[:4], world_size=3, rank=1)) == [3, -1]


def test_evaluation_reads_every_row_once_and_equally_many_on_each_rank():
    for world_size in (1, 2, 3, 4):
        ranks = [list(EvaluationOrder(10, world_size=world_size, rank=rank)) for rank in range(world_size)]
        rows = [row for rank in ranks for row in rank]
        assert sorted(row for row in rows if row >= 0) == list(range(10))
        assert len({len(rank) for rank in ranks}) == 1
        assert rows.count(-1) < world_size
