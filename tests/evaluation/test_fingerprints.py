"""One name for one policy, whatever it was loaded from."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_isdpo.evaluation.store import weights_fingerprint
from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.logprob_model import LogProbModel


def test_every_weight_counts_and_a_saved_folder_is_the_same_policy(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    name = weights_fingerprint(LogProbModel(tiny_llama))
    tiny_llama.save_pretrained(tmp_path)
    assert weights_fingerprint(LogProbModel(AutoModelForCausalLM.from_pretrained(tmp_path))) == name
    assert weights_fingerprint(LogProbModel(tiny_llama, compute_dtype=torch.bfloat16)) != name
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert weights_fingerprint(LogProbModel(tiny_llama)) != name


@pytest.mark.parametrize("adapter", [{"peft_type": "LORA", "r": 2}, {"peft_type": "IA3", "feedforward_modules": []}])
def test_a_base_under_an_adapter_is_the_base(tiny_llama: PreTrainedModel, adapter: dict[str, object]) -> None:
    name = weights_fingerprint(LogProbModel(deepcopy(tiny_llama)))
    config = parse_adapter({**adapter, "target_modules": ["q_proj", "v_proj"]})
    model = LogProbModel(tiny_llama, adapter=Adapter(tiny_llama, config))
    assert weights_fingerprint(model, with_adapter=False) == name
    before = weights_fingerprint(model)
    assert before != name
    with torch.no_grad():
        next(p for p in tiny_llama.parameters() if p.requires_grad).add_(1e-3)
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(model, with_adapter=False) == name
