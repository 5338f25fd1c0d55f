"""How every family of causal language models in transformers does here: ``python -m tests.tools.families``.

A tiny model of each, with random weights, is made from the family's own configuration and tried as a policy is when it
is loaded and sampled. Each has a process of its own: some families need more memory than they are given.
"""

import os
import resource
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_isdpo.policy.attention import kernel_of, why_not_shared
from lit_isdpo.policy.loading import PolicyConfig, as_one_function, with_attention
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import InputError

SECONDS, GIB = 60, 10  # that a family may take
MOST_PARAMETERS = 30_000_000
HEADER = "| family | attention | a prompt shared by its responses | sampling |\n|---|---|---|---|\n"
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "word_embed_proj_dim", "d_embed"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("ffn_hidden_size", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "num_key_value_groups"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "conv_kernel", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "time_step_rank", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "chunk_size", "qk_head_dim", "index_topk"), 16),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "expand", "mamba_expand"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "n_shared_experts", "moe_layer_freq"), 1),
    **{"linear_num_value_heads": 4, "first_k_dense_replace": 1},
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1},
    **{"is_decoder": True, "causal": True},
}
"""What the options that decide a model's size are called, family by family."""


def survey(output: str = "runs/families", families: list[str] = []) -> None:  # noqa: B006 (auto_cli wants it so)
    """Tries the families, and writes ``families.md`` into a folder.

    Args:
        output: the folder.
        families: transformers' names of those to try. Default: all.
    """
    kinds = families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    works, refused, unknown = [], [], []
    for kind in kinds:
        line = _in_a_process(kind)
        print(line, flush=True)
        (works if line.count("|") == 5 else refused if line.startswith("- ") else unknown).append(line)
    text = f"# Families of causal language models, transformers {transformers.__version__}\n\n"
    text += f"Made by `python -m tests.tools.families`. {len(works)} families work, {len(refused)} are refused.\n\n"
    text += HEADER + "\n".join(works) + "\n\n## Refused\n\n" + "\n".join(refused) + "\n"
    text += "\n## No tiny model could be made of these\n\n" + ", ".join(unknown) + "\n"
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "families.md").write_text(text)


def tiny(kind: str) -> PreTrainedModel:
    """A model of a family, as small as its options allow, as it is loaded for training."""
    factory = CONFIG_MAPPING[kind]
    default = factory()
    sizes = {name: value for name, value in SIZES.items() if _has(default, name)}
    if "qk_rope_head_dim" in sizes:  # latent attention works its head's size out, and has as many heads of keys
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if kinds := list(dict.fromkeys(getattr(default, "layer_types", None) or [])):
        if kinds == ["linear_attention"]:  # published ones have both
            kinds.append("full_attention")
        number = max(2, len(kinds))
        sizes |= {"layer_types": (kinds * 2)[:number], "num_hidden_layers": number}
    config = as_one_function(_configure(factory, sizes), PolicyConfig())
    torch.manual_seed(0)
    load = partial(AutoModelForCausalLM.from_config, config, dtype=torch.float32)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    model: PreTrainedModel = with_attention(load, "sdpa", "model.policy.path").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def _has(config: PretrainedConfig, name: str) -> bool:
    """Whether there is one such value; some families raise errors of their own if each layer has another."""
    with suppress(Exception):
        return hasattr(config, name)
    return False


def _configure(factory: type[PretrainedConfig], sizes: dict[str, Any]) -> PretrainedConfig:
    """A configuration; options that the family works out of others, and refuses to be given, are left to it."""
    for left_out in ((), ("layer_types",), ("head_dim",), ("layer_types", "head_dim"), ("v_head_dim",)):
        with suppress(Exception):
            return factory(**{name: value for name, value in sizes.items() if name not in left_out})
    raise ValueError("no tiny configuration")


def _try(kind: str) -> str:
    try:
        model = tiny(kind)
    except Exception:
        return kind
    try:
        policy = LogProbModel(model)
        why_not = policy.tried(why_not_shared)
        way = policy.how_to_sample
    except InputError as error:
        return f"- {kind}: {str(error).removeprefix('model.policy.path: ')}"
    except Exception:  # of the sizes that were chosen here
        return kind
    sampling = "as it is" if way.is_padded else f"equally long prompts{'' if way.is_cached else ', no cache'}"
    return f"| {kind} | {kernel_of(model.config)} | {'yes' if why_not is None else f'no: {why_not}'} | {sampling} |"


def _in_a_process(kind: str) -> str:
    """The line of a family; its name only, if it took too long or too much memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
        signal.alarm(SECONDS)  # ends it
        os.write(writer, _try(kind).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        line = lines.read()
    os.waitpid(child, 0)
    return line or kind


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity(50)
    torch.set_num_threads(1)
    auto_cli(survey, as_positional=False)
