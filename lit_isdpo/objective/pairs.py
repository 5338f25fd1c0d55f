"""What losses, weights and metrics look at: the log-probs of B pairs."""

from typing import NamedTuple

from torch import Tensor

from lit_isdpo.types import SequenceLogps


class PairLogps(NamedTuple):
    """What a loss or a weighting may look at. All ``(B,)``, fp32; the policy's carry its gradient, all others none.

    Attributes:
        chosen_logps: ``log pi(y_w|x)`` of the policy, in nats, like all log-probs here.
        rejected_logps: ``log pi(y_l|x)``, likewise.
        ref_chosen_logps: of the reference; NaN where none is held.
        ref_rejected_logps: likewise.
        mu_chosen_logps: of the behavior policy, which wrote the responses; NaN where it is not known.
        mu_rejected_logps: likewise.
        chosen_num_tokens: length of the response in tokens, EOS included.
        rejected_num_tokens: likewise.
        margins: what the data asks the preference to exceed; 0 where it asks nothing.
        chosen_alignment: mean over the response's tokens of ``log pi(y_t) - log sum_v pi(v)^2``, in nats; NaN where the
            weighting does not need it.
        rejected_alignment: likewise.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    mu_chosen_logps: Tensor
    mu_rejected_logps: Tensor
    chosen_num_tokens: Tensor
    rejected_num_tokens: Tensor
    margins: Tensor
    chosen_alignment: Tensor
    rejected_alignment: Tensor

    @classmethod
    def unstack(cls, policy: SequenceLogps, ref_logps: Tensor, mu_logps: Tensor, margins: Tensor) -> "PairLogps":
        """From B pairs stacked as ``[chosen; rejected]``; ``ref_logps`` and ``mu_logps`` are ``(2B,)``."""
        chosen_logps, rejected_logps = policy.logps.chunk(2)
        ref_chosen_logps, ref_rejected_logps = ref_logps.chunk(2)
        mu_chosen_logps, mu_rejected_logps = mu_logps.chunk(2)
        chosen_num_tokens, rejected_num_tokens = policy.num_tokens.chunk(2)
        chosen_alignment, rejected_alignment = policy.alignment.chunk(2)
        return cls(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            mu_chosen_logps=mu_chosen_logps,
            mu_rejected_logps=mu_rejected_logps,
            chosen_num_tokens=chosen_num_tokens,
            rejected_num_tokens=rejected_num_tokens,
            margins=margins,
            chosen_alignment=chosen_alignment,
            rejected_alignment=rejected_alignment,
        )

    @property
    def chosen_logratios(self) -> Tensor:
        """``(B,)`` ``s_w = log pi(y_w|x) - log ref(y_w|x)``."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """``(B,)`` ``s_l``, likewise."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def importance_logratios(self) -> tuple[Tensor, Tensor]:
        """``(b_w, b_l)``, each ``(B,)``: ``log pi(y|x) - log mu(y|x)``."""
        return self.chosen_logps - self.mu_chosen_logps, self.rejected_logps - self.mu_rejected_logps

    def at_reference(self) -> "PairLogps":
        """The same pairs seen by a policy that is the reference: where every fresh run begins."""
        return self._replace(chosen_logps=self.ref_chosen_logps, rejected_logps=self.ref_rejected_logps)

    def detach(self) -> "PairLogps":
        """The same values without gradient."""
        return PairLogps(*(field.detach() for field in self))
