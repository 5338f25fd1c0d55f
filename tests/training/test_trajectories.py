"""Twenty optimizer steps of seven methods are what they were: see ``trajectories.py``, which stored them.

Without AVX, and with other kernels of MKL and oneDNN, the values differ by up to 1e-5 of a key's largest; 1e-4 is
asked.
Where that fails and a change of values was meant, ``python -m tests.training.trajectories`` writes them anew.
"""

import pytest

from tests.training.trajectories import METHODS, NUM_STEPS, distance, stored, trajectory

QUICK = "is_dpo"


@pytest.mark.filterwarnings("ignore:The mean importance weight of the training pairs fell")  # as it does, at the end
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == QUICK else pytest.mark.slow) for method in METHODS]
)
def test_twenty_steps_are_what_they_were(method: str) -> None:
    before = stored(method)
    values = trajectory(method)
    assert {len(column) for column in values.values()} == {NUM_STEPS}
    assert abs(values["logratios/rejected"][-1]) > 1, "something is learned"
    too_far = {key: share for key, share in distance(values, before).items() if share > 1e-4}
    assert not too_far, f"share of the largest value by which a step is off: {too_far}"
