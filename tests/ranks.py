"""Several ranks on this machine, over gloo on loopback, in the environment that torchrun gives its processes.

``run_on_ranks([["fit", ...], ...])`` runs commands of this project one after another, in one start of Python a rank;
``python -m tests.ranks '[["fit", ...], ...]'`` is one of these ranks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from socket import socket
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import Any

import torch

from lit_isdpo.cli import main

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
    world |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, json.dumps([list(command) for command in commands])]
    with ExitStack() as stack:
        outputs = [stack.enter_context(TemporaryFile("w+")) for _ in range(size)]
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        deadline = monotonic() + timeout
        try:
            while monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                sleep(0.1)
        finally:
            statuses = [rank.poll() for rank in ranks]
            for rank in ranks:
                rank.kill()
        printed = []
        for output in outputs:
            output.seek(0)
            printed.append(output.read())
    assert statuses == [0] * size, "\n".join(printed)
    return printed[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
