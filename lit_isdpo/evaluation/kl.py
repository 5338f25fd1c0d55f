"""The KL divergence of a policy from its reference, on responses that the policy sampled.

A log-ratio averaged over the data set is not a KL: the data is not the policy's. The estimators are unbiased for
responses drawn at temperature 1 and top-p 1, and for those only.
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
LOGITS_BUDGET = 2**26  # values of a batch's logits for the exact next-token KL: 0.25 GiB in fp32, some six times over


@torch.no_grad()
def sampled_kl(
    policy: LogProbModel,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    *,
    pad_token_id: int,
) -> Tensor:
    """KL(policy || reference) estimated on each of P responses that the policy sampled, ``(P, 3)``, in nats.

    The columns are those of ``ESTIMATORS``. Of a response that was cut it is the KL of the cut response. Both
    distributions are those of the next token given that it is one: entries that only pad a vocabulary, of which one
    model may have more than the other, are never sampled and left out of both.
    """
    longest = max(len(response.token_ids) for response in responses)
    rows_at_a_time = max(1, LOGITS_BUDGET // (policy.vocabulary_size * longest))
    values = []
    for start in range(0, len(prompts), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        tokens = collate_completions(
            prompts[rows], [response.token_ids for response in responses[rows]], pad_token_id=pad_token_id
        )
        tokens = tokens.to(policy.device)
        logits = policy.completion_logits(tokens)[:, : policy.num_tokens]  # (N, V)
        with reference.scoring() as model:
            ref_logits = model.completion_logits(tokens)[:, : policy.num_tokens]
        common = min(logits.shape[1], ref_logits.shape[1])
        logits, ref_logits = logits[:, :common], ref_logits[:, :common]
        logps, ref_logps = logits.log_softmax(dim=1), ref_logits.log_softmax(dim=1)
        targets = tokens.at_completions(tokens.completion_ids)[:, None]  # (N, 1)
        token_logratios = (logps.gather(1, targets) - ref_logps.gather(1, targets))[:, 0]
        logratios = tokens.spread(token_logratios).sum(dim=1)
        estimates = kl_values(logratios, token_kl(logps, ref_logps), tokens.completion_mask)
        values.append(torch.stack(estimates, dim=1).cpu())
    return torch.cat(values)
