"""Responses sampled from a language model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lit_isdpo.objective.logprobs import Head
from lit_isdpo.policy.attention import autocast, tolerance_of
from lit_isdpo.policy.loading import in_mode
from lit_isdpo.types import InputError, PromptBatch, Response

if TYPE_CHECKING:
    from lit_isdpo.policy.logprob_model import LogProbModel

PADDING = 9  # positions on the left of a prompt that is tried


@contextmanager
def ready_to_generate(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Leaves nothing to the model's own settings in here.

    A model in training mode with gradient checkpointing has no key-value cache. Its own generation config would fill in
    options that ``config`` leaves out, for example a chat model's ``top_k``. Compiled layers would be compiled anew for
    each length.
    """
    own_config, model.generation_config = model.generation_config, config
    try:
        with in_mode(model, training=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.generation_config = own_config


@contextmanager
def head_as_scored(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Samples from the logits that are scored: bfloat16's 8 bits are a few hundredths of a nat per token."""
    if model.dtype == compute_dtype == torch.float32:  # the model's own are the same
        yield
        return

    def once_more(head: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            hidden_states = arguments[0]
            logits = Head(head.weight, head.bias, dtype=compute_dtype).logits(hidden_states.flatten(0, -2))
            shaped: Tensor = logits.unflatten(0, hidden_states.shape[:-1])
            return shaped

    hook = cast(nn.Module, model.get_output_embeddings()).register_forward_hook(once_more)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int,
    num_tokens: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    use_cache: bool = True,
    generate: Callable[..., Tensor] | None = None,
) -> list[Response]:
    """Draws one response a prompt.

    Args:
        model: the policy.
        prompts: P prompts, padded on the left, on the model's device.
        max_new_tokens: a response without EOS ends here, unfinished.
        eos_token_ids: each of them ends a response and is its last token.
        pad_token_id: fills rows that have ended.
        temperature: divides the logits; KL estimates need 1.
        top_p: nucleus; KL estimates need 1.
        seed: the responses are a function of it; the global random state is left as it was.
        num_tokens: how many of the vocabulary's entries may be sampled, the first ones. Default: all. The others' share
            goes to these in proportion.
        compute_dtype: autocast dtype of the model.
        use_cache: whether keys and values of earlier tokens are kept.
        generate: what is called in place of the model's own ``generate``.

    Returns:
        P responses.

    Raises:
        InputError: the model's probabilities are not finite.
    """
    vocabulary_size = cast(nn.Linear, model.get_output_embeddings()).weight.shape[0]
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        suppress_tokens=list(range(num_tokens or vocabulary_size, vocabulary_size)) or None,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=use_cache,
    )
    device = prompts.input_ids.device
    devices = [device] if device.type == "cuda" else []
    numerics = autocast(device, compute_dtype, keep_weights=True)
    is_ready = ready_to_generate(model, config)
    try:
        with torch.random.fork_rng(devices), numerics, is_ready, head_as_scored(model, compute_dtype):
            torch.manual_seed(seed)
            output = (generate or cast(Any, model.generate))(
                input_ids=prompts.input_ids, attention_mask=prompts.attention_mask.long(), generation_config=config
            )
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise InputError(
            "The policy's next-token probabilities are NaN or infinite: its weights have diverged. Begin anew, or go "
            "on from an earlier checkpoint, with a lower learning rate or weight decay."
        ) from error
    ends = set(eos_token_ids)
    responses = []
    for row in output[:, prompts.input_ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        responses.append(Response(row, False) if end is None else Response(row[: end + 1], True))
    return responses


class HowToSample(NamedTuple):
    """Which of the quicker ways to sample a model can be used.

    Attributes:
        is_padded: prompts of different lengths share a batch, padded on the left.
        is_cached: keys and values of earlier tokens are kept.
    """

    is_padded: bool
    is_cached: bool


@torch.no_grad()
def how_to_sample(model: "LogProbModel") -> HowToSample:
    """The quickest way to sample in which a model gives the probabilities that it is scored with.

    Positions or states of some decoders take no notice of padding on the left, and some have a cache that is not exact.

    Raises:
        InputError: there is none.
    """
    vocabulary = model.vocabulary_size
    prompt, forced = [i % vocabulary for i in (5, 9, 6, 8)], [i % vocabulary for i in (7, 4, 3)]
    device = model.device
    numerics = model.compute_dtype if model.is_sharded else model.model.dtype
    with autocast(device, numerics):
        whole = model.model.base_model(input_ids=torch.tensor([prompt + forced], device=device), use_cache=False)
    scored = model.head(whole.last_hidden_state[0, len(prompt) - 1 : -1])

    def sampled(padding: int, is_cached: bool) -> Tensor:
        """Logits of the tokens that are forced, beside a row without padding."""
        ids = torch.tensor([[0] * padding + prompt, [i % vocabulary for i in range(padding)] + prompt], device=device)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0

        def force(input_ids: Tensor, scores: Tensor) -> Tensor:
            token = forced[input_ids.shape[1] - padding - len(prompt)]
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token], device=device), 0.0)

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=len(forced),
            use_cache=is_cached,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        is_ready, as_scored = ready_to_generate(model.model, config), head_as_scored(model.model, numerics)
        with autocast(device, numerics, keep_weights=True), is_ready, as_scored:
            generated: Any = model.generate_apart(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[force]
            )
        return torch.stack(generated.logits)[:, 0]

    if not scored.isfinite().all():  # weights that have diverged say nothing about the architecture
        return HowToSample(is_padded=True, is_cached=True)
    for way in (HowToSample(True, True), HowToSample(False, True), HowToSample(False, False)):
        try:
            logits = sampled(PADDING if way.is_padded else 0, way.is_cached)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # of an architecture that cannot
            continue
        # Logits have an offset of no consequence, which may be a hundred times as large as what tells tokens apart.
        error, spread = (logits - scored).norm(), (scored - scored.mean(dim=1, keepdim=True)).norm()
        if error <= 2 * tolerance_of(numerics) * spread + 1e-6:
            return way
    raise InputError(
        f"model.policy.path: {type(model.model).__name__} cannot be sampled: transformers' generate gives other "
        "probabilities than a forward of the whole text. Set probe.num_prompts to 0 to train it without samples."
    )
