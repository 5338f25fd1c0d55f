"""Hidden states and the head in, log-probabilities of the completion tokens out; the full logits are never held.

A head of V = 128,256 columns makes 4 V bytes of fp32 logits a token, several times over in the softmax and its
gradient. Three things keep that small: only positions that predict a completion token are projected (not the prompt,
not the padding), in chunks, and the backward pass recomputes a chunk's logits instead of keeping them.

Shapes: R rows, T positions, H hidden size, S sequences, C completion positions, N completion tokens in the batch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_isdpo.types import SequenceLogps, TokenBatch

Head = Callable[[Tensor], Tensor]  # (N, H) hidden states -> (N, V) fp32 logits


def completion_hidden_states(hidden_states: Tensor, tokens: TokenBatch) -> Tensor:
    """Picks the hidden states that predict completion tokens: ``(R, T, H) -> (N, H)``, sequence by sequence."""
    return hidden_states.flatten(0, 1)[tokens.logit_positions[tokens.completion_mask]]


def token_logps(hidden_states: Tensor, targets: Tensor, head: Head, collisions: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and of two draws being the same token, in nats.

    Args:
        hidden_states: ``(N, H)``.
        targets: ``(N,)`` token ids.
        head: maps hidden states to fp32 logits.
        collisions: whether the second value is wanted; else it is NaN.

    Returns:
        ``(N,)`` ``log pi(y_t)`` with gradient, and ``(N,)`` ``log sum_v pi(v)^2`` without, both fp32.
    """
    logits = head(hidden_states)  # (N, V)
    log_partition = logits.logsumexp(dim=1)
    logps = logits.gather(1, targets[:, None]).squeeze(1) - log_partition
    with torch.no_grad():
        log_collisions = torch.full_like(logps, math.nan)
        if collisions:
            log_collisions = (2 * logits).logsumexp(dim=1) - 2 * log_partition
    return logps, log_collisions


def sequence_logps(
    hidden_states: Tensor, tokens: TokenBatch, head: Head, *, chunk_size: int, alignment: bool = False
) -> SequenceLogps:
    """Sums ``log pi(y_t | x, y_<t)`` over each completion's tokens, EOS included.

    Args:
        hidden_states: ``(R, T, H)``, the decoder's last hidden states, with gradient where the policy trains.
        tokens: where each completion token is predicted, and which token it is.
        head: maps hidden states to fp32 logits.
        chunk_size: completion tokens projected at a time.
        alignment: whether the completions' alignment is computed too.

    Returns:
        Sums and per-token values in nats, fp32, with the gradient of ``hidden_states`` and of the head.
    """
    hidden = completion_hidden_states(hidden_states, tokens)  # (N, H)
    targets = tokens.completion_ids[tokens.completion_mask]  # (N,)
    logps, log_collisions = [], []
    for chunk, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        arguments = (chunk, target, head, alignment)
        if torch.is_grad_enabled():
            values = checkpoint(token_logps, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            values = token_logps(*arguments)
        logps.append(values[0])
        log_collisions.append(values[1])
    per_token = _per_token(torch.cat(logps), tokens)
    num_tokens = tokens.completion_mask.sum(dim=1)
    aligned = per_token.detach() - _per_token(torch.cat(log_collisions), tokens)
    return SequenceLogps(per_token.sum(dim=1), num_tokens, per_token, aligned.sum(dim=1) / num_tokens)


def _per_token(values: Tensor, tokens: TokenBatch) -> Tensor:
    """Values of the N completion tokens in their places, ``(N,) -> (S, C)``, 0 where masked."""
    zeros = values.new_zeros(tokens.completion_mask.shape)
    return zeros.masked_scatter(tokens.completion_mask, values)
