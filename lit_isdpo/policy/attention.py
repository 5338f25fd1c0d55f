"""How a decoder computes its rows: the numerics, the attention kernel, and which token may look at which.

A row [prompt | chosen | rejected] computes a prompt once for both of its responses: positions restart after the
prompt, and no response sees the other. A packed row holds several such pairs, none of which sees another.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_isdpo.types import TokenBatch, first_line

if TYPE_CHECKING:
    from lit_isdpo.policy.logprob_model import LogProbModel

SDPA, FLEX = "sdpa", "flex_attention"
"""Attention implementations that take such a mask as it is; an eager one would add a boolean mask to the scores."""
IN_PARTS = "lit_isdpo_sdpa_in_parts"
"""Our name for :func:`sdpa_in_parts` in transformers' tables; models that others load keep ``sdpa`` as it is."""
FLEX_BLOCK = 128  # positions; FlexAttention skips blocks of so many
WINDOW = 3  # positions: less than what is tried, so that a window is seen to hide something
SPLIT_FROM = 128  # positions of a prompt; a shorter one is quicker under the mask of its responses
# In the names of windows that no mask's positions measure: GPT-Neo, Doge, RecurrentGemma, ModernBERT's decoder.
OTHER_WINDOWS = ("window_size", "window_len", "local_attention")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def autocast(device: torch.device, compute_dtype: torch.dtype, *, keep_weights: bool = False) -> torch.autocast:
    """The numerics of a policy's decoder: what is sampled and what is scored must be the same policy.

    Args:
        device: of the model.
        compute_dtype: of its matrix products.
        keep_weights: keeps the weights in ``compute_dtype`` until the context ends, for a loop of forwards. A single
            one uses each weight once, and would hold a second copy of the model for nothing.
    """
    enabled = compute_dtype == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keep_weights)


def kernel_of(config: PretrainedConfig) -> str:
    """The attention kernel that a model has, which may be another than the one that was asked for."""
    kernel = str(config.get_text_config()._attn_implementation)
    return SDPA if kernel == IN_PARTS else kernel


def set_kernel(config: PretrainedConfig, kernel: str) -> None:
    """Gives the layers of a decoder another attention; transformers looks the name up at each call."""
    if kernel == IN_PARTS:
        AttentionInterface.register(IN_PARTS, sdpa_in_parts)
        AttentionMaskInterface.register(IN_PARTS, sdpa_mask)
    config.get_text_config()._attn_implementation = kernel


def layer_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """The window of each kind of attention layer, in positions; ``None`` looks back without end.

    Raises:
        ValueError: a kind of layer that hands information on in other ways than by attention over masked positions.

    >>> layer_windows(PretrainedConfig(sliding_window=8))
    {'sliding_attention': 8}
    """
    if others := [name for name in vars(config) if any(word in name for word in OTHER_WINDOWS)]:
        raise ValueError(f"its layers see no further than {others[0]} says")
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):  # Qwen names a window that it does not use
        window = None
    kinds = getattr(config, "layer_types", None) or [_FULL if window is None else _SLIDING]
    windows = {_FULL: None, _SLIDING: window}
    if unknown := sorted(set(kinds) - set(windows)):
        raise ValueError(f"its layers of type {unknown[0]!r} do more than attend to masked positions")
    return {kind: windows[kind] for kind in sorted(set(kinds))}


