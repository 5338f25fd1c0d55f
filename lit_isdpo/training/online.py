"""Online methods beside the offline ones: the policy samples, a reward judges, the same prompts are trained on."""

from dataclasses import dataclass
from typing import Any

from jsonargparse.typing import lazy_instance
from torch import Tensor

from lit_isdpo.data.datamodule import PreferenceDataModule, TextDataModule
from lit_isdpo.objective.metrics import Columns, PairMetrics
from lit_isdpo.objective.on_policy import OnPolicyObjective, RLOOObjective, rollout_columns
from lit_isdpo.objective.weights import ImportanceWeighting
from lit_isdpo.policy.loading import PolicyConfig, load_config
from lit_isdpo.policy.reference import ReferenceConfig
from lit_isdpo.training.comparison import Comparison, Mu, described
from lit_isdpo.training.language import LanguageModule, Stage
from lit_isdpo.training.models import check_positions
from lit_isdpo.training.rollouts import (
    RolloutConfig,
    SampledResponses,
    check_rollouts,
    imitate_rollouts,
    sample_rollouts,
    score_rollouts,
)
from lit_isdpo.types import InputError, PreferenceBatch, Reward, score


@dataclass(frozen=True)
class Judge:
    """What scores sampled responses. It is no ``nn.Module``, so a reward that is one is no part of the policy's.

    Attributes:
        reward: scores them.
        missing_eos_penalty: what a response loses that the token limit cut, at least 0.

    Raises:
        InputError: the penalty is out of range.
    """

    reward: Reward
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.missing_eos_penalty < float("inf"):
            raise InputError(
                f"model.missing_eos_penalty must be a finite number of at least 0, not {self.missing_eos_penalty}."
            )


class OnlineModule(LanguageModule):
    """A policy that is trained on its own responses, by RLOO, GRPO or online DPO.

    Of the data's pairs it is trained only on the prompts: ``data.batch_size`` prompts an optimizer step, with
    ``rollout.num_responses`` responses each, which a reward scores. The held-out pairs measure it as they do an offline
    policy: by the loss that its objective implies, and by the importance weights, which say how much of the data's
    responses it would still produce.

    Args:
        policy: the model that is trained.
        reference: the frozen model that the KL is taken to; by default the policy before training. It cannot be null.
        reward: scores the responses: ``LabReward``, a ``RewardModel`` that was trained on the same pairs, or a class of
            your own.
        objective: what is made of the scores.
        rollout: how responses are sampled.
        missing_eos_penalty: what a response loses that the token limit cut, at least 0.
        mu: which policy the weights of the held-out pairs take for the one that wrote them, as of ``PreferenceModule``.
        **options: those of :class:`LanguageModule`.
    """

    comparison: Comparison

    def __init__(
        self,
        reward: Reward,
        policy: PolicyConfig = PolicyConfig(),
        reference: ReferenceConfig | None = ReferenceConfig(),
        objective: OnPolicyObjective = lazy_instance(RLOOObjective),
        rollout: RolloutConfig = RolloutConfig(),
        missing_eos_penalty: float = 0.0,
        mu: Mu = "auto",
        **options: Any,
    ) -> None:
        check_rollouts(reference, "model")
        judge = Judge(reward, missing_eos_penalty)
        loss, weighting = objective.implied(), ImportanceWeighting()
        comparison = Comparison(policy, reference, loss=loss, weighting=weighting, mu=mu, prefix_sharing="auto")
        super().__init__(policy, load_config(policy).get_text_config(), comparison=comparison, **options)
        self.samples = True
        self.judge = judge
        self.objective = objective
        self.rollout = rollout
        self.val_metrics, self.test_metrics = PairMetrics(), PairMetrics()

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """The objective and its numbers, those of a loss of its own included, and the reward's class."""
        name, numbers = described(self.objective)
        if (loss := numbers.pop("loss", None)) is not None:
            of_loss, own = described(loss)
            name, numbers = f"{name} x {of_loss}", {**own, **numbers}
        more = {"num_responses": self.rollout.num_responses, "missing_eos_penalty": self.judge.missing_eos_penalty}
        return name, {**numbers, **more, "reward": type(self.judge.reward).__name__}

    @property
    def reward(self) -> Reward:
        """Scores what is sampled."""
        return self.judge.reward

    def check_data(self, data: TextDataModule, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().check_data(data, stage)
        if stage == "fit" and not isinstance(data, PreferenceDataModule):
            raise InputError("data: online methods take their prompts from PreferenceDataModule.")
        if data.packing_length is not None:
            raise InputError("data.packing_length: online methods sample from single prompts; leave the option out.")
        if data.read_options.get("margin_column"):
            raise InputError("data.margin_column: online methods know no margins of pairs; leave the option out.")
        if stage == "fit":
            check_positions(self, "train", self.rollout.max_new_tokens, "model.rollout.max_new_tokens")
        self.comparison.check_data(data, stage, trains_on_pairs=False)

    def step(self, batch: PreferenceBatch, stage: Stage) -> tuple[Tensor, Columns]:
        """Losses of the prompts' sampled responses; in evaluations those of the pairs.

        The pairs' are without the weights, which fade as the policy leaves the data, and any loss with them.
        """
        assert self.reference is not None
        if stage == "plan":
            return self.objective(imitate_rollouts(self.policy, self.reference, batch, self.rollout)), {}
        if stage != "train":
            pairs = self.comparison.pair_logps(self.policy, batch, stage)
            losses = batch.pair_weights * self.comparison.loss.weighted(pairs)
            return losses, self.comparison.columns(losses, pairs, self.comparison.weighting(pairs))
        sampled = sample_rollouts(self, batch, self.micro_batch, self.rollout)
        # Together, or the others would wait for one whose reward fails.
        rewards = self.ranks.on_all(lambda: self._rewards(batch, sampled))[self.ranks.rank]
        rollouts = score_rollouts(self.policy, self.reference, sampled, self.vocabulary.pad_token_id, rewards)
        if self.is_first_micro_batch:
            largest = rollouts.logratios.abs().amax(dim=1)
            self.comparison.check_start(largest, rollouts.num_tokens.amax(dim=1), batch, self.trainer)
        losses = batch.pair_weights * self.objective(rollouts)
        return losses, rollout_columns(losses, rollouts, sampled.finished)

    def _rewards(self, batch: PreferenceBatch, sampled: SampledResponses) -> list[float]:
        """Of each response, to its prompt as the data has it."""
        prompts = [self.data.splits.prompt("train", row_id) for row_id in batch.row_ids.tolist()]
        sources = [prompt for prompt in prompts for _ in range(sampled.num_responses)]
        texts = [self.vocabulary.decode(response.token_ids) for response in sampled.responses]
        finished = [response.finished for response in sampled.responses]
        scores = score(self.judge.reward, sources, texts, finished, option="model.reward")
        penalty = self.judge.missing_eos_penalty
        return [value - (0.0 if ended else penalty) for value, ended in zip(scores, finished, strict=True)]
