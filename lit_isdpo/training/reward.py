"""A reward model, trained on the same pairs: what to optimize a policy against, or to judge it by."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.data.encoding import terminator_ids
from lit_isdpo.objective.bradley_terry import RewardMetrics, bradley_terry_losses
from lit_isdpo.policy.loading import DTYPES, PolicyConfig, load_config, read_config
from lit_isdpo.policy.reward_model import (
    ScoreModel,
    choose_pad_token_id,
    is_score_model,
    load_score_model,
    outline_score_model,
    pad_token_id,
    read_score_config,
)
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError, PreferenceBatch

REWARD_WEIGHTS_PREFIX = "reward_model.model."  # of the model's tensors in a checkpoint


class RewardModule(LanguageModule):
    """A reward model in training, by Bradley-Terry: mean over pairs of ``-log sigmoid(r_w - r_l - margin)``.

    Where the data has weights of its own, each multiplies all of its pair's loss. Nothing can be sampled from a reward
    model, so the probe leaves it alone and ``predict`` refuses it.

    Args:
        policy: the model that it begins with: a causal language model, whose decoder gets a new head, or a
            sequence-classification model with one label, which goes on with its own. Its weights are fp32, and all of
            them are trained.
        centering: factor of ``(r_w + r_l)^2``, which keeps rewards around 0 (arXiv 2312.09244 has 0.01); at least 0.
        backbone: the former name of ``policy``, for the configs of earlier runs.
        **options: those of :class:`LanguageModule`.
    """

    reward_model: ScoreModel

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        centering: float = 0.0,
        backbone: PolicyConfig | None = None,
        **options: Any,
    ) -> None:
        policy = backbone or policy
        _check_policy(policy)
        if not 0 <= centering < float("inf"):
            raise InputError(f"model.centering must be a finite number of at least 0, not {centering}.")
        option = "model.policy.path"
        config = read_config(policy, option=option)
        self.has_own_head = is_score_model(config)
        config = (read_score_config if self.has_own_head else load_config)(policy, option=option)
        super().__init__(policy, config.get_text_config(), **options)
        self.centering = centering
        self.tokenizer.pad_token_id = self._pad_token_id(pad_token_id(config))
        self.train_metrics = RewardMetrics()
        self.val_metrics = RewardMetrics()
        self.test_metrics = RewardMetrics()

    def _pad_token_id(self, configured: int | None) -> int:
        """The id that fills rows: with a head of its own the model's, else one that no response ends with."""
        if self.has_own_head and configured is not None:
            return configured
        tokenizer, terminators = self.tokenizer, terminator_ids(self.tokenizer)
        others = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
        chosen = choose_pad_token_id([configured, *others], terminators)
        if chosen is None:
            rank_zero_info(
                f"The tokenizer of {self.source.path!r} has no padding token but EOS, so rewards are read at the token "
                "before EOS, and a response that ended is told from one that was cut by its text alone."
            )
        return terminators[0] if chosen is None else chosen

    @property
    def network(self) -> ScoreModel:
        """The reward model."""
        return self.reward_model

    @property
    def tensors_option(self) -> str:
        """What decides which tensors a checkpoint must have."""
        return "model.policy.path"

    @property
    def method(self) -> tuple[str, dict[str, Any]]:
        """Bradley-Terry."""
        return "Bradley-Terry", {"centering": self.centering}

    @property
    def random_start(self) -> str | None:
        """The head, if the model that it begins with is a language model."""
        if self.has_own_head:
            return None
        return f"The reward model starts with a random head: {self.source.path!r} is a language model and has none."

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and not isinstance(datamodule, PreferenceDataModule):
            raise InputError("data: a reward model is trained on pairs; use PreferenceDataModule.")

    def configure_model(self) -> None:
        """Loads the model; Lightning calls this once for each of fit, validate and test."""
        if not hasattr(self, "reward_model"):
            model = load_score_model(self.source)
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
            self.say_attention(model, "model.policy.path")
            self.reward_model = ScoreModel(model, compute_dtype=DTYPES[self.source.compute_dtype])
            self.reward_model.train()  # dropout is 0; gradient checkpointing works in training mode alone

    def configure_outline(self) -> None:
        """Lays out the model."""
        model = outline_score_model(self.source)
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.reward_model = ScoreModel(model, compute_dtype=DTYPES[self.source.compute_dtype])
        self.reward_model.train()

    def micro_batch_loss(self, batch: PreferenceBatch) -> Tensor:
        """Mean loss of the micro-batch."""
        return self._losses(batch)[0].mean()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the micro-batch. All micro-batches are equally large, so the mean of means is the mean."""
        losses = self._update(self.train_metrics, batch)
        self.guard.add(losses, batch.row_ids)
        return losses.mean()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the validation."""
        self._update(self.val_metrics, batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums of the test."""
        self._update(self.test_metrics, batch)

    def log_window(self) -> None:
        """Logs the accumulation window once, as a whole."""
        self._log("train", self.train_metrics)

    def forget_window(self) -> None:
        """Empties the sums."""
        self.train_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation set's values."""
        self._log("val", self.val_metrics)
        self.log_step()

    def on_test_epoch_end(self) -> None:
        """Logs the test set's values, and prints those that a reader looks for."""
        values = self._log("test", self.test_metrics)
        loss, accuracy = values["loss"].item(), values["rewards/accuracies"].item()
        rank_zero_info(f"Test: loss {loss:.4f}, accuracy {accuracy:.3f}.")

    def _update(self, metrics: RewardMetrics, batch: PreferenceBatch) -> Tensor:
        """Weighted losses of the batch, ``(B,)``, which are added to the sums."""
        losses, chosen, rejected = self._losses(batch)
        metrics.update(losses, chosen, rejected, batch.num_counted)
        return losses

    def _losses(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted losses and both rewards, ``(B,)`` each."""
        chosen, rejected = self.reward_model(batch.tokens).chunk(2)
        losses = bradley_terry_losses(chosen, rejected, batch.margins, centering=self.centering)
        return batch.pair_weights * losses, chosen, rejected

    def _log(self, stage: str, metrics: RewardMetrics) -> dict[str, Tensor]:
        values: dict[str, Tensor] = metrics.compute()
        metrics.reset()
        self.log_dict({f"{stage}/{key}": value for key, value in values.items()})
        return values


def _check_policy(policy: PolicyConfig) -> None:
    """Raises for options that are those of a language model only."""
    if policy.peft is not None:
        raise InputError("model.policy.peft: a reward model is trained whole; set it to null.")
    if policy.init != "pretrained":
        raise InputError("model.policy.init: a reward model begins with pretrained weights; leave the option out.")
    if policy.dtype != "float32":
        raise InputError(
            f"model.policy.dtype {policy.dtype!r}: the weights of a reward model are float32 in training; for "
            f"{policy.dtype} matrix products use model.policy.compute_dtype."
        )
