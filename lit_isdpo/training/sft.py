"""Supervised fine-tuning: it makes the reference that preference training starts from."""

from typing import Any

import torch
from torch import Tensor

from lit_isdpo.objective.metrics import Columns, Ratio
from lit_isdpo.policy.loading import PolicyConfig, load_config
from lit_isdpo.policy.logprob_model import own_part
from lit_isdpo.training.language import LanguageModule, Stage
from lit_isdpo.types import SequenceLogps, SFTBatch


class SFTModule(LanguageModule):
    """Minimises the mean negative log-likelihood of completion tokens; prompts are not trained on.

    Args:
        policy: the model that is trained.
        **options: those of :class:`LanguageModule`.
    """

    def __init__(self, policy: PolicyConfig = PolicyConfig(), **options: Any) -> None:
        super().__init__(policy, load_config(policy).get_text_config(), comparison=None, **options)

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """SFT has no variants."""
        return "SFT", {}

    def step(self, batch: SFTBatch, stage: Stage) -> tuple[Tensor, Columns]:
        """``(S,)`` losses in nats a completion; ``loss`` is logged in nats a token."""
        logps: SequenceLogps = self.policy(batch.tokens)
        return -logps.logps, {"loss": Ratio(-logps.logps, logps.num_tokens), "logps/completion": logps.logps}

    def reduced(self, losses: Tensor) -> Tensor:
        """Their sum, in nats; ``on_before_optimizer_step`` divides its gradient by the tokens of the whole window.

        The mean over the tokens of a global batch is not the mean of its micro-batches' means: they differ in length.
        """
        return losses.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns the gradient of the window's sum into that of its mean over tokens, and logs the window."""
        with self.train_metrics.sync_context():
            num_tokens = self.train_metrics.totals()["loss"].denominator
        gradients = [own_part(p.grad) for p in self.policy.parameters() if p.grad is not None]
        # Lightning divided each micro-batch's loss by the number of micro-batches, DDP the gradient by that of ranks.
        # The scale stays on the device: to read it would make the host wait for all of the step.
        scale = (self.trainer.accumulate_grad_batches * self.trainer.world_size / num_tokens).float()
        scale = scale.to(gradients[0].device)
        for gradient in gradients:
            if gradient.dtype == torch.float32:
                gradient.mul_(scale)
            else:  # these would round the scale to their own dtype first
                gradient.copy_(gradient.float() * scale)
        super().on_before_optimizer_step(optimizer)
