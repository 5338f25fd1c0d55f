"""Several ranks on this machine, over gloo on loopback, in the environment that torchrun gives its processes.

``run_on_ranks([["fit", ...], ...])`` runs commands of this project one after another, in one process a rank;
``python -m tests.ranks '[["fit", ...], ...]'`` is one of these ranks.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch

from lit_isdpo.cli import main
from tests.processes import start

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def run_on_ranks(
    commands: Sequence[Sequence[Any]], *, size: int = 2, module: str = "tests.ranks", timeout: int = 300
) -> str:
    """Runs commands on all ranks at once; what rank 0 printed.

    Args:
        commands: what ``module`` is given, as JSON.
        size: ranks.
        module: that each rank runs.
        timeout: in seconds, for all of it.

    Raises:
        AssertionError: a rank failed or did not end in time; with all that was printed.
    """
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    world |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    arguments = [json.dumps([list(command) for command in commands], default=str)]
    with TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(size)]
        ranks = [
            start(module, arguments, output, environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, output in enumerate(outputs)
        ]
        deadline = monotonic() + timeout
        try:
            for rank in ranks:
                rank.join(max(0, deadline - monotonic()))
        finally:
            statuses = [rank.exitcode for rank in ranks]
            for rank in ranks:
                rank.kill()
        printed = [output.read_text() for output in outputs]
    assert statuses == [0] * size, "\n".join(printed)
    return printed[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
