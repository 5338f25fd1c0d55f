"""A reward model, trained on the same pairs: what to optimize a policy against, or to judge it by."""

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_isdpo.data.datamodule import PreferenceDataModule, TextDataModule
from lit_isdpo.data.encoding import terminator_ids
from lit_isdpo.objective.losses import bradley_terry_losses
from lit_isdpo.objective.metrics import Columns, score_columns
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
from lit_isdpo.training.language import LanguageModule, Stage
from lit_isdpo.training.models import PredictSampling, say_attention
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

    network_name: ClassVar[str] = "reward_model"
    writes: ClassVar[bool] = False
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
        super().__init__(policy, config.get_text_config(), comparison=None, sampling=PredictSampling(), **options)
        self.centering = centering
        self.tokenizer.pad_token_id = self._pad_token_id(pad_token_id(config))

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
    def method(self) -> tuple[str, dict[str, Any]]:
        """Bradley-Terry."""
        return "Bradley-Terry", {"centering": self.centering}

    @property
    def random_start(self) -> str | None:
        """The head, if the model that it begins with is a language model."""
        if self.has_own_head:
            return None
        return f"The reward model starts with a random head: {self.source.path!r} is a language model and has none."

    def check_data(self, data: TextDataModule, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().check_data(data, stage)
        if not isinstance(data, PreferenceDataModule):
            raise InputError("data: a reward model is trained on pairs; use PreferenceDataModule.")

    def load_network(self, *, outline: bool = False) -> ScoreModel:
        """The reward model that ``policy`` begins."""
        model = (outline_score_model if outline else load_score_model)(self.source)
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        if not outline:
            say_attention(model, self.source, "model.policy.path")
        return ScoreModel(model, compute_dtype=DTYPES[self.source.compute_dtype])

    def step(self, batch: PreferenceBatch, stage: Stage) -> tuple[Tensor, Columns]:
        """Weighted losses of the pairs."""
        chosen, rejected = self.reward_model(batch.tokens).chunk(2)
        losses = batch.pair_weights * bradley_terry_losses(chosen, rejected, batch.margins, centering=self.centering)
        return losses, score_columns(losses.detach(), chosen.detach(), rejected.detach())

    def on_test_epoch_end(self) -> None:
        """Prints the values that a reader looks for too."""
        values = self.log_metrics("test")
        loss, accuracy = values["loss"].item(), values["rewards/accuracies"].item()
        rank_zero_info(f"Test: loss {loss:.4f}, accuracy {accuracy:.3f}.")


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
