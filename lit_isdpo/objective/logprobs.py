"""Hidden states and the head in, log-probabilities of the completion tokens out; the full logits are never held.

A head of V = 128,256 columns makes 4 V bytes of fp32 logits a token, several times over in the softmax and its
gradient. Three things keep that small: only positions that predict a completion token are projected (not the prompt,
not the padding), in chunks, and the backward pass computes a chunk's logits anew instead of keeping them.

Shapes: R rows, T positions, H hidden size, S sequences, C completion positions, N completion tokens in the batch, B
pairs.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_isdpo.types import SequenceLogps, TokenBatch


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: ``softcap(scale (h W^T + b))``, whatever of it a family of models has.

    Attributes:
        weight: ``(V, H)``.
        bias: ``(V,)`` or none.
        scale: factor of the logits.
        softcap: bound c of the logits, ``c tanh(z / c)``, or none.
        dtype: of the factors of the matrix products. Sums, logits and all that follows are fp32: importance weights
            exponentiate what is rounded away here. bfloat16 factors with fp32 sums exist on GPUs alone; elsewhere they
            are taken as fp32.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits of all tokens, fp32: ``(..., H) -> (..., V)``, with gradient."""
        logits = self.scale * torch.nn.functional.linear(
            hidden_states.float(), self.weight.float(), None if self.bias is None else self.bias.float()
        )
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """As ``__call__``, of one chunk and without gradient, in memory that the caller may overwrite."""
        logits = product(hidden_states, self.weight.T, self.dtype)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` with factors in ``dtype`` and sums in fp32. Factors that are kept in bfloat16 are multiplied in it."""
    is_narrow = dtype == torch.bfloat16 or a.dtype == b.dtype == torch.bfloat16
    if is_narrow and a.is_cuda:
        return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def completion_hidden_states(hidden_states: Tensor, tokens: TokenBatch) -> Tensor:
    """Picks the hidden states that predict completion tokens: ``(R, T, H) -> (N, H)``, sequence by sequence."""
    return hidden_states.flatten(0, 1).index_select(0, tokens.at_completions(tokens.logit_positions))


class _TokenLogps(torch.autograd.Function):
    """``log pi(y_t)`` and ``log sum_v pi(v)^2`` of N tokens, chunk by chunk.

    With g the gradient of the first value, that of a token's logits is ``g (onehot(y) - pi)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        chunk_size: int,
        collisions: bool,
    ) -> tuple[Tensor, Tensor]:
        logps = targets.new_empty(targets.shape, dtype=torch.float32)
        log_partition = torch.empty_like(logps)
        log_collisions = torch.full_like(logps, math.nan)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = head.logits(hidden_states[chunk])  # (chunk, V)
            largest = logits.amax(dim=1, keepdim=True)
            logits -= largest
            of_targets = logits.gather(1, targets[chunk, None]).squeeze(1)
            unnormalised = logits.exp_()
            log_sum = unnormalised.sum(dim=1).log_()
            logps[chunk] = of_targets - log_sum
            log_partition[chunk] = log_sum + largest.squeeze(1)
            if collisions:
                log_collisions[chunk] = unnormalised.square_().sum(dim=1).log_() - 2 * log_sum
        ctx.save_for_backward(hidden_states, weight, bias, targets, log_partition)
        ctx.head, ctx.chunk_size = head, chunk_size
        ctx.mark_non_differentiable(log_collisions)
        return logps, log_collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias, targets, log_partition = ctx.saved_tensors
        # Rebuilt from what was saved: a wrapper that shards the model may have gathered the weight anew.
        head = Head(weight, bias, ctx.head.scale, ctx.head.softcap, ctx.head.dtype)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden_states) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        for start in range(0, len(targets), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            hidden, g = hidden_states[chunk], gradient[chunk, None].float()
            logits = head.logits(hidden)
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
            d_logits = logits.sub_(log_partition[chunk, None]).exp_().mul_(-g)
            d_logits.scatter_add_(1, targets[chunk, None], g)
            if slope is not None:
                d_logits *= slope
            if head.scale != 1:
                d_logits *= head.scale
            if d_hidden is not None:
                d_hidden[chunk] = product(d_logits, weight, head.dtype)
            if d_weight is not None:
                d_weight += product(d_logits.T, hidden, head.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def token_logps(
    hidden_states: Tensor, targets: Tensor, head: Head, *, chunk_size: int, collisions: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and of two draws being the same token, in nats.

    Args:
        hidden_states: ``(N, H)``.
        targets: ``(N,)`` token ids.
        head: of the model; its weight and bias get a gradient, in fp32 sums, where they require one.
        chunk_size: tokens whose logits exist at a time.
        collisions: whether the second value is wanted; else it is NaN.

    Returns:
        ``(N,)`` ``log pi(y_t)`` with gradient, and ``(N,)`` ``log sum_v pi(v)^2`` without, both fp32.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        values: tuple[Tensor, Tensor] = _TokenLogps.apply(
            hidden_states, head.weight, head.bias, targets, head, chunk_size, collisions
        )
    return values


def sequence_logps(
    hidden_states: Tensor, tokens: TokenBatch, head: Head, *, chunk_size: int, alignment: bool = False
) -> SequenceLogps:
    """Sums ``log pi(y_t | x, y_<t)`` over each completion's tokens, EOS included.

    Args:
        hidden_states: ``(R, T, H)``, the decoder's last hidden states, with gradient where the policy trains.
        tokens: where each completion token is predicted, and which token it is.
        head: of the model.
        chunk_size: completion tokens projected at a time.
        alignment: whether the completions' alignment is computed too.

    Returns:
        Sums and per-token values in nats, fp32, with the gradient of ``hidden_states`` and of the head.
    """
    hidden = completion_hidden_states(hidden_states, tokens)  # (N, H)
    targets = tokens.at_completions(tokens.completion_ids)  # (N,)
    logps, log_collisions = token_logps(hidden, targets, head, chunk_size=chunk_size, collisions=alignment)
    per_token = tokens.spread(logps)
    num_tokens = tokens.completion_mask.sum(dim=1)
    aligned = per_token.detach() - tokens.spread(log_collisions)
    return SequenceLogps(per_token.sum(dim=1), num_tokens, per_token, aligned.sum(dim=1) / num_tokens)


class PairLogps(NamedTuple):
    """What a loss or a weighting may look at. All ``(B,)``, fp32; the policy's carry its gradient, all others none.

    Attributes:
        chosen_logps: ``log pi(y_w|x)`` of the policy, in nats, like all log-probs here.
        rejected_logps: ``log pi(y_l|x)`` of the policy.
        ref_chosen_logps: of the reference; NaN if none is held.
        ref_rejected_logps: the same of the rejected response.
        mu_chosen_logps: of the behavior policy, which wrote the responses; NaN where it is not known.
        mu_rejected_logps: the same of the rejected response.
        chosen_num_tokens: length of the chosen response in tokens, EOS included.
        rejected_num_tokens: length of the rejected response.
        margins: what the data asks the preference to exceed; 0 where it asks nothing.
        chosen_alignment: mean over the response's tokens of ``log pi(y_t) - log sum_v pi(v)^2``, in nats; NaN where the
            weighting does not need it.
        rejected_alignment: the same of the rejected response.
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
        stacked = (policy.logps, ref_logps, mu_logps, policy.num_tokens)
        halves = [half for both in stacked for half in both.chunk(2)]
        return cls._make((*halves, margins, *policy.alignment.chunk(2)))

    @property
    def chosen_logratios(self) -> Tensor:
        """``(B,)`` ``s_w = log pi(y_w|x) - log ref(y_w|x)``."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """``(B,)`` ``s_l = log pi(y_l|x) - log ref(y_l|x)``."""
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
