"""What a rank of ``test_online_ranks.py`` does: fits, and writes down what it sampled and how its weights end.

It is given commands, each with a folder before it that gets a file of every rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from lit_isdpo.cli import main
from lit_isdpo.commands.trainer import IsdpoTrainer
from lit_isdpo.policy.logprob_model import full_tensor
from lit_isdpo.training import online, preference
from lit_isdpo.training.rollouts import SampledResponses, sample_rollouts

if __name__ == "__main__":
    torch.set_num_threads(1)
    sampled: list[list[list[int]]] = []
    prompts: list[list[list[int]]] = []

    def spied(*args: Any) -> SampledResponses:
        drawn = sample_rollouts(*args)
        sampled.append([response.token_ids for response in drawn.responses])
        prompts.append(drawn.prompts)
        return drawn

    online.sample_rollouts = preference.sample_rollouts = spied
    fit = IsdpoTrainer.fit
    folder = Path()

    def recorded(self: IsdpoTrainer, model: Any, *args: Any, **kwargs: Any) -> None:
        fit(self, model, *args, **kwargs)
        weights = {name: full_tensor(tensor.detach()).clone() for name, tensor in model.policy.model.named_parameters()}
        torch.save(
            {
                "weights": weights,
                "sampled": sampled,
                "prompts": prompts,
                "step": self.global_step,
                "is_sharded": isinstance(model.policy, FSDPModule),
            },
            folder / f"rank{self.global_rank}.pt",
        )

    IsdpoTrainer.fit = recorded  # type: ignore[method-assign]
    for given, *arguments in json.loads(sys.argv[1]):
        sampled.clear()
        prompts.clear()
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        main(arguments)
