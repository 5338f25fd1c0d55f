"""Supervised fine-tuning: it makes the reference that preference training starts from."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_isdpo.policy.logprob_model import own_part
from lit_isdpo.training.module import PolicyModule
from lit_isdpo.types import SequenceLogps, SFTBatch


class TokenLoss(Metric):
    """Negative log-likelihood of completion tokens: nats a token, and nats a completion."""

    full_state_update = False
    nll: Tensor
    num_tokens: Tensor
    num_sequences: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_sequences", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logps: SequenceLogps, num_counted: int) -> None:
        """Adds the first ``num_counted`` of S completions; the others only fill up a batch."""
        self.nll -= logps.logps.detach()[:num_counted].double().sum()
        self.num_tokens += logps.num_tokens[:num_counted].sum()
        self.num_sequences += num_counted

    def compute(self) -> dict[str, Tensor]:
        """``loss`` in nats a token, ``logps/completion`` in nats a completion, and the number of tokens."""
        return {
            "num_tokens": self.num_tokens,
            "loss": (self.nll / self.num_tokens).float(),
            "logps/completion": (-self.nll / self.num_sequences).float(),
        }


class SFTModule(PolicyModule):
    """Minimises the mean negative log-likelihood of completion tokens; prompts are not trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_metrics = TokenLoss()
        self.val_metrics = TokenLoss()
        self.test_metrics = TokenLoss()

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """SFT has no variants."""
        return "SFT", {}

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """Summed loss of the micro-batch, in nats; ``on_before_optimizer_step`` divides by the window's tokens.

        The mean over the tokens of a global batch is not the mean of its micro-batches' means: they differ in length.
        """
        logps: SequenceLogps = self.policy(batch.tokens)
        self.train_metrics.update(logps, batch.num_counted)
        self.guard.add(logps.logps, batch.row_ids)
        return -logps.logps.sum()

    def micro_batch_loss(self, batch: SFTBatch) -> Tensor:
        """Summed loss of the micro-batch, in nats."""
        logps: SequenceLogps = self.policy(batch.tokens)
        return -logps.logps.sum()

    def log_window(self) -> None:
        """Turns the gradient of the window's sum into that of its mean over tokens, and logs the window."""
        values = self.train_metrics.compute()
        gradients = [own_part(p.grad) for p in self.policy.parameters() if p.grad is not None]
        # Lightning divided each micro-batch's loss by the number of micro-batches, DDP the gradient by that of ranks.
        # The scale stays on the device: to read it would make the host wait for all of the step.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / values.pop("num_tokens").double()
        scale = scale.float().to(gradients[0].device)
        if wide := [gradient for gradient in gradients if gradient.dtype == torch.float32]:
            torch._foreach_mul_(wide, scale)
        for gradient in gradients:  # others would round the scale to their own dtype first
            if gradient.dtype != torch.float32:
                gradient.copy_(gradient.float() * scale)
        self.train_metrics.reset()
        self.log_dict({f"train/{key}": value for key, value in values.items()})

    def forget_window(self) -> None:
        """Empties the sums."""
        self.train_metrics.reset()

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the validation."""
        self.val_metrics.update(self.policy(batch.tokens), batch.num_counted)

    def test_step(self, batch: SFTBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the test."""
        self.test_metrics.update(self.policy(batch.tokens), batch.num_counted)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation set's values."""
        self._log("val", self.val_metrics)
        self.log_step()

    def on_test_epoch_end(self) -> None:
        """Logs the test set's values."""
        self._log("test", self.test_metrics)

    def _log(self, stage: str, metrics: TokenLoss) -> None:
        self.log_dict({f"{stage}/{key}": value for key, value in metrics.compute().items() if key != "num_tokens"})
        metrics.reset()
