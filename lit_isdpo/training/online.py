"""Online methods beside the offline ones: the policy samples, a reward judges, the same prompts are trained on."""

from typing import Any, ClassVar

from jsonargparse.typing import lazy_instance
from torch import Tensor

from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.objective.on_policy import OnPolicyObjective, RLOOObjective, RolloutMetrics
from lit_isdpo.objective.pairs import PairLogps
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeights
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reference import ReferenceConfig, starts_at_reference
from lit_isdpo.training.alignment import AlignmentModule, Mu, described
from lit_isdpo.training.guards import check_first_step
from lit_isdpo.training.rollouts import (
    RolloutConfig,
    SampledResponses,
    check_rollouts,
    imitate_rollouts,
    sample_rollouts,
    score_rollouts,
)
from lit_isdpo.types import InputError, PreferenceBatch, Reward, score


class OnlineModule(AlignmentModule):
    """A policy that is trained on its own responses, by RLOO, GRPO or online DPO.

    Of the data's pairs it is trained on the prompts alone: ``data.batch_size`` prompts an optimizer step, with
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
        **options: those of :class:`PolicyModule`.
    """

    trains_on_pairs: ClassVar[bool] = False

    def __init__(
        self,
        reward: Reward,
        policy: PolicyConfig = PolicyConfig(),
        reference: ReferenceConfig | None = ReferenceConfig(),
        objective: OnPolicyObjective = lazy_instance(RLOOObjective),
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008 - immutable
        missing_eos_penalty: float = 0.0,
        mu: Mu = "auto",
        **options: Any,
    ) -> None:
        check_rollouts(reference, "model")
        if not 0 <= missing_eos_penalty < float("inf"):
            raise InputError(
                f"model.missing_eos_penalty must be a finite number of at least 0, not {missing_eos_penalty}."
            )
        super().__init__(
            policy=policy,
            reference=reference,
            loss=objective.implied(),
            weighting=ImportanceWeighting(),
            mu=mu,
            prefix_sharing="auto",
            **options,
        )
        self.samples = True
        self._reward = (reward,)  # in a tuple: a reward that is an nn.Module is not a part of this module
        self.objective = objective
        self.rollout = rollout
        self.missing_eos_penalty = missing_eos_penalty
        self.train_metrics = RolloutMetrics()

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """The objective and its numbers, those of a loss of its own included, and the reward's class."""
        name, numbers = described(self.objective)
        if (loss := numbers.pop("loss", None)) is not None:
            of_loss, own = described(loss)
            name, numbers = f"{name} x {of_loss}", {**own, **numbers}
        more = {"num_responses": self.rollout.num_responses, "missing_eos_penalty": self.missing_eos_penalty}
        return name, {**numbers, **more, "reward": type(self.reward).__name__}

    @property
    def reward(self) -> Reward:
        """Scores what is sampled."""
        return self._reward[0]

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and not isinstance(datamodule, PreferenceDataModule):
            raise InputError("data: online methods take their prompts from PreferenceDataModule.")
        if datamodule is not None and datamodule.packing_length is not None:
            raise InputError("data.packing_length: online methods sample from single prompts; leave the option out.")
        if datamodule is not None and datamodule.read_options.get("margin_column"):
            raise InputError("data.margin_column: online methods know no margins of pairs; leave the option out.")
        if stage == "fit":
            self.check_positions("train", self.rollout.max_new_tokens, "model.rollout.max_new_tokens")

    def micro_batch_loss(self, batch: PreferenceBatch) -> Tensor:
        """Mean loss of the micro-batch's prompts; responses that would be sampled are as long as they may be."""
        assert self.reference is not None
        return self.objective(imitate_rollouts(self.policy, self.reference, batch, self.rollout)).mean()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Samples, scores, and returns the mean loss of the micro-batch's prompts."""
        assert self.reference is not None
        sampled = sample_rollouts(self, batch, batch_idx, self.rollout)
        # Together, or the others would wait for one whose reward fails.
        rewards = self.ranks.agree(lambda: self._rewards(batch, sampled))[self.ranks.rank]
        rollouts = score_rollouts(self.policy, self.reference, sampled, self.vocabulary.pad_token_id, rewards)
        numerics, config = self.source, self.reference_config
        is_first = batch_idx == 0 and self.trainer.global_step == 0
        if is_first and config is not None and starts_at_reference(numerics, config):
            largest = rollouts.logratios.detach().abs().amax(dim=1)
            check_first_step(largest, rollouts.num_tokens.amax(dim=1), numerics, batch.row_ids, self.trainer)
        losses = batch.pair_weights * self.objective(rollouts)
        self.train_metrics.update(losses, rollouts, sampled.finished.to(losses.device), batch.num_counted)
        self.guard.add(losses, batch.row_ids)
        return losses.mean()

    def _losses(self, pairs: PairLogps, weights: PairWeights, batch: PreferenceBatch) -> Tensor:
        """Of held-out pairs, without the weights: these fade as the policy leaves the data, and any loss with them."""
        return batch.pair_weights * (self.loss(pairs) + self.loss.auxiliary(pairs))

    def log_window(self) -> None:
        """Logs the accumulation window once, as a whole."""
        values: dict[str, Tensor] = self.train_metrics.compute()
        self.train_metrics.reset()
        self.log_dict({f"train/{key}": value for key, value in values.items()})

    def forget_window(self) -> None:
        """Empties the sums."""
        self.train_metrics.reset()

    def _rewards(self, batch: PreferenceBatch, sampled: SampledResponses) -> list[float]:
        """Of each response, to its prompt as the data has it."""
        prompt = self.trainer.datamodule.splits.prompt  # type: ignore[attr-defined]
        sources = [
            source
            for source in (prompt("train", row_id) for row_id in batch.row_ids.tolist())
            for _ in range(sampled.num_responses)
        ]
        texts = [self.vocabulary.decode(response.token_ids) for response in sampled.responses]
        finished = [response.finished for response in sampled.responses]
        scores = score(self.reward, sources, texts, finished, option="model.reward")
        return [
            value - (0.0 if ended else self.missing_eos_penalty) for value, ended in zip(scores, finished, strict=True)
        ]
