"""Hidden states and the head in, log-probabilities of the completion tokens out; the full logits are never held.

A head of V = 128,256 columns makes 4 V bytes of fp32 logits a token, several times over in the softmax and its
gradient. Three things keep that small: only positions that predict a completion token are projected (not the prompt,
not the padding), in chunks, and the backward pass recomputes a chunk's logits instead of keeping them.

Shapes: R rows, T positions, H hidden size, S sequences, C completion positions, N completion tokens in the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_isdpo.types import SequenceLogps, TokenBatch

Head = Callable[[Tensor], Tensor]  # (N, H) hidden states -> (N, V) fp32 logits


def completion_hidden_states(hidden_states: Tensor, tokens: TokenBatch) -> Tensor:
    """Picks the hidden states that predict completion tokens: ``(R, T, H) -> (N, H)``, sequence by sequence."""
    return hidden_states.flatten(0, 1)[tokens.logit_positions[tokens.completion_mask]]


def token_logps(hidden_states: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Log-probability of each target, in nats: ``(N, H), (N,) -> (N,)`` fp32."""
    logits = head(hidden_states)  # (N, V)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def sequence_logps(hidden_states: Tensor, tokens: TokenBatch, head: Head, *, chunk_size: int) -> SequenceLogps:
    """Sums ``log pi(y_t | x, y_<t)`` over each completion's tokens, EOS included.

    Args:
        hidden_states: ``(R, T, H)``, the decoder's last hidden states, with gradient where the policy trains.
        tokens: where each completion token is predicted, and which token it is.
        head: maps hidden states to fp32 logits.
        chunk_size: completion tokens projected at a time.

    Returns:
        Sums and per-token values in nats, fp32, with the gradient of ``hidden_states`` and of the head.
    """
    hidden = completion_hidden_states(hidden_states, tokens)  # (N, H)
    targets = tokens.completion_ids[tokens.completion_mask]  # (N,)
    chunks = []
    for chunk, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            logps: Tensor = checkpoint(token_logps, chunk, target, head, use_reentrant=False, preserve_rng_state=False)
        else:
            logps = token_logps(chunk, target, head)
        chunks.append(logps)
    per_token = hidden.new_zeros(tokens.completion_mask.shape, dtype=torch.float32)  # (S, C)
    per_token = per_token.masked_scatter(tokens.completion_mask, torch.cat(chunks))
    return SequenceLogps(per_token.sum(dim=1), tokens.completion_mask.sum(dim=1), per_token)
