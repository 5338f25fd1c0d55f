"""A causal language model as a function from a batch to log-probs."""

from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lit_isdpo.objective.logprobs import Head, completion_hidden_states, sequence_logps
from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.attention import FLEX_BLOCK, KERNELS, attention_masks, layer_windows
from lit_isdpo.policy.generation import autocast
from lit_isdpo.policy.loading import DTYPES, PolicyConfig, load_causal_lm
from lit_isdpo.types import InputError, SequenceLogps, TokenBatch


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
        InputError: the model changes its logits in a way that this head does not know.
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
        self.computes_on: torch.device | None = None  # where that is not where the weights are
        text_config = model.config.get_text_config()
        # The three ways in which published families change their logits: Cohere, Granite, Gemma.
        self.logit_scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(
            getattr(text_config, "logits_scaling", None) or 1.0
        )
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        if model.device.type != "meta":
            self.check_head()

    def forward(self, tokens: TokenBatch, alignment: bool = False) -> SequenceLogps:
        """Log-probs of each completion given its prompt; with ``alignment``, how likely it is against all others."""
        return sequence_logps(self.decode(tokens), tokens, self.head, chunk_size=self.chunk_size, alignment=alignment)

    @torch.no_grad()
    def completion_logits(self, tokens: TokenBatch) -> Tensor:
        """Full fp32 logits of the N completion tokens, ``(N, V)``, in the numerics of ``forward``. Mind N * V."""
        return self.head.logits(completion_hidden_states(self.decode(tokens), tokens))

    def generate(self, **arguments: Any) -> Tensor:
        """As transformers' own, in here, so that what wraps this module sees it begin and end."""
        generated = self._generate(**arguments)
        if not self.is_sharded:
            return generated
        # All ranks are asked the same; should rounding part them, they go on alike.
        told: list[Tensor] = [generated.cpu()]
        dist.broadcast_object_list(told)
        return told[0].to(self.device)

    def generate_apart(self, **arguments: Any) -> Tensor:
        """Like ``generate``, where each rank that shares the weights has prompts of its own, as many as the others."""
        return self._generate(**arguments)

    def _generate(self, **arguments: Any) -> Tensor:
        generate: Any = self.model.generate
        # Ranks that share the weights make as many forwards, whoever is done first.
        return cast(Tensor, generate(**arguments, **({"synced_gpus": True} if self.is_sharded else {})))

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds a part of each tensor alone; then all ranks must make the same calls."""
        return isinstance(self, FSDPModule)

    @property
    def device(self) -> torch.device:
        """That it computes on."""
        return self.computes_on or self.model.device

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
            if config._attn_implementation == "flex_attention":
                tokens = _pad(tokens, -length % FLEX_BLOCK)
            layout = {"attention_mask": attention_masks(tokens, config), "position_ids": tokens.position_ids}
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
    def why_not_shared(self) -> str | None:
        """Why rows cannot hold a prompt with both of its responses, or ``None`` where they can.

        What the configuration does not tell is tried, where there are weights: a few tokens in one row and in two must
        give the same.
        """
        config = self.model.config.get_text_config()
        kernel = config._attn_implementation
        if kernel not in KERNELS:
            return f"attn_implementation {kernel!r} does not take such masks ({' and '.join(KERNELS)} do)"
        try:
            layer_windows(config)
        except ValueError as error:
            return str(error)
        if self.model.device.type == "meta":
            return None
        device, vocabulary = self.device, self.vocabulary_size
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
        config._attn_implementation = "sdpa"  # the architecture is on trial here; FlexAttention would be compiled first
        try:
            together = self.decode(shared)[0, [0, 1, 2, 5, 6, 7]].float()
        except Exception as error:  # whatever an architecture says to a mask that it does not know
            return f"it takes no such masks ({next(iter(str(error).splitlines()), type(error).__name__)})"
        else:
            with autocast(device, self.compute_dtype):
                apart = self.model.base_model(input_ids=plain, use_cache=False).last_hidden_state[0].float()
        finally:
            config._attn_implementation = kernel
        tolerance = 1e-3 if self.model.dtype == self.compute_dtype == torch.float32 else 0.05
        if not torch.allclose(together, apart, atol=tolerance * float(apart.abs().max()), rtol=0):
            return "the tokens of a row do not depend on their mask alone"
        return None

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares a few tokens with the model's own logits, so that an unknown family fails here and not silently.

        A change of the last token must not change what comes before it: rows are padded on the right without a mask.
        """
        input_ids = torch.arange(4, device=self.device)[None]
        other_ids = input_ids * (input_ids < 3)
        numerics = self.compute_dtype if self.is_sharded else self.model.dtype  # of the layers' weights at hand
        with autocast(self.device, numerics):
            own = self.model(input_ids=input_ids, use_cache=False).logits.float()
            decoded, other = (
                getattr(self.model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
                for ids in (input_ids, other_ids)
            )
        if decoded is None:
            raise InputError(
                f"model.policy.path: {type(self.model).__name__} has no decoder apart from its head, which is not "
                "supported."
            )
        assert other is not None
        ours = self.head(decoded)
        # Half-precision weights round the model's own logits; an unknown scale or cap is off by far more.
        tolerance = 1e-3 if numerics == torch.float32 else 0.05
        before, changed = decoded[:, :3].float(), other[:, :3].float()
        if not torch.allclose(before, changed, atol=tolerance * float(before.abs().max()) + 1e-6, rtol=0):
            raise InputError(
                f"model.policy.path: {type(self.model).__name__} is not causal: a token changes what is computed "
                "before it, so its log-probs are not those of a language model."
            )
        if not torch.allclose(own, ours, atol=tolerance * float(own.abs().max()) + 1e-6, rtol=0):
            raise InputError(
                f"model.policy.path: {type(self.model).__name__} changes its logits after the head in a way that is "
                "not supported (known: logit_scale, logits_scaling, final_logit_softcapping)."
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
