"""A causal language model as a function from a batch to log-probs."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lit_isdpo.objective.logprobs import Head, completion_hidden_states, sequence_logps
from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.attention import (
    FLEX,
    FLEX_BLOCK,
    SPLIT_FROM,
    attention_masks,
    autocast,
    equal_within,
    kernel_of,
    tolerance_of,
)
from lit_isdpo.policy.generation import HowToSample, how_to_sample
from lit_isdpo.policy.loading import DTYPES, PolicyConfig, in_mode, load_causal_lm
from lit_isdpo.types import InputError, SequenceLogps, TokenBatch

T = TypeVar("T")
LOGITS_BUDGET = 2**26  # values: 0.25 GiB in fp32, which a KL of next tokens needs some six times over


class LogProbModel(nn.Module):
    """Wraps a Hugging Face causal LM; ``forward`` goes from token ids to the log-probs of the completions.

    The head lives inside ``forward``, behind the decoder, so that whoever wraps this module (FSDP, DDP) sees one root
    whose every parameter is used in its forward.

    Args:
        model: the language model; kept as ``self.model``, so its parameter names stay recognisable.
        compute_dtype: autocast dtype of the decoder.
        chunk_size: completion tokens whose logits exist at a time.
        adapter: the model's adapter, where it has one.

    Attributes:
        num_tokens: how many of the vocabulary's entries are tokens; the others are padding and never sampled. Log-probs
            are over all entries, as elsewhere: what a model gives to padding, it takes from the tokens. ``None`` where
            all are tokens.

    Raises:
        InputError: as :func:`check_model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype = torch.float32,
        chunk_size: int = 2048,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.compute_dtype = compute_dtype
        self.chunk_size = chunk_size
        self.num_tokens: int | None = None
        self.split_from = SPLIT_FROM
        self.computes_on: torch.device | None = None  # where that is not where the weights are
        text_config = model.config.get_text_config()
        # The three ways in which published families change their logits: Cohere, Granite, Gemma.
        self.logit_scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(
            getattr(text_config, "logits_scaling", None) or 1.0
        )
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        if model.device.type != "meta":
            check_model(self)

    def forward(self, tokens: TokenBatch, alignment: bool = False) -> SequenceLogps:
        """Log-probs of each completion given its prompt; with ``alignment``, how likely it is against all others."""
        return sequence_logps(self.decode(tokens), tokens, self.head, chunk_size=self.chunk_size, alignment=alignment)

    @torch.no_grad()
    def completion_states(self, tokens: TokenBatch) -> Tensor:
        """Last hidden states that predict the N completion tokens, ``(N, H)``, in the numerics of ``forward``."""
        return completion_hidden_states(self.decode(tokens), tokens)

    @torch.no_grad()
    def token_logits(self, states: Tensor) -> Tensor:
        """Full fp32 logits of n of these states, ``(n, V)``, in the numerics of ``forward``. Mind n * V."""
        return self.head.logits(states)

    @property
    def logits_at_a_time(self) -> int:
        """For how many tokens full logits may exist at a time, within ``LOGITS_BUDGET``."""
        return max(1, LOGITS_BUDGET // self.vocabulary_size)

    def tried(self, trial: Callable[[Self], T]) -> T:
        """The outcome of a trial, in here, so that what wraps this module sees it begin and end."""
        return trial(self)

    def generate(self, *, apart: bool = False, **arguments: Any) -> Any:
        """Runs transformers' own ``generate``, in here, so that what wraps this module sees it begin and end.

        Args:
            apart: whether each rank that shares the weights has prompts of its own, as many as the others; else all
                ranks have the same prompts.
            **arguments: transformers' own.
        """
        generate: Any = self.model.generate
        if not self.is_sharded:
            return generate(**arguments)
        generated = generate(**arguments, synced_gpus=True)  # all ranks make as many forwards, whoever is done first
        if apart:
            return generated
        told: list[Tensor] = [generated.cpu()]  # should rounding part the ranks, they go on alike
        dist.broadcast_object_list(told)
        return told[0].to(self.device)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds a part of each tensor alone; then all ranks must make the same calls."""
        return isinstance(self, FSDPModule)

    @property
    def device(self) -> torch.device:
        """That it computes on."""
        return self.computes_on or self.model.device

    @cached_property
    def how_to_sample(self) -> HowToSample:
        """The way to sample that gives the probabilities that are scored, tried when it is first needed.

        Raises:
            InputError: there is none.
        """
        way = self.tried(how_to_sample)
        if not way.is_padded and not (dist.is_initialized() and dist.get_rank()):
            warnings.warn(
                f"{type(self.model).__name__} is sampled in batches of equally long prompts, as padding changes its "
                f"probabilities{'' if way.is_cached else ', and without a cache'}.",
                stacklevel=2,
            )
        return way

    @property
    def vocabulary_size(self) -> int:
        """Columns of the head, V, padding too."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def decode(self, tokens: TokenBatch) -> Tensor:
        """Last hidden states, ``(R, T, H)``."""
        length = tokens.input_ids.shape[1]
        layout: dict[str, Any] = {}
        # Plain rows are padded on the right, where no token before sees it: the model's own causal attention is enough,
        # and has faster kernels than attention under a mask.
        if tokens.segment_ids is not None:
            config = self.model.config.get_text_config()
            if kernel_of(config) == FLEX:
                tokens = _pad(tokens, -length % FLEX_BLOCK)
            masks = attention_masks(tokens, config, self.split_from)
            layout = {"attention_mask": masks, "position_ids": tokens.position_ids}
        with autocast(tokens.input_ids.device, self.compute_dtype):
            output = self.model.base_model(
                input_ids=tokens.input_ids,
                **layout,
                use_cache=False,  # the default changes results where positions restart
            )
        return cast(Tensor, output.last_hidden_state)[:, :length]

    @property
    def head(self) -> Head:
        """From hidden states to logits."""
        embeddings = cast(nn.Linear, self.model.get_output_embeddings())
        return Head(embeddings.weight, embeddings.bias, self.logit_scale, self.softcap, self.compute_dtype)


@torch.no_grad()
def check_model(model: LogProbModel) -> None:
    """Checks that a model is a causal language model whose head is known, and computes each row by itself.

    A row must not depend on later tokens, on the rows beside it, or on whether the model is in training.

    Raises:
        InputError: it is not.
    """
    name, base = f"model.policy.path: {type(model.model).__name__}", model.model.base_model
    rows = torch.arange(4, device=model.device).repeat(2, 1)
    rows[1, 3] = 0
    # Layers of a sharded model are gathered in the dtype that they compute in.
    numerics = model.compute_dtype if model.is_sharded else model.model.dtype
    with autocast(model.device, numerics):
        own = model.model(input_ids=rows[:1], use_cache=False).logits.float()
        single = getattr(base(input_ids=rows[:1], use_cache=False), "last_hidden_state", None)
        if single is None:
            raise InputError(f"{name} has no decoder apart from its head, which is not supported.")
        both = base(input_ids=rows, use_cache=False).last_hidden_state
        with in_mode(model.model, training=True):
            in_training = base(input_ids=rows[:1], use_cache=False).last_hidden_state
    tolerance = tolerance_of(numerics)
    for is_fine, fault in (
        (
            equal_within(single[0, :3], both[1, :3], tolerance),
            "is not causal: a token changes what is computed before it, so its log-probs are not those of a language "
            "model.",
        ),
        (
            equal_within(single[0], both[0], tolerance),
            "computes a row from the other rows of its batch, which is not supported.",
        ),
        (
            equal_within(single, in_training, tolerance),
            "computes something else in training, by noise that its configuration does not name; policy and reference "
            "would differ by it.",
        ),
    ):
        if not is_fine:
            raise InputError(f"{name} {fault}")
    head = model.head
    if single.shape[-1] != head.weight.shape[-1] or not equal_within(own, head(single), tolerance):
        raise InputError(
            f"{name} changes its logits after the head in a way that is not supported (known: logit_scale, "
            "logits_scaling, final_logit_softcapping)."
        )


def _pad(tokens: TokenBatch, number: int) -> TokenBatch:
    """Longer rows for the decoder; the completions' places in them are those of the rows as they were."""
    assert tokens.segment_ids is not None
    return tokens._replace(
        input_ids=pad(tokens.input_ids, (0, number)),
        position_ids=pad(tokens.position_ids, (0, number)),
        segment_ids=pad(tokens.segment_ids, (0, number), value=-1),
    )


def load_logprob_model(config: PolicyConfig, *, option: str = "model.policy.path") -> LogProbModel:
    """Loads the model that ``config`` names, on the CPU, with its adapter; messages name ``option``."""
    return _wrapped(load_causal_lm(config, option=option), config)


def outline_logprob_model(config: PolicyConfig, *, option: str = "model.policy.path") -> LogProbModel:
    """As ``load_logprob_model``, without weights: every tensor is on the meta device, and nothing is tried out."""
    with torch.device("meta"):
        return _wrapped(load_causal_lm(replace(config, init="random", peft=None), option=option), config)


def _wrapped(model: PreTrainedModel, config: PolicyConfig) -> LogProbModel:
    adapter = None if config.peft is None else Adapter(model, parse_adapter(config.peft), revision=config.revision)
    compute_dtype = DTYPES[config.compute_dtype]
    return LogProbModel(model, compute_dtype=compute_dtype, chunk_size=config.chunk_size, adapter=adapter)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of a model, of which a rank may hold a shard; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
