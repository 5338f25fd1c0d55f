"""What a model is tried for. Families differ in ways that no configuration tells, and a fault would be silent.

Each trial compares two ways to compute the same few tokens. It needs weights, so nothing on the meta device is tried.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from lit_isdpo.policy.attention import KERNELS, layer_windows
from lit_isdpo.policy.generation import autocast, generating
from lit_isdpo.policy.loading import in_mode
from lit_isdpo.types import InputError, TokenBatch

if TYPE_CHECKING:
    from lit_isdpo.policy.logprob_model import LogProbModel

OPTION = "model.policy.path"
WINDOW = 3  # positions: less than what is tried, so that a window is seen to hide something
PADDING = 9  # positions on the left of a prompt that is tried


class HowToSample(NamedTuple):
    """Which of the quicker ways to sample a model can be used.

    Attributes:
        is_padded: prompts of different lengths share a batch, padded on the left.
        is_cached: keys and values of earlier tokens are kept.
    """

    is_padded: bool
    is_cached: bool


@torch.no_grad()
def check_model(model: "LogProbModel") -> None:
    """Checks that a model is a causal language model whose head is known, and computes each row by itself.

    A row must not depend on later tokens, on the rows beside it, or on whether the model is in training.

    Raises:
        InputError: it is not.
    """
    name, base = type(model.model).__name__, model.model.base_model
    rows = torch.arange(4, device=model.device).repeat(2, 1)
    rows[1, 3] = 0
    # Layers of a sharded model are gathered in the dtype that they compute in.
    numerics = model.compute_dtype if model.is_sharded else model.model.dtype
    with autocast(model.device, numerics):
        own = model.model(input_ids=rows[:1], use_cache=False).logits.float()
        single = getattr(base(input_ids=rows[:1], use_cache=False), "last_hidden_state", None)
        if single is None:
            raise InputError(f"{OPTION}: {name} has no decoder apart from its head, which is not supported.")
        both = base(input_ids=rows, use_cache=False).last_hidden_state
        with in_mode(model.model, training=True):
            in_training = base(input_ids=rows[:1], use_cache=False).last_hidden_state
    tolerance = _tolerance(numerics)
    if not _equal(single[0, :3], both[1, :3], tolerance):
        raise InputError(
            f"{OPTION}: {name} is not causal: a token changes what is computed before it, so its log-probs are not "
            "those of a language model."
        )
    if not _equal(single[0], both[0], tolerance):
        raise InputError(f"{OPTION}: {name} computes a row from the other rows of its batch, which is not supported.")
    if not _equal(single, in_training, tolerance):
        raise InputError(
            f"{OPTION}: {name} computes something else in training, by noise that its configuration does not name; "
            "policy and reference would differ by it."
        )
    head = model.head
    if single.shape[-1] != head.weight.shape[-1] or not _equal(own, head(single), tolerance):
        raise InputError(
            f"{OPTION}: {name} changes its logits after the head in a way that is not supported (known: logit_scale, "
            "logits_scaling, final_logit_softcapping)."
        )


@torch.no_grad()
def why_not_shared(model: "LogProbModel") -> str | None:
    """Why rows cannot hold a prompt with both of its responses, or ``None`` if they can.

    A few tokens in one row and in two must give the same. Windows are made short for it, because those of published
    models are longer than what is tried: a model that takes no notice of the configuration's window is found out.
    """
    config = model.model.config.get_text_config()
    kernel = config._attn_implementation
    if kernel not in KERNELS:
        return f"attn_implementation {kernel!r} does not take such masks ({' and '.join(KERNELS)} do)"
    try:
        windows = layer_windows(config)
    except ValueError as error:
        return str(error)
    if model.model.device.type == "meta":
        return None
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
    )
    plain = torch.tensor([[*prompt, *rejected]], device=device)
    # The architecture is on trial here; FlexAttention would be compiled first.
    changes: dict[str, Any] = {"_attn_implementation": "sdpa"}
    if any(window is not None for window in windows.values()):
        changes["sliding_window"] = WINDOW
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        together = model.decode(shared)[0, [0, 1, 2, 5, 6, 7]]
        with autocast(device, model.compute_dtype):
            apart = model.model.base_model(input_ids=plain, use_cache=False).last_hidden_state[0]
    except Exception as error:  # whatever an architecture says to a mask that it does not know
        return f"it takes no such masks ({next(iter(str(error).splitlines()), type(error).__name__)})"
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    if not _equal(apart, together, _tolerance(model.model.dtype, model.compute_dtype)):
        return "the tokens of a row depend on more than their mask"
    return None


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
        with generating(model.model, config, device, numerics):
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
        if error <= 2 * _tolerance(numerics) * spread + 1e-6:
            return way
    raise InputError(
        f"{OPTION}: {type(model.model).__name__} cannot be sampled: transformers' generate gives other probabilities "
        "than a forward of the whole text. Set probe.num_prompts to 0 to train it without samples."
    )


def _tolerance(*dtypes: torch.dtype) -> float:
    """Share of the largest value. Narrow numerics round; a fault of an architecture is off by far more."""
    is_exact = torch.get_float32_matmul_precision() == "highest" and all(dtype == torch.float32 for dtype in dtypes)
    return 1e-3 if is_exact else 0.05


def _equal(expected: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether no value differs by more than ``tolerance`` times the largest one."""
    expected, other = expected.float(), other.float()
    return torch.allclose(expected, other, atol=tolerance * float(expected.abs().max()) + 1e-6, rtol=0)
