"""Which rows make up which batch: a function of the seed and the optimizer step, and of nothing else.

The rows of an optimizer step are one slice of the epoch's permutation; ranks and micro-batches only share it out. With
``batch_size`` 4, ``micro_batch_size`` 1 and 2 ranks, an epoch over the 9 rows ``a`` to ``i`` may read

    permutation  d g a i   b h c f   e        the rest, e, is left out in this epoch
    step         0         1
    rank 0       d a       b c                one row a micro-batch, two micro-batches a step
    rank 1       g i       h f

Training goes on at the step that the trainer is at, so that a run that was resumed reads what it would have read.

Where the rows' lengths are known, those of a step are dealt out to its micro-batches by length, so that little of them
is padding. That changes no gradient but by rounding: the rows of the step are the same. It would where a pair's weight
depends on the others of its micro-batch. The training rows of such a run stay where the permutation has them, and an
evaluation of it reads a permutation too.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lit_isdpo.data.collation import Reader
from lit_isdpo.types import InputError

if TYPE_CHECKING:
    from lit_isdpo.data.sources import DataSource
    from lit_isdpo.data.tokenized_rows import Rows


class TrainingOrder(DistributedSampler[int]):
    """Row indices for one rank, micro-batch after micro-batch.

    It is a ``DistributedSampler`` because Lightning leaves the sharing-out to one.

    Args:
        num_rows: rows of each source; indices count through the sources one after another.
        weights: how many times an epoch passes over each source. A source is read as an endless stream of permutations,
            of which an epoch takes the next ``weight * num_rows``: with 0.5, two epochs see every row once.
        batch_size: rows of an optimizer step, over all ranks.
        micro_batch_size: rows of a forward on one rank.
        world_size: number of ranks; ``micro_batch_size * world_size`` divides ``batch_size``.
        rank: this rank.
        seed: of all permutations.
        optimizer_step: says how many optimizer steps were taken, whenever an iteration begins.
        lengths: ``(sum(num_rows),)`` int64, positions of each row. ``None`` leaves rows where the permutation has them.
        length_window: optimizer steps whose rows are shared out by length together. From 2 on, the rows of
            a step are of like length, and which rows these are is less random than a permutation.
        balanced: whether micro-batches are to be equally long in sum, as packed rows want, instead of holding rows of
            like length, as padded ones do.

    Attributes:
        num_repeated: the first steps of the first epoch, if they are read again and again, and no others.

    >>> order = TrainingOrder([9], weights=[1.0], batch_size=4, micro_batch_size=2)
    >>> order.steps_per_epoch, len(list(order))
    (2, 8)
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        *,
        weights: Sequence[float],
        batch_size: int,
        micro_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        optimizer_step: Callable[[], int] = lambda: 0,
        lengths: Tensor | None = None,
        length_window: int = 1,
        balanced: bool = False,
    ) -> None:
        assert batch_size % (micro_batch_size * world_size) == 0
        rows: Any = range(sum(num_rows))  # all that the parent does with its data set is to take the length
        super().__init__(rows, num_replicas=world_size, rank=rank, seed=seed)
        self.num_rows, self.weights = list(num_rows), list(weights)
        self.rows_per_epoch = [round(weight * rows) for weight, rows in zip(weights, num_rows, strict=True)]
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.optimizer_step = optimizer_step
        self.lengths = lengths
        self.length_window = length_window
        self.balanced = balanced
        self.steps_per_epoch = sum(self.rows_per_epoch) // batch_size
        self.num_repeated: int | None = None

    def __len__(self) -> int:
        """Rows that this rank reads in an epoch. Lightning counts on the whole epoch's, also after a resume."""
        return self.steps_per_epoch * self.batch_size // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """One epoch's worth of rows, from the trainer's step on; past the end of an epoch comes the next one."""
        first = self.optimizer_step()
        epoch, order = -1, torch.empty(0)
        for number in range(first, first + self.steps_per_epoch):
            step = number if self.num_repeated is None else number % self.num_repeated
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = self.epoch_order(epoch)
            start = step % self.steps_per_epoch * self.batch_size
            batch = self._deal(order[start : start + self.batch_size])
            yield from batch.view(-1, self.num_replicas, self.micro_batch_size)[:, self.rank].flatten().tolist()

    def _deal(self, rows: Tensor) -> Tensor:
        """The rows of a step in the order of its micro-batches, the longest first: what is too large fails at once."""
        if self.lengths is None:
            return rows
        rows = rows[self.lengths[rows].argsort(descending=True, stable=True)]
        if not self.balanced:
            return rows
        rounds = rows.view(self.micro_batch_size, -1).clone()
        rounds[1::2] = rounds[1::2].flip(1)  # to and fro, so that nobody is always dealt the longest
        return rounds.T.flatten()

    @property
    def num_unused(self) -> int:
        """Rows of an epoch that fill no optimizer step."""
        return int(sum(self.rows_per_epoch)) - self.steps_per_epoch * self.batch_size

    def state(self, rows: "Rows") -> dict[str, Any]:
        """What the order follows from, for a checkpoint; the place in it is the trainer's step."""
        return {
            "tokens of rows": hashlib.blake2b(rows.keys().numpy().tobytes(), digest_size=8).hexdigest(),
            "weights": self.weights,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "length_window": self.length_window,
        }

    def epoch_order(self, epoch: int) -> Tensor:
        """The rows of an epoch, ``(N,)`` int64, in the order in which batches are cut from them."""
        offsets = torch.tensor([0, *self.num_rows]).cumsum(0).tolist()
        rows = torch.cat([offsets[source] + self._next_rows(source, epoch) for source in range(len(self.num_rows))])
        rows = rows[permutation(len(rows), self.seed, "epoch", epoch)]
        if self.lengths is None or self.length_window <= 1:
            return rows
        parts = []
        whole = rows[: self.steps_per_epoch * self.batch_size]
        for number, window in enumerate(whole.split(self.length_window * self.batch_size)):
            steps = window[self.lengths[window].argsort(stable=True)].view(-1, self.batch_size)
            parts.append(steps[permutation(len(steps), self.seed, "window", epoch, number)].flatten())
        return torch.cat(parts)

    def _next_rows(self, source: int, epoch: int) -> Tensor:
        size, count = self.num_rows[source], self.rows_per_epoch[source]
        start = epoch * count
        passes = range(start // max(size, 1), -(-(start + count) // max(size, 1)))
        stream = [permutation(size, self.seed, "source", source, number) for number in passes]
        skip = start - passes.start * size
        return torch.cat([torch.empty(0, dtype=torch.long), *stream])[skip : skip + count]


def split_batch(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of an optimizer step, on each rank.

    Args:
        batch_size: rows of an optimizer step, over all ranks.
        micro_batch_size: rows of a forward on one rank; ``None`` does not accumulate.
        world_size: number of ranks.

    Raises:
        InputError: they do not divide the batch.
    """
    if batch_size % ((micro_batch_size or 1) * world_size):
        by = f"data.micro_batch_size {micro_batch_size} x {world_size} rank(s) does" if micro_batch_size else ""
        raise InputError(f"data.batch_size is {batch_size}, which {by or f'{world_size} ranks do'} not divide")
    rows = micro_batch_size or batch_size // world_size
    return rows, batch_size // (rows * world_size)


def limited_steps(limit: int | float, steps_per_epoch: int, micro_batches: int) -> int:
    """Optimizer steps of an epoch under Lightning's limit of micro-batches; one that the limit would cut is whole.

    Args:
        limit: an integer is a number of micro-batches, a float is a share of them; above 0.
        steps_per_epoch: optimizer steps of the whole epoch.
        micro_batches: of an optimizer step, on each rank.

    >>> limited_steps(3, 10, 2), limited_steps(1.0, 10, 2), limited_steps(0.01, 10, 2), limited_steps(50, 10, 2)
    (2, 10, 1, 10)
    """
    given = limit if isinstance(limit, int) else int(limit * steps_per_epoch * micro_batches)
    return min(steps_per_epoch, max(1, -(-given // micro_batches)))


def check_random_order(length_window: int) -> None:
    """Raises where steps are to be grouped by length, and the weights mix the pairs of a micro-batch.

    Args:
        length_window: optimizer steps whose rows are grouped by length; up to 1 the steps are random.

    Raises:
        InputError: it is more than 1.
    """
    if length_window > 1:
        raise InputError(
            f"data.length_window is {length_window}, but model.weighting mixes the pairs of a micro-batch, which must "
            "not be chosen by their length; leave the option out."
        )


def training_order(
    rows: "Rows", num_rows: Sequence[int], sources: Sequence["DataSource"], reader: Reader, **options: Any
) -> TrainingOrder:
    """The order of the training rows of some sources, by length if the options of ``TrainingOrder`` allow it.

    Raises:
        InputError: a source has no row in an epoch, an epoch has no step, or steps must be random and may not be.
    """
    if reader.mixes_pairs:
        check_random_order(options["length_window"])
    order = TrainingOrder(
        num_rows,
        weights=[source.weight for source in sources],
        world_size=reader.world_size,
        rank=reader.rank(),
        optimizer_step=lambda: reader.step(),
        lengths=rows.lengths() if options["length_window"] > 0 and not reader.mixes_pairs else None,
        **options,
    )
    for source, number in zip(sources, order.rows_per_epoch, strict=True):
        if number == 0:
            raise InputError(f"data.train: the weight {source.weight} of {source.path!r} leaves no row of it")
    if order.steps_per_epoch == 0:
        raise InputError(
            f"data.batch_size is {order.batch_size}, more than the {sum(order.rows_per_epoch)} rows of an epoch of "
            "data.train"
        )
    return order


def rows_read(limit: int | float, num_rows: int, batch_size: int, world_size: int) -> int:
    """Rows, over all ranks, that an evaluation reads under one of Lightning's limits.

    Args:
        limit: an integer is a number of batches, a float is a share of them.
        num_rows: rows that there are.
        batch_size: rows of a forward on one rank.
        world_size: number of ranks.

    >>> rows_read(1, 100, 4, 2), rows_read(1.0, 100, 4, 2), rows_read(0.5, 100, 4, 2)
    (8, 100, 48)
    """
    batches = -(-num_rows // (batch_size * world_size))
    taken = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    return min(num_rows, taken * batch_size * world_size)


class EvaluationOrder(DistributedSampler[int]):
    """Every row once over the ranks; -1 fills up, so that no rank waits for another's last batch.

    Args:
        num_rows: rows to evaluate.
        world_size: number of ranks.
        rank: this rank.
        lengths: ``(num_rows,)`` positions of each row, where the longest are to come first; by default rows come in
            their own order.
        mixed: how many of the first rows are permuted instead, the same way in every evaluation. Rows of a file may be
            sorted by length or by prompt, so their own order would not be random.

    >>> [list(EvaluationOrder(5, world_size=2, rank=rank)) for rank in range(2)]
    [[0, 2, 4], [1, 3, -1]]
    """

    def __init__(
        self, num_rows: int, *, world_size: int = 1, rank: int = 0, lengths: Tensor | None = None, mixed: int = 0
    ) -> None:
        rows: Any = range(num_rows)
        super().__init__(rows, num_replicas=world_size, rank=rank, shuffle=False)
        self.num_rows = num_rows
        if lengths is not None:
            self.order = lengths.argsort(descending=True, stable=True).tolist()
        else:
            self.order = [*permutation(mixed, "evaluation").tolist(), *range(mixed, num_rows)]

    def __len__(self) -> int:
        return -(-self.num_rows // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        for row in range(self.rank, len(self) * self.num_replicas, self.num_replicas):
            yield self.order[row] if row < self.num_rows else -1


def evaluation_order(
    rows: "Rows", reader: Reader, limit: int | float, batch_size: int, *, by_length: bool, in_own_order: bool
) -> EvaluationOrder:
    """In the rows' own order; if all are read, by length; if the weights mix pairs, in random order."""
    if in_own_order:
        return EvaluationOrder(len(rows), world_size=reader.world_size, rank=reader.rank())
    reads_all = isinstance(limit, float) and limit == 1.0  # the integer 1 is one batch
    return EvaluationOrder(
        len(rows),
        world_size=reader.world_size,
        rank=reader.rank(),
        lengths=rows.lengths() if by_length and reads_all and not reader.mixes_pairs else None,
        # Permuted are those that are read, which are the same as those of other weightings.
        mixed=rows_read(limit, len(rows), batch_size, reader.world_size) if reader.mixes_pairs else 0,
    )


class TrainingLoader(DataLoader[Any]):
    """A ``DataLoader`` that Lightning knows to be resumable: its place is the trainer's step, which is saved anyway."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def permutation(size: int, *key: int | str) -> Tensor:
    """A permutation of ``range(size)`` that only its key decides."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randperm(size, generator=generator)
