"""Responses sampled from a language model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lit_isdpo.objective.logprobs import Head
from lit_isdpo.policy.attention import autocast
from lit_isdpo.policy.loading import in_mode
from lit_isdpo.types import InputError, PromptBatch, Response


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
