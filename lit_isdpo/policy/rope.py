"""Rotary positions whose frequencies depend on the length of the input: one set of them for a whole run.

LongRoPE (arXiv 2402.13753) has two sets of frequencies. transformers takes the short ones for a batch whose longest row
has up to ``original_max_position_embeddings`` tokens, and else the long ones for all rows. So the log-probs of a row
would depend on the rows beside it, and those of a token on the text that follows. Here the longest sequence of the run
decides, as the longest sequence of an engine does in vLLM.
"""

from typing import Any

from transformers import PretrainedConfig


def switch_length(config: PretrainedConfig) -> int | None:
    """The longest input, in tokens, that gets the short frequencies; ``None`` if a model has only one set."""
    return min((scaling["original_max_position_embeddings"] for scaling in _long_ropes(config)), default=None)


def pin_rope(config: PretrainedConfig, max_length: int) -> None:
    """Gives inputs of any length the frequencies for ``max_length`` tokens, in place.

    >>> from transformers import Phi3Config
    >>> rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
    >>> config = Phi3Config(rope_parameters=rope, original_max_position_embeddings=4096)
    >>> pin_rope(config, 8192)
    >>> config.rope_parameters["short_factor"][0]
    4.0
    """
    for scaling in _long_ropes(config):
        is_long = max_length > scaling["original_max_position_embeddings"]
        for what in ("factor", "mscale"):  # the second is Phi-MoE's
            if f"long_{what}" in scaling:
                chosen = scaling[f"{'long' if is_long else 'short'}_{what}"]
                scaling[f"long_{what}"] = scaling[f"short_{what}"] = chosen


def unpin_rope(config: PretrainedConfig, original: PretrainedConfig) -> None:
    """Undoes :func:`pin_rope`, in place. ``original`` is the configuration as it was read."""
    for pinned, scaling in zip(_long_ropes(config), _long_ropes(original), strict=True):
        pinned.update(scaling)


def _long_ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The options of each LongRoPE of a decoder; its kinds of layers may have one each."""
    options = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in (options, *options.values()) if isinstance(part, dict) and _is_long(part)]


def _is_long(options: dict[str, Any]) -> bool:
    return options.get("rope_type") == "longrope" and "original_max_position_embeddings" in options
