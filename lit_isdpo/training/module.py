"""What supervised and preference training share: the policy, its checkpoints, and how it is sampled."""

from abc import ABC
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lit_isdpo.data.collation import batch_prompts
from lit_isdpo.data.encoding import pad_token_id, terminator_ids
from lit_isdpo.data.outcomes import Split
from lit_isdpo.evaluation.rewards import Reward
from lit_isdpo.evaluation.sampling import sample_many
from lit_isdpo.policy.loading import PolicyConfig, load_config
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model, outline_logprob_model
from lit_isdpo.policy.vocabulary import num_tokens
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError, PreferenceBatch, SFTBatch

WEIGHTS_PREFIX = "policy.model."  # of the model's tensors in a checkpoint
BASE_KEY = "base_fingerprint"  # of a checkpoint that holds an adapter alone


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ``predict`` samples responses; the probe's KL has its own, fixed at temperature 1 and top-p 1.

    Args:
        num_responses: to each row's prompt, drawn independently; rows with the same prompt get their own.
        max_new_tokens: longer responses are cut.
        temperature: divides the logits, above 0.
        top_p: nucleus, above 0 and at most 1.
        seed: the responses are a function of it, the weights and the batch size.
    """

    num_responses: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_responses < 1:
            raise InputError(f"sampling.num_responses must be at least 1, not {self.num_responses}.")
        if self.max_new_tokens < 1:
            raise InputError(f"sampling.max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise InputError(f"sampling.temperature must be above 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 10**9:
            raise InputError(f"sampling.seed must be at least 0 and less than 10^9, not {self.seed}.")


class Prediction(NamedTuple):
    """A sampled response.

    Attributes:
        row_id: the row whose prompt it answers.
        prompt: as text, without special tokens.
        response: likewise.
        finished: false where the token limit cut it.
        prompt_ids: the prompt's tokens.
        token_ids: its own, EOS included where it is finished.
    """

    row_id: int
    prompt: str
    response: str
    finished: bool
    prompt_ids: list[int]
    token_ids: list[int]


class PolicyModule(LanguageModule, ABC):
    """A trainable policy.

    Args:
        policy: the model that is trained.
        sampling: how ``predict`` samples.
        **options: those of :class:`LanguageModule`.
    """

    policy: LogProbModel

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> None:
        # Read here, so that a model that is none is found out before any data is read.
        super().__init__(policy, load_config(policy).get_text_config(), **options)
        self.sampling = sampling

    @property
    def network(self) -> LogProbModel:
        """The policy."""
        return self.policy

    @property
    def tensors_option(self) -> str:
        """What decides which tensors a checkpoint must have."""
        return f"model.policy.{'path' if self.policy.adapter is None else 'peft'}"

    @property
    def random_start(self) -> str | None:
        """All of the policy, if the config asks for it."""
        if self.source.init == "pretrained":
            return None
        return (
            "The policy starts from random weights, as model.policy.init is random: "
            f"{self.source.path!r} gives only its architecture."
        )

    @property
    def reward(self) -> Reward | None:
        """What the policy is trained on; only online methods have one."""
        return None

    def setup(self, stage: str) -> None:
        """Checks what only the trainer and the data together can tell."""
        super().setup(stage)
        if stage == "predict":
            split = self.trainer.datamodule.split_to_predict  # type: ignore[attr-defined]
            self.check_positions(split, self.sampling.max_new_tokens, "model.sampling.max_new_tokens")

    def check_positions(self, split: Split, max_new_tokens: int, option: str, num_prompts: int | None = None) -> None:
        """Raises for responses that may grow beyond the positions that the model knows.

        Learned positions end there with an index error, and rotary ones go on to values that were never trained.

        Args:
            split: whose prompts are answered; its rows were read.
            max_new_tokens: of a response.
            option: has that limit, for the message.
            num_prompts: the first ones of the split are answered; ``None`` stands for all.

        Raises:
            InputError: the longest prompt and a response of that length are more.
        """
        positions = self.positions
        if num_prompts is None:
            rows = self.trainer.datamodule.splits.rows[split]  # type: ignore[attr-defined]
            longest = int(rows.num_tokens()["prompt"].max())
        else:
            prompts = self.trainer.datamodule.prompts(split, num_prompts)  # type: ignore[attr-defined]
            longest = max(len(prompt.prompt_ids) for prompt in prompts)
        if positions is not None and longest + max_new_tokens > positions:
            raise InputError(
                f"{option}: {max_new_tokens} tokens behind a prompt of {longest}, the longest {split} prompt in use, "
                f"are more than the model's {positions} positions; lower it or data.max_prompt_length."
            )

    def configure_model(self) -> None:
        """Loads the policy; Lightning calls this once for each of fit, validate, test and predict."""
        if not hasattr(self, "policy"):
            self.policy = self.load_model(self.source)
            self.policy.train()  # dropout is 0; gradient checkpointing works in training mode alone

    def load_model(self, config: PolicyConfig, *, option: str = "model.policy.path") -> LogProbModel:
        """A model as the trainer's strategy holds it: whole, or this rank's part of it."""
        sharding = getattr(self.trainer.strategy, "sharding", None)
        model: LogProbModel = (load_logprob_model if sharding is None else sharding.load)(config, option=option)
        model.num_tokens = num_tokens(self.tokenizer)
        self.say_attention(model.model, option)
        return model

    @property
    def outline_config(self) -> PolicyConfig:
        """FlexAttention needs values, so sdpa takes its place."""
        return replace(self.source, attn_implementation="sdpa")

    def configure_outline(self) -> None:
        """Lays out the policy."""
        self.policy = outline_logprob_model(self.outline_config)
        self.policy.train()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint holds: of a policy with an adapter, the adapter alone."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.policy.adapter is None:
            return state
        names = self.policy.adapter.names
        return {key: value for key, value in state.items() if key.removeprefix(WEIGHTS_PREFIX) in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside an adapter, keeps what tells its base from others."""
        super().on_save_checkpoint(checkpoint)
        if self.policy.adapter is not None:
            checkpoint[BASE_KEY] = self.policy.adapter.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this kind, and of this base.

        Raises:
            InputError: an adapter meets a whole model, or another base than its own.
        """
        super().on_load_checkpoint(checkpoint)
        adapter, base = self.policy.adapter, checkpoint.get(BASE_KEY)
        if adapter is None and base is not None:
            raise InputError("ckpt_path: the checkpoint holds an adapter alone; set model.policy.peft as its run did.")
        if adapter is not None and base is None:
            raise InputError(
                "ckpt_path: the checkpoint holds a whole model and no adapter; leave model.policy.peft out, or begin "
                "anew from what `lit-isdpo export` makes of it."
            )
        if adapter is not None and base != adapter.base_fingerprint:
            raise InputError(
                f"model.policy.path: {self.source.path!r} has other weights than the model that the "
                "checkpoint's adapter was trained on (or other ones in this dtype); name that one."
            )

    @property
    def eos_token_ids(self) -> list[int]:
        """Every token that ends a response: the tokenizer's, and what the model's generation config adds."""
        generation_config = self.policy.model.generation_config
        own = generation_config.eos_token_id if generation_config is not None else None
        others = own if isinstance(own, list) else [own]
        return sorted({*terminator_ids(self.tokenizer), *(token for token in others if token is not None)})

    @property
    def pad_token_id(self) -> int:
        """Fills rows; masks say what is padding."""
        return pad_token_id(self.tokenizer)

    def predict_step(self, batch: PreferenceBatch | SFTBatch, batch_idx: int) -> list[Prediction]:
        """Samples responses to each prompt of the batch; the batch's own responses are not looked at."""
        prompts = [(row_id, prompt) for row_id, prompt in batch_prompts(batch) if row_id >= 0]
        responses = sample_many(
            self.policy,
            [prompt for _, prompt in prompts],
            num_responses=self.sampling.num_responses,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            batch_size=max(1, len(prompts)),  # so that memory does not grow with the number of responses
            seed=self.sampling.seed * 100_003 + batch_idx * self.trainer.world_size + self.global_rank,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        return [
            Prediction(
                row_id,
                self._decode(prompt),
                self._decode(response.token_ids),
                response.finished,
                prompt,
                response.token_ids,
            )
            for (row_id, prompt), drawn in zip(prompts, responses, strict=True)
            for response in drawn
        ]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
