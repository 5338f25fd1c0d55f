"""The frozen model that the policy is measured against."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model
from lit_isdpo.types import SequenceLogps, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Which model is the reference.

    Args:
        path: folder or hub id; by default the policy's own, as it was before training.
        revision: branch, tag or commit of a hub id.
    """

    path: str | None = None
    revision: str | None = None


class Reference(Protocol):
    """What training and evaluation ask of a reference.

    None of its kinds is an ``nn.Module``, so that the policy's module cannot register it: checkpoints then hold the
    policy alone. The price is that nobody moves it to a device but ``to``.
    """

    def to(self, device: torch.device) -> "Reference":
        """Moves the weights."""
        ...

    def logps(self, tokens: TokenBatch) -> SequenceLogps:
        """Log-probs of the completions under the reference, without gradient."""
        ...

    def scoring(self) -> AbstractContextManager[LogProbModel]:
        """The reference as a model, to be sampled or asked for whole distributions, inside the context alone."""
        ...


class ResidentReference:
    """A frozen copy in memory, in the policy's numerics: one code path, dtype and kernel, so log-ratios start at 0."""

    def __init__(self, model: LogProbModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> "ResidentReference":
        """Moves the weights."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def logps(self, tokens: TokenBatch) -> SequenceLogps:
        """Log-probs of the completions under the reference, without gradient."""
        output: SequenceLogps = self.model(tokens)
        return output

    def scoring(self) -> AbstractContextManager[LogProbModel]:
        """The copy itself."""
        return nullcontext(self.model)


class AdapterOffReference:
    """The policy with its adapter switched off: no second model in memory.

    The adapter is on again before anybody's backward pass, so what gradient checkpointing computes anew there is the
    policy's.

    Args:
        policy: a model with an adapter.
    """

    def __init__(self, policy: LogProbModel) -> None:
        assert policy.adapter is not None
        self._policy = policy
        self._adapter = policy.adapter

    def to(self, device: torch.device) -> "AdapterOffReference":
        """Does nothing: the weights are the policy's, which moves with its module."""
        return self

    @torch.no_grad()
    def logps(self, tokens: TokenBatch) -> SequenceLogps:
        """Log-probs of the completions under the base model, without gradient."""
        with self._adapter.switched_off():
            output: SequenceLogps = self._policy(tokens)
        return output

    @contextmanager
    def scoring(self) -> Iterator[LogProbModel]:
        """The policy, which is the reference in here."""
        with self._adapter.switched_off():
            yield self._policy


def load_reference(config: PolicyConfig, reference: ReferenceConfig, policy: LogProbModel) -> Reference:
    """The reference of a policy, in its numerics: its own base where it has an adapter, else a copy.

    Args:
        config: the policy's.
        reference: the reference's; one that names another model, or another revision, is always loaded.
        policy: the model that is trained.

    Raises:
        InputError: as ``load_causal_lm``.
    """
    own_base = reference.path is None and reference.revision in (None, config.revision)
    if policy.adapter is not None and own_base:
        return AdapterOffReference(policy)
    return ResidentReference(load_logprob_model(reference_as_policy(config, reference), option="model.reference.path"))


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
