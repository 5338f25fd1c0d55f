"""The frozen model that the policy is measured against."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import PreferenceBatch, SequenceLogps


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Which model is the reference.

    Args:
        path: folder or hub id; by default the policy's own, as it was before training.
        revision: branch, tag or commit of a hub id.
        cache: compute the reference's log-probs of all rows once, before training, and hold no reference in it. They
            are found again by later runs, whatever their method, as long as reference, rows and numerics are the same.
        cache_dir: folder of the cache. Default: ``reference_logps`` in the trainer's ``default_root_dir``.
    """

    path: str | None = None
    revision: str | None = None
    cache: bool = False
    cache_dir: str | None = None

    def folder(self, root_dir: str) -> Path:
        """Where cached log-probs lie, given the trainer's ``default_root_dir``."""
        return Path(self.cache_dir or Path(root_dir) / "reference_logps")


class Reference:
    """A model that is asked: the policy itself, for example, until it has learned something.

    It is no ``nn.Module``, so that the policy's module cannot register it: checkpoints then hold only the policy. The
    price is that nothing but ``to`` moves it to a device.

    Args:
        model: asked as it is, with its adapter if it has one.

    Attributes:
        is_live: whether ``logps`` costs a forward.
    """

    is_live = True

    def __init__(self, model: LogProbModel) -> None:
        self.model = model

    def to(self, device: torch.device) -> Self:
        """Moves the weights."""
        if not self.model.is_sharded:  # else it was made where it stays
            self.model.to(device)
        return self

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """``(2B,)`` log-probs of a batch's completions under the reference, in nats, without gradient."""
        with self.scoring() as model:
            output: SequenceLogps = model(batch.tokens)
        return output.logps

    def scoring(self) -> AbstractContextManager[LogProbModel]:
        """The reference as a model, to be sampled or asked for whole distributions, only inside the context."""
        return nullcontext(self.model)

    def release(self) -> None:
        """Frees what ``scoring`` needs and ``logps`` does not."""


class ResidentReference(Reference):
    """A frozen copy in memory, in the policy's numerics: one code path, dtype and kernel, so log-ratios start at 0."""

    def __init__(self, model: LogProbModel) -> None:
        super().__init__(model.eval().requires_grad_(False))


class AdapterOffReference(Reference):
    """The policy with its adapter switched off: no second model in memory.

    The adapter is on again before a backward pass begins, so what gradient checkpointing recomputes there is the
    policy's.
    """

    @contextmanager
    def scoring(self) -> Iterator[LogProbModel]:
        """The policy, which is the reference inside the context."""
        assert self.model.adapter is not None
        with self.model.adapter.switched_off():
            yield self.model


class CachedReference(Reference):
    """Log-probs that were computed before, by row; the model is loaded where it is asked for more, and until released.

    Args:
        logps: by split, ``(lines of the split's table, 2)`` float32 in nats, chosen and rejected; NaN where a line is
            no row of the split.
        load: loads the reference.
    """

    is_live = False

    def __init__(self, logps: dict[str, Tensor], load: Callable[[], Reference]) -> None:
        self._logps = logps
        self._load = load
        self._loaded: Reference | None = None
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> Self:
        """Moves the values, and later what is loaded."""
        self._device = device
        self._logps = {split: values.to(device) for split, values in self._logps.items()}
        return self

    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """The rows' values; 0 for a pair that only fills up a batch."""
        values = self._logps[split][batch.row_ids.clamp(min=0)]
        return values.masked_fill((batch.row_ids < 0)[:, None], 0).T.flatten()

    @contextmanager
    def scoring(self) -> Iterator[LogProbModel]:
        """The reference, loaded where it is not there; an evaluation asks for it batch by batch."""
        if self._loaded is None:
            self._loaded = self._load()
        with self._loaded.to(self._device).scoring() as model:
            yield model

    def release(self) -> None:
        """Frees the model."""
        if self._loaded is not None:
            self._loaded = None
            gc.collect()  # a sharded model has references to itself


def load_reference(
    config: PolicyConfig,
    reference: ReferenceConfig,
    policy: LogProbModel,
    load: Callable[..., LogProbModel],
) -> Reference:
    """Makes the reference of a policy, in its numerics: its own base if it has an adapter, else a copy.

    Args:
        config: the policy's.
        reference: the reference's; one that names another model, or another revision, is always loaded.
        policy: the model that is trained.
        load: makes a model of a configuration, whole, in parts or without weights.

    Raises:
        InputError: as ``load_causal_lm``.
    """
    is_own_base = reference.path is None and reference.revision in (None, config.revision)
    if policy.adapter is not None and is_own_base:
        return AdapterOffReference(policy)
    return ResidentReference(load(reference_as_policy(config, reference), option="model.reference.path"))


def reference_as_policy(policy: PolicyConfig, reference: ReferenceConfig) -> PolicyConfig:
    """The reference's model in the policy's numerics, without the policy's adapter."""
    revision = reference.revision if reference.path else reference.revision or policy.revision
    return replace(
        policy,
        path=reference.path or policy.path,
        revision=revision,
        init="pretrained",
        gradient_checkpointing=False,
        peft=None,
    )


def starts_at_reference(policy: PolicyConfig, reference: ReferenceConfig) -> bool:
    """Whether a policy's weights before training are its reference's."""
    loaded = reference_as_policy(policy, reference)
    return policy.init == "pretrained" and (loaded.path, loaded.revision) == (policy.path, policy.revision)
