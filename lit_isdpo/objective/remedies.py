"""Remedies against what importance weights do badly: losses and weightings of our own, each with its reason.

An importance weight fades as the policy leaves the data, and with it goes the pull of the very pairs that would hold
the policy back: where early generalisation leads off the data's support, the method freezes there. Each class here
keeps some pull. What they are worth, the failures among them included, is in ``notebooks/figures/remedies/report.md``;
``configs/study/remedies.yaml`` repeats it. None of them is as good as chi-PO without weights, or with the KL of the
policy's own samples (``configs/model/chi_hypo.yaml``).

Shapes: B pairs. Log-probs are sums over the response's tokens, in nats.
"""

import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import DPOLoss, checked
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeights
from lit_isdpo.types import InputError


class OneSidedDPOLoss(DPOLoss):
    """DPO whose rejected response alone is weighed: its gradient is ``w_l`` times DPO's, the chosen one's is whole.

        w_l = exp( min(log pi(y_l) - log mu(y_l), epsilon) )
        gradient of a pair = -sigmoid(-beta h) beta ( grad log pi(y_w) - w_l grad log pi(y_l) )

    The value is DPO's. What makes likelihoods fall is the push against rejected responses that the policy has stopped
    producing, whose mass goes anywhere. Without the cap the push is, in expectation over mu, on the policy's own
    responses, as in online methods. What is left when it fades is the pull on the chosen ones, supervised fine-tuning
    with the factor ``beta sigmoid(-beta h)``. It goes with ``UniformWeighting`` alone: another would weigh the rejected
    response twice.

    Args:
        beta: above 0.
        epsilon: cap on the rejected response's log-ratio, in nats.
    """

    is_weighed = True

    def __init__(self, beta: float = 0.1, epsilon: float = 0.0) -> None:
        super().__init__(beta)
        self.epsilon = checked("epsilon", epsilon)

    def utilities(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Log-ratios; the rejected one's gradient is scaled, and its value is not."""
        _, ratio = pairs.importance_logratios
        weight = ratio.detach().clamp(max=self.epsilon).exp()
        rejected = pairs.rejected_logratios
        return pairs.chosen_logratios, rejected.detach() + weight * (rejected - rejected.detach())


class ReturningDPOLoss(DPOLoss):
    """DPO + SFT on the chosen response, by as much as the pair's importance weight has fallen.

        auxiliary = -beta eta (1 - min(w, 1)) log pi(y_w),    w = exp(b_w + b_l)

    RPO (arXiv 2405.16436) whose second term sleeps where the policy is mu and wakes as it leaves the data, so that a
    pair that importance weights switch off calls the policy back. Where mu is not the reference, it is awake for some
    pairs from the start.

    Args:
        beta: above 0.
        eta: weight of the likelihood of a pair that has none, at least 0.
    """

    def __init__(self, beta: float = 0.1, eta: float = 0.15) -> None:
        super().__init__(beta)
        self.eta = checked("eta", eta, least=0.0)

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """The weight has no gradient."""
        weight = torch.stack(pairs.importance_logratios).sum(dim=0).detach().clamp(max=0.0).exp()
        return -self.beta * self.eta * (1 - weight) * pairs.chosen_logps


class ForwardKLDPOLoss(DPOLoss):
    """DPO + the likelihood of both responses: ``-beta eta (log pi(y_w) + log pi(y_l)) / 2``.

    In expectation over mu it is ``beta eta KL(mu || pi)`` but for a constant: mass that leaves the data's responses
    costs, whichever of them were preferred, while RPO's term prefers the chosen ones once more.

    Args:
        beta: above 0.
        eta: weight of the likelihood, at least 0.
    """

    def __init__(self, beta: float = 0.1, eta: float = 0.15) -> None:
        super().__init__(beta)
        self.eta = checked("eta", eta, least=0.0)

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """Negative log-likelihood, the mean of both."""
        return -self.beta * self.eta * (pairs.chosen_logps + pairs.rejected_logps) / 2


class CommonModeDPOLoss(DPOLoss):
    """DPO + ``beta strength (s_w + s_l)^2 / 8``, on the sum of the log-ratios beside their difference.

    The regulariser that DPO implies at second order is a square of ``h = s_w - s_l`` alone (arXiv 2402.05749), so that
    both log-ratios may fall together for nothing. The square of the sum completes it: ``h^2 + (s_w + s_l)^2 = 2 (s_w^2
    + s_l^2)``, and over mu the mean of ``s^2 / 2`` is a KL at second order.

    Args:
        beta: above 0.
        strength: of the square, at least 0; DPO's own has ``beta``.
    """

    def __init__(self, beta: float = 0.1, strength: float = 0.1) -> None:
        super().__init__(beta)
        self.strength = checked("strength", strength, least=0.0)

    def auxiliary(self, pairs: PairLogps) -> Tensor:
        """Zero at the reference, with its gradient."""
        return self.beta * self.strength * (pairs.chosen_logratios + pairs.rejected_logratios).square() / 8


class TemperedImportanceWeighting(ImportanceWeighting):
    """``w^power`` for a weight w of ``ImportanceWeighting``: fades more slowly, at the price of bias.

    Args:
        epsilon: as of ``ImportanceWeighting``; the cap comes before the power.
        power: from 0, where all pairs weigh alike, to 1.
    """

    def __init__(self, epsilon: float = 1.0, power: float = 0.5) -> None:
        super().__init__(epsilon)
        if not 0 <= power <= 1:
            raise InputError(f"model.weighting.power must lie between 0 and 1, not {power}.")
        self.power = power

    def weigh(self, pairs: PairLogps) -> PairWeights:
        """A factor in log space."""
        weights = super().weigh(pairs)
        return weights._replace(log_weights=self.power * weights.log_weights)
