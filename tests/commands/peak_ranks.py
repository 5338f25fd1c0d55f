"""What a rank of ``test_plan.py`` does: a sharded fit whose second step is profiled."""

import json
import sys
from typing import Any

import torch

from lit_isdpo.cli import main
from lit_isdpo.commands.trainer import IsdpoTrainer
from tests.peak import PeakOfSteps

if __name__ == "__main__":
    torch.set_num_threads(1)
    measure = PeakOfSteps(num_steps=5)
    fit = IsdpoTrainer.fit

    def measured(self: IsdpoTrainer, *args: Any, **kwargs: Any) -> None:
        self.callbacks.append(measure)  # type: ignore[attr-defined]
        fit(self, *args, **kwargs)

    IsdpoTrainer.fit = measured  # type: ignore[method-assign]
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
    print(f"PEAK {measure.peak}")
