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


def test_evaluation_reads_every_row_once_and_equally_many_on_each_rank():
    for world_size in (1, 2, 3, 4):
        ranks = [list(EvaluationOrder(10, world_size=world_size, rank=rank)) for rank in range(world_size)]
        rows = [row for rank in ranks for row in rank]
        assert sorted(row for row in rows if row >= 0) == list(range(10))
        assert len({len(rank) for rank in ranks}) == 1
        assert rows.count(-1) < world_size
