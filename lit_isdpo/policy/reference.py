"""The frozen model that the policy is measured against."""

from dataclasses import dataclass, replace

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


class ResidentReference:
    """A frozen copy in memory, in the policy's numerics: one code path, dtype and kernel, so log-ratios start at 0.

    It is not an ``nn.Module``, so that the policy's module cannot register it: checkpoints then hold the policy
    alone. The price is that nobody moves it to a device but ``to``.
    """

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


def load_reference(policy: PolicyConfig, reference: ReferenceConfig) -> ResidentReference:
    """Loads the reference in the policy's numerics; errors as those of ``load_causal_lm``."""
    return ResidentReference(load_logprob_model(reference_as_policy(policy, reference), option="model.reference.path"))


def reference_as_policy(policy: PolicyConfig, reference: ReferenceConfig) -> PolicyConfig:
    """The reference's model in the policy's numerics."""
    revision = reference.revision if reference.path else reference.revision or policy.revision
    return replace(
        policy, path=reference.path or policy.path, revision=revision, init="pretrained", gradient_checkpointing=False
    )
