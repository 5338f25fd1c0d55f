"""Every fault once, with a seed of its own; ``python -m tests.tools.faults`` tries more."""

from zlib import crc32

import pytest

from tests.tools.faults.__main__ import attempt
from tests.tools.faults.faults import FAULTS
from tests.tools.faults.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"))


LEFT_TO_THE_SCRIPT = {"interrupt-study", "launched-rank-dies"}  # half a minute each, and others come near


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in LEFT_TO_THE_SCRIPT])
def test_nothing_but_the_last_steps_is_lost(name: str, world: World) -> None:
    outcome = attempt(world, name, crc32(name.encode()) % 1000)
    assert not outcome.problems, outcome
