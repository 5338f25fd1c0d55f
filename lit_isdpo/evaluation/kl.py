"""The KL divergence of a policy from its reference, on responses that the policy sampled.

A log-ratio averaged over the data set is not a KL, because the data is not the policy's. The estimators are unbiased
for responses drawn at temperature 1 and top-p 1, and for those only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.objective.metrics import kl_values, token_kl
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import Response

ESTIMATORS = ("rao_blackwell", "k1", "k3")
"""Log keys of the fields of :class:`~lit_isdpo.objective.metrics.KLValues`."""


@torch.no_grad()
def sampled_kl(
    policy: LogProbModel,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    *,
    pad_token_id: int,
    batch_size: int,
) -> Tensor:
    """KL(policy || reference) estimated on each of P responses that the policy sampled, ``(P, 3)``, in nats.

    The columns are those of ``ESTIMATORS``. For a response that was cut it is the KL of the cut response. Both
    distributions are those of the next token given that it is one: entries that only pad a vocabulary, of which one
    model may have more than the other, are never sampled and left out of both.

    Args:
        policy: the model that was sampled.
        reference: the model that the KL is taken to.
        prompts: token ids of P prompts.
        responses: to them.
        pad_token_id: padding.
        batch_size: responses per forward of the decoders; logits exist for fewer tokens at a time.
    """
    values = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        completions = [response.token_ids for response in responses[rows]]
        tokens = collate_completions(prompts[rows], completions, pad_token_id=pad_token_id).to(policy.device)
        targets = tokens.at_completions(tokens.completion_ids)  # (N,)
        own = policy.completion_states(tokens)
        with reference.scoring() as model:
            states = model.completion_states(tokens)
        token_logratios, kls = [], []
        for chunk in torch.arange(len(targets), device=targets.device).split(policy.logits_at_a_time):
            logits = policy.token_logits(own[chunk])[:, : policy.num_tokens]
            with reference.scoring() as model:
                ref_logits = model.token_logits(states[chunk])[:, : policy.num_tokens]
            common = min(logits.shape[1], ref_logits.shape[1])
            logps, ref_logps = logits[:, :common].log_softmax(dim=1), ref_logits[:, :common].log_softmax(dim=1)
            picked = targets[chunk, None]
            token_logratios.append((logps.gather(1, picked) - ref_logps.gather(1, picked))[:, 0])
            kls.append(token_kl(logps, ref_logps))
        logratios = tokens.spread(torch.cat(token_logratios)).sum(dim=1)
        estimates = kl_values(logratios, torch.cat(kls), tokens.completion_mask)
        values.append(torch.stack(estimates, dim=1).cpu())
    return torch.cat(values)
