"""The verb ``test``: what a checkpoint, or a Hugging Face folder, is worth."""

import json
from collections.abc import Iterable
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_isdpo.evaluation.evaluator import Engine, Evaluator, Outcome
from lit_isdpo.evaluation.judge import Judge
from lit_isdpo.evaluation.store import write_text
from lit_isdpo.policy.generation import Sampling
from lit_isdpo.policy.vllm_sampler import check_vllm
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.models import check_positions
from lit_isdpo.training.probe import SamplingProbe, exact_values, find_gold_reward, log_texts
from lit_isdpo.training.run_folder import run_dir
from lit_isdpo.types import InputError, Reward, check_least

OWNERS = {"policy": "", "reference": "reference/", "chosen": "chosen/"}
"""Whose responses, in the order of the table's columns, and the prefix of their log keys."""
ROWS = (
    ("gold reward", "gold_reward"),
    ("reward", "reward"),
    ("wins against the reference", "win_rate"),
    ("  at equal length", "win_rate_lc"),
    ("wins against the chosen", "win_rate_vs_chosen"),
    ("  at equal length", "win_rate_vs_chosen_lc"),
    ("judged wins against the reference", "judge/win_rate"),
    ("  at equal length", "judge/win_rate_lc"),
    ("judged wins against the chosen", "judge/win_rate_vs_chosen"),
    ("  at equal length", "judge/win_rate_vs_chosen_lc"),
    ("judge: no verdict", "judge/invalid_fraction"),
    ("judge: other verdict in other order", "judge/inconsistent_fraction"),
    ("KL(policy, reference), nats", "kl/rao_blackwell"),
    ("  by k1", "kl/k1"),
    ("  by k3", "kl/k3"),
    ("  of responses that were cut", "kl/cut_fraction"),
    ("response length, tokens", "response_length"),
    ("response length, characters", "response_characters"),
    ("finished", "finished_fraction"),
    ("repeated 3-grams", "repetition"),
    ("exact gold reward", "exact/gold_reward"),
    ("exact win rate", "exact/win_rate"),
    ("exact KL, nats", "exact/kl"),
    ("loss", "loss"),
    ("reward accuracy", "rewards/accuracies"),
)
"""Label and log key of the table's rows; a key that is not there has no row."""


NUM_SHOWN = 8  # responses that are logged as text


class EvaluationSampling(Sampling):
    """Settings whose messages name the evaluation."""

    option: ClassVar[str] = "evaluation"


