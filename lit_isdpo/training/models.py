"""What a module does with its model besides training it: loads it, keeps it, samples from it, knows its limits."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_isdpo.data.collation import batch_prompts
from lit_isdpo.data.encoding import pad_token_id, terminator_ids
from lit_isdpo.data.outcomes import Split
from lit_isdpo.policy.adapters import Adapter, check_same_tensors
from lit_isdpo.policy.attention import kernel_of
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.loading import PolicyConfig, switch_length
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.vocabulary import num_tokens
from lit_isdpo.types import InputError, PreferenceBatch, SFTBatch

if TYPE_CHECKING:
    from lit_isdpo.training.language import LanguageModule

WEIGHTS_PREFIX = "policy.model."  # of the model's tensors in a checkpoint
BASE_KEY = "base_fingerprint"  # of a checkpoint that holds only an adapter


@dataclass(frozen=True, kw_only=True)
class PredictSampling(Sampling):
    """How ``predict`` samples responses; rows with the same prompt get responses of their own.

    Args:
        num_responses: to each row's prompt, drawn independently.
        max_new_tokens: longer responses are cut.
        temperature: divides the logits, above 0.
        top_p: nucleus, above 0 and at most 1.
        seed: the responses are a function of it, the weights and the data's batch size.
    """

    batch_size: int = field(default=1, init=False)  # a batch's prompts: memory does not grow with the responses


class Prediction(NamedTuple):
    """A sampled response.

    Attributes:
        row_id: the row whose prompt it answers.
        prompt: as text, without special tokens.
        response: as text, without special tokens.
        finished: false if the token limit cut it.
        prompt_ids: the prompt's tokens.
        token_ids: its own, EOS included where it is finished.
    """

    row_id: int
    prompt: str
    response: str
    finished: bool
    prompt_ids: list[int]
    token_ids: list[int]


def vocabulary_of(policy: LogProbModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokenizer's vocabulary; a response also ends at the tokens that the model's generation config names."""
    generation_config = policy.model.generation_config
    own = generation_config.eos_token_id if generation_config is not None else None
    others = own if isinstance(own, list) else [own]
    ends = {*terminator_ids(tokenizer), *(token for token in others if token is not None)}

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return Vocabulary(decode, sorted(ends), pad_token_id(tokenizer))


def predict(
    policy: LogProbModel,
    batch: PreferenceBatch | SFTBatch,
    sampling: PredictSampling,
    vocabulary: Vocabulary,
    *place: int,
) -> list[Prediction]:
    """Samples responses to each prompt of a batch; the batch's own responses are not looked at.

    Args:
        policy: what is sampled.
        batch: has the prompts.
        sampling: how many, and how.
        vocabulary: of the policy.
        *place: the batch's number and the rank, on which the responses depend.
    """
    rows = [(row_id, prompt) for row_id, prompt in batch_prompts(batch) if row_id >= 0]
    prompts = [prompt for _, prompt in rows]
    settings = Sampling(**asdict(sampling) | {"batch_size": max(1, len(prompts))})
    responses = sample(policy, prompts, settings, vocabulary, "predict", *place)
    return [
        Prediction(row_id, vocabulary.decode(prompt), vocabulary.decode(ids), finished, prompt, ids)
        for (row_id, prompt), drawn in zip(rows, responses, strict=True)
        for ids, finished in drawn
    ]


def load_policy(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, load: Callable[..., LogProbModel], option: str
) -> LogProbModel:
    """Loads a model, which then samples only what the tokenizer has; names an attention that was not asked for.

    Args:
        config: the model and its numerics.
        tokenizer: of the policy.
        load: makes all of it, or this rank's part.
        option: that messages name.
    """
    model = load(config, option=option)
    model.num_tokens = num_tokens(tokenizer)
    say_attention(model.model, config, option)
    return model


def say_attention(model: PreTrainedModel, config: PolicyConfig, option: str) -> None:
    """Names the attention of a model that has not the one that was asked for."""
    if (kernel := kernel_of(model.config)) != config.attn_implementation:
        rank_zero_info(
            f"{option}: {type(model).__name__} has no {config.attn_implementation} attention, so its "
            f"attn_implementation is {kernel}."
        )


def outline_source(source: PolicyConfig) -> PolicyConfig:
    """The model of an outline: FlexAttention needs values, so sdpa takes its place."""
    return replace(source, attn_implementation="sdpa")


