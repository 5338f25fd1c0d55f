"""The loss of a reward model on B pairs, and what is logged about it."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_isdpo.objective.metrics import RowMeans


def bradley_terry_losses(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor, *, centering: float = 0.0
) -> Tensor:
    """``-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2`` of each pair, in nats, with gradient.

    The first term is the negative log-likelihood of the Bradley-Terry model (arXiv 2203.02155, eq. 1), where the data
    has margins that of arXiv 2307.09288, eq. 2. It knows differences alone; the second (arXiv 2312.09244, eq. 7) keeps
    the rewards of different prompts around 0.

    Args:
        chosen_rewards: ``(B,)``.
        rejected_rewards: ``(B,)``.
        margins: ``(B,)`` what the difference must exceed.
        centering: at least 0.

    Returns:
        ``(B,)``.

    >>> import torch
    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> round(bradley_terry_losses(one, zero, zero).item(), 4), round(bradley_terry_losses(one, zero, one).item(), 4)
    (0.3133, 0.6931)
    """
    losses = -logsigmoid(chosen_rewards - rejected_rewards - margins)
    return losses + centering * (chosen_rewards + rejected_rewards).square()


class RewardMetrics(RowMeans):
    """Means over pairs, ties counted one half in the accuracy."""

    KEYS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "rewards/mean")

    def update(self, losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, num_counted: int) -> None:
        """Adds the first ``num_counted`` of B pairs; the others only fill up a batch.

        Args:
            losses: ``(B,)`` with the data's own weights.
            chosen_rewards: ``(B,)``.
            rejected_rewards: ``(B,)``.
            num_counted: between 0 and B.
        """
        chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
        ahead = (chosen > rejected).float() + (chosen == rejected).float() / 2
        columns = [losses.detach(), chosen, rejected, ahead, chosen - rejected, (chosen + rejected) / 2]
        self.add(columns, num_counted)