class Evaluation(Callback):
    """Evaluates the policy in ``test``: reward, win rates against the reference's and the data's responses, KL.

    Everything is logged as ``test/*`` with its standard error and its 95 % bootstrap interval over prompts, printed,
    and written to ``evaluation.json`` in the run's folder. Responses and scores are kept in Parquet files under
    ``folder``; what is there already, of this or another run, is not computed again. On tasks of the lab whose
    responses can be enumerated, ``test/exact/*`` is logged too.

    Args:
        num_prompts: distinct prompts of the test set, over all ranks; 0 switches the evaluation off. Default: the
            probe's.
        num_responses: to each prompt.
        max_new_tokens: longer responses are cut. Default: the probe's.
        temperature: divides the logits, above 0.
        top_p: nucleus, above 0 and at most 1.
        seed: of the responses.
        batch_size: responses sampled at a time on one rank. The responses are a function of it too; a large one suits
            vLLM, which makes its own batches.
        engine: what samples; vllm is an extra, and takes one process.
        engine_options: of ``vllm.LLM``, ``{tensor_parallel_size: 2, gpu_memory_utilization: 0.5}`` say.
        kl_prompts: prompts on which the KL is measured, by samples of its own at temperature 1 and top-p 1; 0 does not.
            Default: as many as ``num_prompts``.
        kl_max_new_tokens: of those samples. Part of what the KL means. Default: ``max_new_tokens``.
        reward: scores the responses. Default: the gold reward, where the data is the lab's.
        judge: a language model that compares the responses with the reference's and with the chosen ones.
        folder: of the Parquet files. Default: ``evaluations`` in the folder of the runs.
    """

    def __init__(
        self,
        num_prompts: int | None = None,
        num_responses: int = 1,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 128,
        engine: Engine = "transformers",
        engine_options: dict[str, Any] | None = None,
        kl_prompts: int | None = None,
        kl_max_new_tokens: int | None = None,
        reward: Reward | None = None,
        judge: Judge | None = None,
        folder: str | None = None,
    ) -> None:
        check_least("evaluation.num_prompts", num_prompts, 0)
        check_least("evaluation.kl_prompts", kl_prompts, 0)
        check_least("evaluation.kl_max_new_tokens", kl_max_new_tokens, 1)
        if engine_options and engine != "vllm":
            raise InputError("evaluation.engine_options are vLLM's; use them with --evaluation.engine vllm.")
        if num_prompts is not None and kl_prompts is not None and kl_prompts > num_prompts:
            raise InputError(f"evaluation.kl_prompts: {kl_prompts} prompts are more than num_prompts, {num_prompts}.")
        self.num_prompts = num_prompts
        self.kl_prompts = kl_prompts
        self.max_new_tokens = max_new_tokens
        self.kl_max_new_tokens = kl_max_new_tokens
        self.sampling = EvaluationSampling(
            num_responses=num_responses,
            max_new_tokens=128 if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            seed=seed,
        )
        self.engine = engine
        self.engine_options = engine_options
        self.reward = reward
        self.judge = judge
        self.folder = folder
        self.outcome: Outcome | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks what only the trainer tells, before anything is loaded.

        Raises:
            InputError: vLLM is not there, or would be shared by several processes; or the model writes no responses, or
                has no positions for them.
        """
        if stage != "test":
            return
        assert isinstance(pl_module, LanguageModule)
        if pl_module.writes:
            num_prompts, limits = self._extent(trainer)
            for name in limits if num_prompts else ():
                check_positions(pl_module, "test", limits[name], f"evaluation.{name}", num_prompts)
        elif self.reward or self.judge:
            raise InputError("evaluation: a reward model writes no responses; leave evaluation.reward and judge out.")
        if self.engine == "vllm":
            check_vllm("evaluation.engine")
            if trainer.world_size > 1:
                raise InputError(
                    "evaluation.engine: vLLM runs in one process; use --trainer.devices 1 and give it more devices by "
                    "--evaluation.engine_options.tensor_parallel_size."
                )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates, and logs."""
        assert isinstance(pl_module, LanguageModule)
        num_prompts, limits = self._extent(trainer)
        if not (num_prompts and pl_module.writes):
            return
        prompts = pl_module.data.prompts("test", num_prompts)
        if pl_module.reference is None:
            rank_zero_info("There is no reference: KL and wins against it are left out.")
        sampling = replace(self.sampling, max_new_tokens=limits["max_new_tokens"])
        plain = replace(sampling, num_responses=1, temperature=1.0, top_p=1.0)
        evaluator = Evaluator(
            prompts=prompts,
            vocabulary=pl_module.vocabulary,
            sampling=sampling,
            folder=Path(self.folder or Path(trainer.default_root_dir) / "evaluations"),
            kl_prompts=len(prompts) if self.kl_prompts is None else self.kl_prompts,
            kl_sampling=replace(plain, max_new_tokens=limits["kl_max_new_tokens"]),
            reward=self.reward or find_gold_reward(pl_module.data, "test", prompts[0].source),
            reward_option="evaluation.reward",
            judge=self.judge,
            engine=self.engine,
            engine_options=self.engine_options or {},
            ranks=pl_module.ranks,
            show=_show if trainer.progress_bar_callback and trainer.is_global_zero else lambda shards, _: shards,
        )
        self.outcome = evaluator(pl_module.policy, pl_module.reference)
        values = self.outcome.values | exact_values(pl_module, "test", prompts)()
        pl_module.log_dict({f"test/{key}": value for key, value in values.items()})
        log_texts(trainer, "test", self.outcome.samples["policy"][:NUM_SHOWN])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the numbers, and prints them."""
        folder = run_dir(trainer)
        if self.outcome is None or not trainer.is_global_zero:
            return
        metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        content = {
            "metrics": {key: value if isfinite(value) else None for key, value in metrics.items()},
            "files": self.outcome.files,
            "settings": self.outcome.settings,
        }
        write_text(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
        console = Console()
        console.print(_table({key.removeprefix("test/"): value for key, value in metrics.items()}))
        for owner, file in self.outcome.files.items():
            console.print(f"Responses ({owner}): {file}", soft_wrap=True, highlight=False)
        console.print(f"Numbers: {folder / 'evaluation.json'}", soft_wrap=True, highlight=False)

    def _extent(self, trainer: Trainer) -> tuple[int, dict[str, int]]:
        """Number of prompts, and the tokens that limit a response that is scored and one that the KL is measured on."""
        probe = next((one for one in trainer.callbacks if isinstance(one, SamplingProbe)), SamplingProbe())  # type: ignore[attr-defined]
        num_prompts = probe.num_prompts if self.num_prompts is None else self.num_prompts
        max_new_tokens = self.max_new_tokens or probe.sampling.max_new_tokens
        return num_prompts, {
            "max_new_tokens": max_new_tokens,
            "kl_max_new_tokens": self.kl_max_new_tokens or max_new_tokens,
        }


def _show(shards: Iterable[int], doing: str) -> Iterable[int]:
    return track(list(shards), description=doing, transient=True, disable=not Console().is_terminal)


def _table(metrics: dict[str, float]) -> Table:
    """Means with half the width of their intervals, a column for each owner of responses."""
    table = Table(title="Test (± half of the 95 % interval over prompts)")
    table.add_column("", no_wrap=True)
    owners = [owner for owner, prefix in OWNERS.items() if f"{prefix}response_characters" in metrics]
    for owner in owners:
        table.add_column(owner, justify="right")
    for label, key in ROWS:
        cells = []
        for owner in owners:
            value = metrics.get(name := OWNERS[owner] + key)
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            spread = "" if low is None or high is None else f" ±{(high - low) / 2:.3f}"
            cells.append("" if value is None else f"{value:.3f}{spread}")
        if any(cells):
            table.add_row(label, *cells)
    return table