def visible(segment_ids: Tensor, position_ids: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The rule as FlexAttention's ``mask_mod``: whether the query at q of row b sees the key at k.

    Args:
        segment_ids: ``(R, T)``, as in :class:`~lit_isdpo.types.TokenBatch`.
        position_ids: ``(R, T)``.
        window: how far back a token sees, in positions; ``None`` is without end.
    """

    def rule(row: Tensor, head: Any, q: Tensor, k: Tensor) -> Tensor:
        of_query, of_key = segment_ids[row, q], segment_ids[row, k]
        same_pair = of_query.div(3, rounding_mode="floor") == of_key.div(3, rounding_mode="floor")
        is_prompt = of_key.remainder(3) == 0
        # Padding is a pair of its own, -1: a query that saw nothing would be NaN.
        seen = (k <= q) & same_pair & (is_prompt | (of_query == of_key))
        return seen if window is None else seen & (position_ids[row, q] - position_ids[row, k] < window)

    return rule


def attention_masks(tokens: TokenBatch, config: PretrainedConfig, split_from: int) -> Any:
    """What a model takes for ``attention_mask`` to read rows of several segments.

    Args:
        tokens: with segment ids.
        config: of the decoder.
        split_from: positions of the shortest prompt that :func:`sdpa_in_parts` attends to without a mask.

    Returns:
        A boolean ``(R, 1, Q, T)`` mask for sdpa, whose Q queries are the last ones of T, or FlexAttention's
        ``BlockMask``, whose empty blocks cost nothing; a dictionary of them by kind of layer if there are several.
    """
    assert tokens.segment_ids is not None
    (num_rows, length), device, end = tokens.input_ids.shape, tokens.input_ids.device, tokens.num_prompt_positions
    takes_parts = config.get_text_config()._attn_implementation == IN_PARTS
    masks: dict[str, Any] = {}
    for kind, window in layer_windows(config).items():
        rule = visible(tokens.segment_ids, tokens.position_ids, window)
        if kernel_of(config) == FLEX:
            create = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
            masks[kind] = create(rule, num_rows, None, length, length, device=str(device))
        else:
            rows, at = torch.arange(num_rows, device=device)[:, None, None], torch.arange(length, device=device)
            is_split = takes_parts and end >= split_from and (window is None or end <= window)
            masks[kind] = rule(rows, None, at[end if is_split else 0 :, None], at)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def sdpa_in_parts(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The sdpa of transformers, but queries before those of the mask are attended to causally, without a mask.

    Kernels compute all that a boolean mask hides and skip what a causal one does. A prompt sees only itself, so its
    part is causal; the responses' part sees all keys.

    Args:
        module: the attention layer.
        query: ``(R, heads, T, D)``.
        key: ``(R, key-value heads, T, D)``.
        value: as ``key``.
        attention_mask: boolean ``(R, 1, Q, T)`` for the last Q > 1 queries; sdpa itself takes no such mask, unless Q
            is T.
        **options: transformers' own.

    Returns:
        ``(R, T, heads, D)``, and no attention weights.
    """
    length = query.shape[2]
    if attention_mask is None or not 1 < attention_mask.shape[2] < length:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return whole
    end = length - attention_mask.shape[2]
    own = query[:, :, :end], key[:, :, :end], value[:, :, :end]
    prompts, _ = sdpa_attention_forward(module, *own, None, **options | {"is_causal": True})
    responses, _ = sdpa_attention_forward(module, query[:, :, end:], key, value, attention_mask, **options)
    return torch.cat((prompts, responses), dim=1), None


@cache
def _compiled_create_block_mask() -> Callable[..., Any]:
    """Compiled, it needs no T x T intermediates."""
    compiled: Callable[..., Any] = torch.compile(create_block_mask)
    return compiled


@torch.no_grad()
def why_not_shared(model: "LogProbModel") -> str | None:
    """Why rows cannot hold a prompt with both of its responses, or ``None`` if they can.

    A few tokens in one row and in two must give the same. Windows are made short for it, because those of published
    models are longer than what is tried: a model that takes no notice of the configuration's window is found out. A
    model whose sdpa takes its masks in parts gets that attention for good. Without weights, only shapes are tried.
    """
    config = model.model.config.get_text_config()
    kernel, split_from, window = kernel_of(config), model.split_from, getattr(config, "sliding_window", None)
    if kernel not in (SDPA, FLEX):
        return f"attn_implementation {kernel!r} does not take such masks ({SDPA} and {FLEX} do)"
    try:
        windows = layer_windows(config)
    except ValueError as error:
        return str(error)
    device, vocabulary = model.device, model.vocabulary_size
    prompt, chosen, rejected = ([i % vocabulary for i in ids] for ids in ((5, 9, 6), (7, 4), (8, 3, 5)))
    shared = TokenBatch(
        input_ids=torch.tensor([[*prompt, *chosen, *rejected]], device=device),
        attention_mask=torch.ones(1, 8, dtype=torch.bool, device=device),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]], device=device),
        completion_ids=torch.empty(0, device=device),
        completion_mask=torch.empty(0, device=device),
        logit_positions=torch.empty(0, device=device),
        completion_index=torch.empty(0, device=device),
        segment_ids=torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]], device=device),
        num_prompt_positions=len(prompt),
    )
    plain = torch.tensor([[*prompt, *rejected]], device=device)
    tolerance, why = tolerance_of(model.model.dtype, model.compute_dtype), ""
    try:
        model.split_from = len(prompt)
        if any(each is not None for each in windows.values()):
            config.sliding_window = WINDOW
        for tried in (IN_PARTS, SDPA):  # the architecture is on trial here; FlexAttention would be compiled first
            set_kernel(config, tried)
            try:
                together = model.decode(shared)[0, [0, 1, 2, 5, 6, 7]]
                with autocast(device, model.compute_dtype):
                    apart = model.model.base_model(input_ids=plain, use_cache=False).last_hidden_state[0]
            except Exception as error:  # whatever an architecture says to a mask that it does not know
                why = f"it takes no such masks ({first_line(error)})"
                continue
            if device.type == "meta" or equal_within(apart, together, tolerance):
                kernel = tried if kernel == SDPA else kernel
                return None
            why = "the tokens of a row depend on more than their mask"
        return None if device.type == "meta" else why
    finally:
        set_kernel(config, kernel)
        model.split_from = split_from
        if window is not None:
            config.sliding_window = window


def tolerance_of(*dtypes: torch.dtype) -> float:
    """Share of the largest value. Narrow numerics round; a fault of an architecture is off by far more."""
    is_exact = torch.get_float32_matmul_precision() == "highest" and all(dtype == torch.float32 for dtype in dtypes)
    return 1e-3 if is_exact else 0.05


def equal_within(expected: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether no value differs by more than ``tolerance`` times the largest one."""
    expected, other = expected.float(), other.float()
    return torch.allclose(expected, other, atol=tolerance * float(expected.abs().max()) + 1e-6, rtol=0)
