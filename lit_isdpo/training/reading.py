"""How a run and its data module agree: the run hands over what the data must know, and Lightning gets whole steps."""

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_isdpo.data.collation import Reader
from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.sampling import limited_steps
from lit_isdpo.policy.sharding import all_ranks
from lit_isdpo.types import InputError, Ranks


def find_data(trainer: Trainer) -> TextDataModule | None:
    """The trainer's data module; ``None`` if it was given loaders of the user's own, with batches of our types."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TextDataModule) else None


def data_of(trainer: Trainer) -> TextDataModule:
    """The trainer's data module.

    Raises:
        InputError: it has none of ours.
    """
    data = find_data(trainer)
    if data is None:
        raise InputError("data: pass a PreferenceDataModule or an SFTDataModule to the trainer.")
    return data


def ranks_of(trainer: Trainer) -> Ranks:
    """The trainer's processes."""
    return all_ranks() if trainer.world_size > 1 else Ranks()


def hand_over(
    trainer: Trainer,
    data: TextDataModule,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    first_without_row: int | None = None,
    mixes_pairs: bool = False,
    shares_prompts: Callable[[], bool] = lambda: False,
) -> None:
    """Tells a data module who reads its rows, and the trainer how many micro-batches a step of the data has.

    A module does so in ``configure_callbacks``: of all hooks that one comes first, on every rank and for every verb. It
    also returns a ``WholeSteps`` there.

    Args:
        trainer: of the run.
        data: its data module.
        tokenizer: as in ``Reader``, like all that follow.
        first_without_row: the first token id without a row in the model's embedding.
        mixes_pairs: whether a pair's weight depends on the others of its micro-batch.
        shares_prompts: whether the model wants one row per pair.

    Raises:
        InputError: the ranks do not divide the batch, or gradients are to be accumulated otherwise.
    """
    untyped: Any = trainer
    data.read_for(
        Reader(
            stage="fit" if trainer.state.fn is None else trainer.state.fn.value,
            world_size=trainer.world_size,
            rank=lambda: trainer.global_rank,
            step=lambda: trainer.global_step,
            limits={"val": untyped.limit_val_batches, "test": untyped.limit_test_batches},
            pin_memory=trainer.strategy.root_device.type == "cuda",
            tokenizer=tokenizer,
            first_without_row=first_without_row,
            mixes_pairs=mixes_pairs,
            shares_prompts=shares_prompts,
        )
    )
    if trainer.state.fn != TrainerFn.FITTING:
        return
    accumulation = data.split_batch(trainer.world_size)[1]
    if trainer.accumulate_grad_batches not in (1, accumulation):
        raise InputError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but data.batch_size "
            f"and data.micro_batch_size make it {accumulation}; leave it out"
        )
    trainer.accumulate_grad_batches = accumulation


def steps_per_epoch(trainer: Trainer, data: TextDataModule) -> int:
    """Optimizer steps of an epoch, the trainer's limit counted in."""
    limit = trainer.limit_train_batches
    return limited_steps(limit, data.order.steps_per_epoch, trainer.accumulate_grad_batches)


def total_steps(trainer: Trainer, data: Callable[[], TextDataModule]) -> int:
    """Optimizer steps of the whole fit; the data is asked only if the trainer counts epochs.

    Lightning's ``estimated_stepping_batches`` is not read: it sets up the loaders before their state is restored.

    Raises:
        InputError: the trainer has no limit.
    """
    limits = []
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        limits.append(trainer.max_epochs * steps_per_epoch(trainer, data()))
    if not limits:
        raise InputError("trainer: set max_epochs or max_steps, so that the end of the schedule is known.")
    return min(limits)


class WholeSteps(Callback):
    """Makes Lightning's limits of a fit whole optimizer steps, and gives the trainer its own back after it.

    Lightning would make the last step of a part of its micro-batches.
    """

    def __init__(self) -> None:
        self._before: tuple[int | float, int | float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the limits of a fit, by the order of its rows."""
        data, untyped = find_data(trainer), cast(Any, trainer)
        if stage != "fit" or data is None:
            return
        self._before = untyped.limit_train_batches, untyped.overfit_batches
        limit, micro_batches = untyped.limit_train_batches, trainer.accumulate_grad_batches
        if not limit:
            return
        steps = steps_per_epoch(trainer, data)
        given = limit if isinstance(limit, int) else int(limit * data.order.steps_per_epoch * micro_batches)
        if given < steps * micro_batches:
            rank_zero_info(
                f"An epoch is limited to {steps:,} optimizer step(s) of {micro_batches:,} micro-batches, and not to "
                f"{given:,} micro-batches, which would cut the last step."
            )
        untyped.limit_train_batches = steps * micro_batches
        # Lightning would put a sampler of its own in place of this order, and every rank would read the same rows.
        data.order.num_repeated = steps if untyped.overfit_batches else None
        untyped.overfit_batches = 0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets them back."""
        if stage == "fit" and self._before is not None:
            untyped: Any = trainer
            untyped.limit_train_batches, untyped.overfit_batches = self._before
            self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does the same after a fit that failed: Lightning calls no ``teardown`` hook then."""
        self.teardown(trainer, pl_module, "fit")