def check_tensors(module: "LanguageModule", tensors: Mapping[str, Any]) -> None:
    """Compares names and shapes of a checkpoint's tensors with those of a module.

    Raises:
        InputError: the checkpoint is of another model.
    """
    try:
        check_same_tensors(module.state_dict(), tensors)
    except ValueError as error:
        option = "model.policy.path" if module.network.adapter is None else "model.policy.peft"
        raise InputError(
            f"ckpt_path: the checkpoint's tensors are not those of {option} ({error}); use the config.yaml of its own "
            "run."
        ) from error


def longest_input(source: PolicyConfig, architecture: PretrainedConfig, max_length: int) -> int | None:
    """The longest input, in tokens, that a model computes as it was trained to; ``None`` has no limit.

    Args:
        source: the model; without a ``rope_length``, LongRoPE goes by ``max_length``.
        architecture: its configuration.
        max_length: of the run's rows.
    """
    switch = switch_length(architecture)
    if switch is not None and (source.rope_length or max_length) <= switch:  # frequencies for short inputs
        return switch
    positions: int | None = getattr(architecture, "max_position_embeddings", None)
    return positions


def fit_length(source: PolicyConfig, architecture: PretrainedConfig, max_length: int) -> PolicyConfig:
    """Decides which of its frequencies LongRoPE has in a run; arguments as of ``longest_input``.

    Returns:
        The model with its ``rope_length``.

    Raises:
        InputError: rows are longer than the model's positions.
    """
    switch = switch_length(architecture)
    if source.rope_length is None:
        if switch is not None:
            kind = "long" if max_length > switch else "short"
            rank_zero_info(
                f"The model has rotary frequencies for inputs of up to {switch:,} tokens and others for longer ones "
                f"(LongRoPE). All inputs get those for {kind} ones, because data.max_length is {max_length:,}; "
                "model.policy.rope_length can say otherwise."
            )
        source = replace(source, rope_length=max_length)
    positions = longest_input(source, architecture, max_length)
    if positions is not None and max_length > positions:
        why = "" if positions != switch else f", as rope_length is {source.rope_length}"
        raise InputError(f"data.max_length: {max_length} tokens are more than the model's {positions}{why}.")
    return source


def check_positions(
    module: "LanguageModule", split: Split, max_new_tokens: int, option: str, num_prompts: int | None = None
) -> None:
    """Raises for responses that may grow beyond the positions that the model knows.

    Learned positions end there with an index error, and rotary ones go on to values that were never trained.

    Args:
        module: has the model and, by its trainer, the prompts.
        split: whose prompts are answered; its rows were read.
        max_new_tokens: of a response.
        option: has that limit, for the message.
        num_prompts: the first ones of the split are answered; ``None`` stands for all.

    Raises:
        InputError: the longest prompt and a response of that length are more.
    """
    data = module.data
    positions = longest_input(module.source, module.architecture, data.max_length)
    if num_prompts is None:
        longest = int(data.splits.rows[split].num_tokens()["prompt"].max())
    else:
        longest = max(len(prompt.prompt_ids) for prompt in data.prompts(split, num_prompts))
    if positions is not None and longest + max_new_tokens > positions:
        raise InputError(
            f"{option}: {max_new_tokens} tokens behind a prompt of {longest}, the longest {split} prompt in use, "
            f"are more than the model's {positions} positions; lower it or data.max_prompt_length."
        )


def check_base(adapter: Adapter | None, base: str | None, path: str) -> None:
    """Raises for a checkpoint of another kind, or of an adapter on another base.

    Args:
        adapter: of the model that is trained.
        base: the fingerprint that a checkpoint's adapter has of its base; ``None`` in one of a whole model.
        path: of the model, for the message.

    Raises:
        InputError: an adapter meets a whole model, or another base than its own.
    """
    if adapter is None and base is not None:
        raise InputError("ckpt_path: the checkpoint holds only an adapter; set model.policy.peft as its run did.")
    if adapter is not None and base is None:
        raise InputError(
            "ckpt_path: the checkpoint holds a whole model and no adapter; leave model.policy.peft out, or begin "
            "anew from what `lit-isdpo export` makes of it."
        )
    if adapter is not None and base != adapter.base_fingerprint:
        raise InputError(
            f"model.policy.path: {path!r} has other weights than the model that the checkpoint's adapter was trained "
            "on (or other ones in this dtype); name that one."
        )
