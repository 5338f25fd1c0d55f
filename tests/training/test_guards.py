"""Warnings of weights that vanish. What stops a run is tried where a run is: in ``test_preference``."""

import warnings

import pytest
import torch

from lit_isdpo.objective.weights import ImportanceWeighting, WPOWeighting
from lit_isdpo.training.comparison import warn_of_vanishing_weights


@pytest.mark.parametrize(
    ("mean", "ess", "message"),
    [
        (0.05, 0.5, "weight of the training pairs fell below"),
        (0.5, 0.005, "effective sample size fell below"),
    ],
)
def test_vanishing_weights_warn(mean: float, ess: float, message: str) -> None:
    values = {"weights/mean": torch.tensor(mean), "weights/ess": torch.tensor(ess)}
    with pytest.warns(UserWarning, match=message):
        warn_of_vanishing_weights(ImportanceWeighting(), values)


def test_weights_that_are_small_for_another_reason_do_not_warn() -> None:
    values = {"weights/mean": torch.tensor(0.05), "weights/ess": torch.tensor(0.005)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weighting in (WPOWeighting(), ImportanceWeighting(epsilon=-3.0)):
            warn_of_vanishing_weights(weighting, values)
