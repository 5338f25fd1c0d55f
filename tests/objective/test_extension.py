"""What a loss of another kind takes, and that importing the room makes all of its parts known."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from lit_isdpo.objective.logprobs import PairLogps
from lit_isdpo.objective.losses import PairLoss
from tests.conftest import pair_logps

OBJECTIVE = Path(__file__).parents[2] / "lit_isdpo" / "objective"


class APOZeroLoss(PairLoss):
    """``1 - sigmoid(beta s_w) + sigmoid(beta s_l)`` (APO-zero, arXiv 2408.06266): no function of a difference."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return 1 - chosen.sigmoid() + rejected.sigmoid()


def test_a_loss_that_is_no_function_of_a_difference_is_one_class() -> None:
    """Both responses rise by the same: a loss of the difference would not change."""
    chosen, rejected = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.5, 2.5], requires_grad=True)
    pairs, loss = pair_logps(chosen, rejected), APOZeroLoss(2.0)
    losses = loss.weighted(pairs, torch.tensor([1.0, 0.5]))
    expected = torch.tensor([1.0, 0.5]) * (1 - (2 * chosen).sigmoid() + (2 * rejected).sigmoid())
    torch.testing.assert_close(losses, expected)
    assert losses[0] != 2 * losses[1]
    losses.sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()
    assert not loss.auxiliary(pairs).any()


def test_one_import_makes_every_loss_weighting_and_objective_known() -> None:
    """A class that no import of the room has read is unknown to the command line."""
    script = """
import lit_isdpo.objective
from lit_isdpo.objective.losses import PairLoss
from lit_isdpo.objective.on_policy import OnPolicyObjective
from lit_isdpo.objective.weights import PairWeighting

def known(cls):
    return {cls.__name__}.union(*map(known, cls.__subclasses__()))

print(*sorted(known(PairLoss) | known(PairWeighting) | known(OnPolicyObjective)))
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    written = {
        line.split()[1].partition("(")[0]
        for file in OBJECTIVE.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("class ") and line.partition("(")[0].endswith(("Loss", "Weighting", "Objective"))
    }
    assert {"ReturningDPOLoss", "TemperedImportanceWeighting", "ProductWeighting", "GRPOObjective"} <= written
    assert set(printed) == written
