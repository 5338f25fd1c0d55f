"""The way to sample: one object of settings, one formula of seeds, one sampler, in the numerics of scoring."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from lit_isdpo.objective.logprobs import Head
from lit_isdpo.policy.attention import autocast, tolerance_of
from lit_isdpo.policy.loading import in_mode
from lit_isdpo.types import InputError, Response, check_least

if TYPE_CHECKING:
    from lit_isdpo.policy.logprob_model import LogProbModel

PADDING = 9  # positions on the left of a prompt that is tried


class Vocabulary(NamedTuple):
    """The tokenizer's part in sampling.

    Attributes:
        decode: token ids to text, special tokens left out.
        eos_token_ids: each ends a response and is its last token.
        pad_token_id: fills rows; masks tell where padding is.
    """

    decode: Callable[[list[int]], str]
    eos_token_ids: list[int]
    pad_token_id: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled. Subclasses name another option, and may fix fields.

    Args:
        num_responses: to each prompt, drawn independently.
        max_new_tokens: longer responses are cut.
        temperature: divides the logits, above 0; KL estimates need 1.
        top_p: nucleus, above 0 and at most 1; KL estimates need 1.
        batch_size: responses sampled at a time on one rank.
        seed: the responses are a function of it, the weights and ``batch_size``.

    Raises:
        InputError: a value is out of range.
    """

    option: ClassVar[str] = "model.sampling"
    least_responses: ClassVar[int] = 1

    num_responses: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(f"{self.option}.num_responses", self.num_responses, self.least_responses)
        check_least(f"{self.option}.max_new_tokens", self.max_new_tokens, 1)
        check_least(f"{self.option}.batch_size", self.batch_size, 1)
        if not 0 < self.temperature < math.inf:
            raise InputError(f"{self.option}.temperature must be above 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"{self.option}.top_p must be above 0 and at most 1, not {self.top_p}.")

    @property
    def is_plain(self) -> bool:
        """Whether responses are drawn from the policy's own distribution."""
        return self.temperature == self.top_p == 1


def seed_of(*parts: object) -> int:
    """A seed of 40 bits: streams of random numbers for different parts (seed, place, rank) have nothing in common."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=5).digest())


@torch.no_grad()
def sample(
    policy: "LogProbModel",
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    vocabulary: Vocabulary,
    *place: object,
    apart: bool = False,
) -> list[list[Response]]:
    """Draws ``num_responses`` to each of P prompts, in the numerics that the policy is scored in.

    The global random state is left as it was.

    Args:
        policy: the model that is sampled.
        prompts: token ids of P prompts.
        sampling: how many, how long, from which distribution.
        vocabulary: of the policy's tokenizer.
        *place: names the call among others with the same seed: stage, step, rank. Without one the seed itself is used.
        apart: whether ranks that share the weights ask for different prompts, as many each; else all ask the same.

    Returns:
        P lists.

    Raises:
        InputError: the model's probabilities are not finite; or it cannot be sampled, or not by ranks that share its
            weights and have prompts of their own.
    """
    device, way = policy.device, policy.how_to_sample
    if apart and policy.is_sharded and not way.is_padded:  # ranks would make different numbers of calls
        raise InputError(
            f"trainer.strategy: {type(policy.model).__name__} is sampled in batches of equally long prompts, which a "
            "sharded model cannot do in training; use 'ddp' or one device."
        )
    # Prompts of like length share a batch, so that little is padding.
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    order = [row for row in by_length for _ in range(sampling.num_responses)]
    groups = [order] if way.is_padded else [list(rows) for _, rows in groupby(order, lambda row: len(prompts[row]))]
    size = sampling.batch_size
    batches = [rows[start : start + size] for rows in groups for start in range(0, len(rows), size)]
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        suppress_tokens=list(range(policy.num_tokens or policy.vocabulary_size, policy.vocabulary_size)) or None,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=vocabulary.eos_token_ids,
        pad_token_id=vocabulary.pad_token_id,
        use_cache=way.is_cached,
    )
    generate = policy.generate_apart if apart else policy.generate
    responses: list[list[Response]] = [[] for _ in prompts]
    seed = seed_of(sampling.seed, *place) if place else sampling.seed
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), generating(policy.model, config, device, policy.compute_dtype):
        for number, rows in enumerate(batches):
            ids, mask = _pad_left([prompts[row] for row in rows], vocabulary.pad_token_id)
            torch.manual_seed(seed + number)
            try:
                output = generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            except RuntimeError as error:
                if "probability tensor contains" not in str(error):
                    raise
                raise InputError(
                    "The policy's next-token probabilities are NaN or infinite: its weights have diverged. Begin anew, "
                    "or go on from an earlier checkpoint, with a lower learning rate or weight decay."
                ) from error
            for row, drawn in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                responses[row].append(_response(drawn, vocabulary.eos_token_ids))
    return responses


@contextmanager
def generating(
    model: PreTrainedModel, config: GenerationConfig, device: torch.device, compute_dtype: torch.dtype
) -> Iterator[None]:
    """Makes a model ready for a loop over tokens: the settings are ``config``'s, the numerics those of scoring.

    A model in training mode with gradient checkpointing has no key-value cache. Its own generation config would fill in
    options that ``config`` leaves out, for example a chat model's ``top_k``. Compiled layers would be compiled anew for
    each length.
    """
    own_config, model.generation_config = model.generation_config, config
    try:
        with (
            in_mode(model, training=False),
            torch.compiler.set_stance("force_eager"),  # compiled layers would be compiled anew for each length
            _casts_kept(model, compute_dtype),
            _cache_in_one_dtype(model, compute_dtype),
            _head_as_scored(model, compute_dtype),
            autocast(device, compute_dtype, keep_weights=True),
        ):
            yield
    finally:
        model.generation_config = own_config


@contextmanager
def _casts_kept(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Lets autocast keep the casts of frozen weights too.

    It keeps those of leaves that require a gradient, and would cast a frozen model again for every token. Layers of a
    sharded model are gathered in the compute dtype already.
    """
    is_cast = compute_dtype == torch.bfloat16
    frozen = [p for p in model.parameters() if is_cast and not p.requires_grad and not isinstance(p, DTensor)]
    frozen = [parameter for parameter in frozen if parameter.dtype == torch.float32]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _cache_in_one_dtype(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Keeps keys in the dtype that attention multiplies them in.

    Rotary positions promote them to fp32, and attention would cast all keys again for every token.
    """
    if compute_dtype != torch.bfloat16:
        yield
        return

    def narrow(update: Callable[..., Any], keys: Tensor, values: Tensor, *where: Any, **options: Any) -> Any:
        return update(keys.to(compute_dtype), values.to(compute_dtype), *where, **options)

    def seen(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        for cache in options.values():
            if isinstance(cache, DynamicCache) and "update" not in vars(cache):
                cache.update = partial(narrow, cache.update)  # type: ignore[method-assign]

    hook = model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _head_as_scored(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Samples from the logits that are scored: bfloat16's 8 bits are a few hundredths of a nat per token."""
    if model.dtype == compute_dtype == torch.float32:  # the model's own are the same
        yield
        return
    head = cast(nn.Linear, model.get_output_embeddings())
    casts: list[Tensor] = []  # of the weight, once for the loop

    def scored(hidden_states: Tensor) -> Tensor:
        weight = casts[0] if casts else _in_factor_dtype(head.weight, compute_dtype)
        if weight is not head.weight and not casts:
            casts.append(weight)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = Head(weight, head.bias, dtype=compute_dtype).logits(hidden_states.flatten(0, -2))
        shaped: Tensor = logits.unflatten(0, hidden_states.shape[:-1])
        return shaped

    head.forward = scored  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def _in_factor_dtype(weight: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The head's weight in the dtype in which :func:`~lit_isdpo.objective.logprobs.product` multiplies it."""
    if not weight.is_cuda:
        return weight.float()
    return weight.to(torch.bfloat16) if compute_dtype == torch.bfloat16 else weight


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """P prompts, padded on the left, where generation wants it: ``(P, T)`` int64 ids and mask.

    >>> _pad_left([[1, 5], [1]], 0)[0].tolist()
    [[1, 5], [0, 1]]
    """
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows, padding_value=pad_token_id), pad([torch.ones_like(row) for row in rows])


def _response(row: list[int], eos_token_ids: Sequence[int]) -> Response:
    end = next((i for i, token in enumerate(row) if token in eos_token_ids), None)
    return Response(row, False) if end is None else Response(row[: end + 1], True)


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
        if error <= 2 * tolerance_of(numerics) * spread + 1e-6:
            return way
    raise InputError(
        f"model.policy.path: {type(model.model).__name__} cannot be sampled: transformers' generate gives other "
        "probabilities than a forward of the whole text. Set probe.num_prompts to 0 to train it without samples."
    )
