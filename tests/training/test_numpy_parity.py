"""The loss of a micro-batch and its gradient of every weight, against ``numpy_formulas`` on the model's own logits.

The formulas get the logits of each response alone, without padding, from Transformers' forward; what they say about the
loss's derivative by the logits is carried on to the weights by autograd. So the whole step is checked: which tokens are
predicted where, sums, weights without gradient, the data's own weights and margins, and the mean over pairs.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_isdpo.data.collation import Layout, collate_pairs
from lit_isdpo.objective.losses import ChiPOLoss, IPOLoss, PreferenceLoss, RPOLoss
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, ProductWeighting, WPOWeighting
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.types import TokenizedPair
from tests.objective import numpy_formulas as formulas
from tests.objective.numpy_formulas import Array, Loss, Pairs

PAIRS = [
    TokenizedPair([1, 5, 7], [6, 2], [8, 9, 4, 4, 2], -9.0, -14.0, weight=2.0, margin=0.25),
    TokenizedPair([1], [2], [9, 2], -3.0, None, weight=0.5),
    TokenizedPair([1, 3, 3, 8, 6], [7, 9, 11, 12, 2], [2], margin=-0.5),
]

METHODS: dict[str, tuple[PreferenceLoss, Callable[[Pairs], Loss], float, PairWeighting, Callable[[Pairs], Array]]] = {
    # loss, its formula, the likelihood's factor, weighting, its formula
    "is_rpo": (
        RPOLoss(0.5, eta=0.3),
        partial(formulas.dpo, beta=0.5),
        0.15,
        ImportanceWeighting(0.5),
        lambda p: formulas.importance(p, 0.5)[0],
    ),
    "is_ipo_mean": (
        IPOLoss("mean", 0.5),
        partial(formulas.ipo_per_token, beta=0.5),
        0.0,
        ImportanceWeighting(0.5, cap="response"),
        lambda p: formulas.importance_by_response(p, 0.5)[0],
    ),
    "is_wpo_chi_po": (
        ChiPOLoss(0.5),
        partial(formulas.chi_po, beta=0.5, alpha=1.0, gamma=1.0, bound=math.inf),
        0.0,
        ProductWeighting([ImportanceWeighting(0.5), WPOWeighting()]),
        lambda p: formulas.importance(p, 0.5)[0] * formulas.wpo(p)[0],
    ),
}


def logits_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """``(C, V)`` of each response, ``[chosen; rejected]``."""
    rows = [
        (pair.prompt_ids, ids)
        for ids_of in ("chosen_ids", "rejected_ids")
        for pair in PAIRS
        for ids in [getattr(pair, ids_of)]
    ]
    return [model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] for prompt, ids in rows]


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step(name: str, layout: Layout, model_dir: str) -> None:
    loss, formula, likelihood, weighting, weigh = METHODS[name]
    module = PreferenceModule(PolicyConfig(path=model_dir), loss=loss, weighting=weighting)
    module.trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.configure_model()
    with torch.no_grad():
        for number, parameter in enumerate(module.policy.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))

    logits = logits_of(module.policy.model)
    ids = [pair.chosen_ids for pair in PAIRS] + [pair.rejected_ids for pair in PAIRS]
    with module.reference.scoring() as reference, torch.no_grad():
        ref_logits = logits_of(reference.model)
    own, ref = (
        formulas.completions([rows.detach().double().numpy() for rows in of], ids) for of in (logits, ref_logits)
    )
    behavior = [pair[field] for field in (3, 4) for pair in PAIRS]
    mu = np.array([of_ref if known is None else known for known, of_ref in zip(behavior, ref.logps, strict=True)])
    lengths = np.array([len(row) for row in ids], dtype=float)
    margins = np.array([pair.margin for pair in PAIRS])
    halves = [half for values in (own.logps, ref.logps, mu, lengths) for half in np.split(values, 2)]
    pairs = Pairs(*halves, margins, *np.split(own.alignment, 2))
    weights, data_weights = weigh(pairs), np.array([pair.weight for pair in PAIRS])
    part, added = formula(pairs), formulas.likelihood(pairs, likelihood)
    value = (data_weights * (weights * part.value + added.value)).mean()
    by_logps = [
        data_weights * (weights * by + of_added) / len(PAIRS) for by, of_added in zip(part[1:], added[1:], strict=True)
    ]
    gradients = [
        torch.tensor(by * rows).float() for by, rows in zip(np.concatenate(by_logps), own.by_logits, strict=True)
    ]
    torch.autograd.backward(logits, gradients)
    expected = [parameter.grad for parameter in module.policy.parameters()]
    module.zero_grad()

    found = module.micro_batch_loss(collate_pairs(PAIRS, [0, 1, 2], pad_token_id=0, layout=layout))
    found.backward()
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert len(set(weights)) == 3, "no two pairs weigh the same"
    for parameter, gradient in zip(module.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
