"""Samples the policy at every validation: KL to the reference, gold reward, win rate, and text to read."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.data.datamodule import TextDataModule
from lit_isdpo.data.outcomes import Split
from lit_isdpo.evaluation.evaluator import Evaluator, SampledText
from lit_isdpo.evaluation.rewards import LabReward
from lit_isdpo.lab.folder import exact_evaluation_for
from lit_isdpo.policy.generation import Sampling
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.models import check_positions
from lit_isdpo.types import InputError, ProbePrompt, Prompt, Ranks, check_least


class ProbeSampling(Sampling):
    """Settings whose messages name the probe."""

    option: ClassVar[str] = "probe"


class SamplingProbe(Callback):
    """Logs ``val/kl/*``, ``gold_reward``, ``win_rate``, ``response_length``, ``finished_fraction``, ``repetition``.

    This is the evaluation of ``test`` with few prompts and without files; each value has its ``_stderr`` beside it.

    Of a policy that is trained on a reward, ``val/reward`` is what that one says to the same responses: where it goes
    on rising while the gold reward falls, the reward is over-optimized (arXiv 2210.10760).

    The same seed serves every validation: differences between two steps are then less noisy than either value. On tasks
    of the lab whose responses can be enumerated, ``exact/*`` is logged too: sums over all of them, for every prompt of
    the task.

    Args:
        num_prompts: distinct prompts of the validation set, over all ranks; 0 switches the probe off.
        max_new_tokens: longer responses are cut. Part of what the KL means: keep it the same in runs you compare.
        num_responses: to each prompt. Standard errors are over prompts, of each prompt's mean.
        batch_size: responses sampled at a time on one rank.
        num_shown: responses that are logged as text.
        seed: the responses are a function of it, the weights, ``num_responses``, ``batch_size`` and the
            number of ranks.
    """

    def __init__(
        self,
        num_prompts: int = 64,
        max_new_tokens: int = 128,
        num_responses: int = 1,
        batch_size: int = 128,
        num_shown: int = 8,
        seed: int = 0,
    ) -> None:
        check_least("probe.num_prompts", num_prompts, 0)
        check_least("probe.num_shown", num_shown, 0)
        self.num_prompts = num_prompts
        self.num_shown = num_shown
        self.sampling = ProbeSampling(
            num_responses=num_responses, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
        )
        self.samples: list[SampledText] = []
        self.ref_samples: list[SampledText] = []
        self._evaluator: Evaluator | None = None
        self._exact: Callable[[], dict[str, float]] = dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks, before anything is loaded, that the model has positions for the responses.

        Raises:
            InputError: it has not.
        """
        assert isinstance(pl_module, LanguageModule)
        validates = stage in ("fit", "validate") and trainer.limit_val_batches
        if validates and self.num_prompts and pl_module.writes:
            check_positions(pl_module, "val", self.sampling.max_new_tokens, "probe.max_new_tokens", self.num_prompts)
        self._evaluator = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probes on prompts of the validation set."""
        assert isinstance(pl_module, LanguageModule)
        if not self.num_prompts or trainer.sanity_checking or not pl_module.writes:  # as a reward model
            return
        if self._evaluator is None:
            prompts = pl_module.data.prompts("val", self.num_prompts)
            self._exact = exact_values(pl_module, "val", prompts)
            self._evaluator = Evaluator(
                prompts=prompts,
                vocabulary=pl_module.vocabulary,
                sampling=self.sampling,
                kl_prompts=len(prompts),
                reward=find_gold_reward(pl_module.data, "val", prompts[0].source),
                proxy=pl_module.reward,
                # Ranks that share the weights sample the same, call by call.
                ranks=Ranks() if pl_module.policy.is_sharded else pl_module.ranks,
            )
        outcome = self._evaluator(pl_module.policy, pl_module.reference)
        self.samples, self.ref_samples = outcome.samples["policy"], outcome.samples.get("reference", [])
        values = {key: value for key, value in outcome.values.items() if not key.endswith(("_low", "_high"))}
        pl_module.log_dict({f"val/{key}": value for key, value in (values | self._exact()).items()})
        log_texts(trainer, "val", self.samples[: self.num_shown])


def find_gold_reward(data: TextDataModule, split: Split, prompt: Prompt) -> LabReward | None:
    """The gold reward of a split's prompts. If none is known, a line says so.

    Args:
        data: with the split set up.
        split: whose prompts are answered.
        prompt: one of them, as the data has it.
    """
    rewards = [LabReward.for_folder(folder) for folder in data.splits.folders(split)]
    # In a mixture of tasks each reward reads only the prompts of its task.
    if len({reward and reward.identity for reward in rewards}) == 1 and rewards[0] is not None:
        with suppress(InputError):
            rewards[0]([prompt], [""], [True])
            return rewards[0]
    rank_zero_info(
        f"The {split} prompts are not the lab's as they were written, so no gold reward is known for them: "
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


def log_texts(trainer: Trainer, stage: str, texts: Sequence[SampledText]) -> None:
    """Writes responses to TensorBoard's text tab."""
    rows = [
        f"| {_cell(text.prompt)} | {_cell(text.response)} | {'' if text.reward is None else f'{text.reward:.2f}'} |"
        for text in texts
    ]
    table = "\n".join(["| prompt | response | reward |", "|---|---|---|", *rows])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"{stage}/samples", table, trainer.global_step)


def _cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")
