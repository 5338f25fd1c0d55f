"""What is known for sure about prompts of the lab: their gold reward and, of small tasks, exact values."""

from contextlib import suppress
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.evaluation.rewards import LabReward
from lit_isdpo.lab.exact import ExactEvaluation
from lit_isdpo.lab.folder import exact_evaluation_for
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError, Prompt


def find_gold_reward(datamodule: Any, stage: str, prompt: Prompt) -> LabReward | None:
    """The gold reward of a split's prompts; where there is none, says so.

    Args:
        datamodule: with the split set up.
        stage: the split.
        prompt: one of its prompts as the data has it.
    """
    rewards = [LabReward.for_folder(folder) for folder in datamodule.source_folders(stage)]
    # Of a mixture of tasks each reward reads its own prompts alone.
    if len({reward and reward.identity for reward in rewards}) == 1 and rewards[0] is not None:
        with suppress(InputError):
            rewards[0]([prompt], [""], [True])
            return rewards[0]
    rank_zero_info(
        f"The {stage} prompts are not the lab's as they were written, so no gold reward is known for them: "
        "gold_reward and win_rate are not logged; KL and samples are."
    )
    return None


def find_exact(datamodule: Any, stage: str, policy: LogProbModel, prompts: list[list[int]]) -> ExactEvaluation | None:
    """Exact values of policies on a split's prompts; ``None`` where there are none, or they are not this policy's."""
    found = [exact_evaluation_for(folder) for folder in datamodule.source_folders(stage)]
    if len(found) != 1 or found[0] is None:
        return None
    if policy.is_sharded:
        rank_zero_info("No exact values are logged of a sharded model; use --trainer.strategy ddp or one device.")
        return None
    if not found[0].applies_to(policy, prompts):
        rank_zero_info(
            f"The {stage} prompts, or the model's vocabulary, are not those of the lab's task: no exact values are "
            "logged."
        )
        return None
    return found[0]
