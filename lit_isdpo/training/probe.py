"""Samples the policy at every validation: KL to the reference, gold reward, win rate, and text to read."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_isdpo.evaluation.probe import ProbeValues, SampledText, run_probe, summarize
from lit_isdpo.evaluation.rewards import Reward
from lit_isdpo.lab.enumeration import ResponseDistribution
from lit_isdpo.lab.exact import ExactEvaluation
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.training.ground_truth import find_exact, find_gold_reward
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError


class SamplingProbe(Callback):
    """Logs ``val/kl/*``, ``gold_reward``, ``win_rate``, ``response_length`` and ``finished_fraction``.

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
        for name, value, least in (
            ("num_prompts", num_prompts, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("num_responses", num_responses, 1),
            ("batch_size", batch_size, 1),
            ("num_shown", num_shown, 0),
        ):
            if value < least:
                raise InputError(f"probe.{name} must be at least {least}, not {value}.")
        self.num_prompts = num_prompts
        self.max_new_tokens = max_new_tokens
        self.num_responses = num_responses
        self.batch_size = batch_size
        self.num_shown = num_shown
        self.seed = seed
        self.reward: Reward | None = None
        self.samples: list[SampledText] = []
        self.ref_samples: list[SampledText] = []
        self._ref_rewards: Tensor | None = None
        self._exact: ExactEvaluation | None = None
        self._ref_responses: ResponseDistribution | None = None
        self._prepared = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks, before anything is loaded, that the model has positions for the responses.

        Raises:
            InputError: it has not.
        """
        validates = stage in ("fit", "validate") and trainer.limit_val_batches
        if validates and self.num_prompts and isinstance(pl_module, LanguageModule) and pl_module.writes:
            pl_module.check_positions("val", self.max_new_tokens, "probe.max_new_tokens", self.num_prompts)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probes on prompts of the validation set."""
        assert isinstance(pl_module, LanguageModule)
        if self.num_prompts and pl_module.writes and not trainer.sanity_checking:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: Trainer, module: LanguageModule) -> None:
        of_all_ranks = trainer.datamodule.prompts("val", self.num_prompts)  # type: ignore[attr-defined]
        # Ranks that share the weights sample the same, call by call.
        num_shares, share = (1, 0) if module.policy.is_sharded else (trainer.world_size, trainer.global_rank)
        if len(of_all_ranks) < num_shares:
            raise InputError(
                f"probe.num_prompts: {len(of_all_ranks)} distinct prompts are too few for {num_shares} ranks; "
                "0 switches the probe off."
            )
        prompts = of_all_ranks[share::num_shares]
        reference = module.reference
        if not self._prepared:
            self._prepared = True
            self.reward = find_gold_reward(trainer.datamodule, "val", prompts[0].source)  # type: ignore[attr-defined]
            self._exact = find_exact(
                trainer.datamodule,  # type: ignore[attr-defined]
                "val",
                module.policy,
                [prompt.prompt_ids for prompt in of_all_ranks],
            )
            self._ref_rewards = self._ref_responses = None
            if reference is not None:
                # Another seed than the policy's: a win rate compares independent responses.
                with reference.scoring() as model:
                    drawn = self._draw(model, None, prompts, module, trainer, seed=self.seed + 1)
                    self._ref_responses = None if self._exact is None else self._exact.enumerate(model)
                self._ref_rewards, self.ref_samples = drawn.rewards, drawn.texts
        values = self._draw(module.policy, reference, prompts, module, trainer, seed=self.seed, proxy=module.reward)
        self.samples = values.texts
        module.log_dict({f"val/{key}": value for key, value in summarize(values, self._ref_rewards).items()})
        if self._exact is not None:  # on every rank alike
            exact = self._exact(self._exact.enumerate(module.policy), self._ref_responses)
            module.log_dict({f"val/exact/{key}": value for key, value in exact.items()})
        log_texts(trainer, "val", self.samples[: self.num_shown])

    def _draw(
        self,
        model: LogProbModel,
        reference: Reference | None,
        prompts: list[Any],
        module: LanguageModule,
        trainer: Trainer,
        *,
        seed: int,
        proxy: Reward | None = None,
    ) -> ProbeValues:
        tokenizer = module.tokenizer
        probe = partial(
            run_probe,
            model,
            reference,
            [prompt.prompt_ids for prompt in prompts],
            prompt_texts=[prompt.text for prompt in prompts],
            sources=[prompt.source for prompt in prompts],
            decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            eos_token_ids=module.eos_token_ids,
            pad_token_id=module.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            num_responses=self.num_responses,
            seed=seed * 1009 + (0 if module.policy.is_sharded else trainer.global_rank),
            reward=self.reward,
            proxy=proxy,
        )
        in_shares = trainer.world_size > 1 and not module.policy.is_sharded
        # Together, or the others would wait for a rank whose reward fails.
        return _join(module.ranks.agree(probe)) if in_shares else probe()


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


def _join(parts: Sequence[ProbeValues]) -> ProbeValues:
    """The ranks' responses together; ranks may hold different numbers of them."""

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return torch.cat(there) if there else None

    return ProbeValues(
        kl=joined([part.kl for part in parts]),
        num_tokens=torch.cat([part.num_tokens for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
        rewards=joined([part.rewards for part in parts]),
        proxy_rewards=joined([part.proxy_rewards for part in parts]),
        texts=[text for part in parts for text in part.texts],
    )
