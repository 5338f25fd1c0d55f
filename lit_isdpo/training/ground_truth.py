"""What is known for sure about prompts of the lab: their gold reward and, of small tasks, exact values."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.data.outcomes import Split
from lit_isdpo.evaluation.rewards import LabReward
from lit_isdpo.lab.folder import exact_evaluation_for
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError, ProbePrompt, Prompt


def find_gold_reward(datamodule: Any, stage: str, prompt: Prompt) -> LabReward | None:
    """The gold reward of a split's prompts; where there is none, says so.

    Args:
        datamodule: with the split set up.
        stage: the split.
        prompt: one of its prompts as the data has it.
    """
    rewards = [LabReward.for_folder(folder) for folder in datamodule.splits.folders(stage)]
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


def exact_values(
    module: LanguageModule, stage: Split, prompts: Sequence[ProbePrompt]
) -> Callable[[], dict[str, float]]:
    """Gives exact values of the policy as it is when they are asked for; none where the task has none, or not for it.

    Args:
        module: holds the policy, and the reference, which is summed over now.
        stage: the split of the prompts.
        prompts: of the evaluation.
    """
    found = [exact_evaluation_for(folder) for folder in module.data.splits.folders(stage)]
    if len(found) != 1 or found[0] is None:  # on every rank alike
        return dict
    exact = found[0]
    if module.policy.is_sharded:
        rank_zero_info("No exact values are logged of a sharded model; use --trainer.strategy ddp or one device.")
        return dict
    if not exact.applies_to(module.policy, [prompt.prompt_ids for prompt in prompts]):
        rank_zero_info(
            f"The {stage} prompts, or the model's vocabulary, are not those of the lab's task: no exact values are "
            "logged."
        )
        return dict
    ref_responses = None
    if module.reference is not None:
        with module.reference.scoring() as model:
            ref_responses = exact.enumerate(model)

    def values() -> dict[str, float]:
        now = exact(exact.enumerate(module.policy), ref_responses)
        return {f"exact/{key}": value for key, value in now.items()}

    return values
