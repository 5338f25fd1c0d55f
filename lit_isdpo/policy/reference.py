"""The frozen model that the policy is measured against."""

from dataclasses import dataclass, replace

import torch

from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model
from lit_isdpo.types import InputError, SequenceLogps, TokenBatch


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
    """Loads the reference in the policy's numerics.

    Raises:
        InputError: the policy starts from random weights and no reference is named.
    """
    if reference.path is None and policy.init == "random":
        raise InputError(
            "model.reference.path: a policy with random weights (init: random) needs a reference of its own."
        )
    config = replace(
        policy,
        path=reference.path or policy.path,
        revision=reference.revision if reference.path else policy.revision,
        init="pretrained",
        gradient_checkpointing=False,
    )
    return ResidentReference(load_logprob_model(config))
