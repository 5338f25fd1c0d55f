"""vLLM as an engine, against a module of that name that keeps what it is given."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_isdpo.policy.adapters import Adapter, parse_adapter
from lit_isdpo.policy.generation import Sampling, Vocabulary
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.vllm_sampler import VLLMSampler, check_vllm
from lit_isdpo.types import InputError, Response

OUTPUTS = [
    ([7, 8, 2], "stop", None),  # EOS is there
    ([7, 8], "stop", None),  # EOS is left out
    ([7], "stop", 3),  # another end, left out
    ([7, 8, 9, 10], "length", None),
]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the fake was given."""
    given: dict[str, Any] = {"starts": 0}

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            given["starts"] += 1
            given["options"] = options
            given["weights"] = AutoModelForCausalLM.from_pretrained(model).state_dict()
            given["folder"] = Path(model)

        def generate(self, inputs: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
            given["inputs"], given["parameters"] = inputs, parameters
            drawn = [SimpleNamespace(token_ids=ids, finish_reason=why, stop_reason=stop) for ids, why, stop in OUTPUTS]
            return [SimpleNamespace(outputs=drawn[: one.n]) for one in parameters]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return given


SAMPLING = Sampling(num_responses=4, max_new_tokens=4, seed=5, temperature=0.7, top_p=0.9)
VOCABULARY = Vocabulary(str, [2, 3], 0)


def test_token_ids_in_and_responses_out(engine: dict[str, Any], tiny_llama: PreTrainedModel) -> None:
    sampler = VLLMSampler(LogProbModel(tiny_llama), options={"tensor_parallel_size": 2})
    assert engine["starts"] == 0, "nothing to sample, nothing to start"
    first, second = sampler([[1, 5], [1]], SAMPLING, VOCABULARY)
    assert first == [
        Response([7, 8, 2], True),
        Response([7, 8, 2], True),
        Response([7, 3], True),
        Response([7, 8, 9, 10], False),
    ]
    assert len(second) == 4
    sampler([[1]], replace(SAMPLING, num_responses=1), VOCABULARY)
    assert engine["starts"] == 1
    assert engine["inputs"] == [{"prompt_token_ids": [1]}]
    parameters = vars(engine["parameters"][0])
    assert parameters["stop_token_ids"] == [2, 3]
    assert (parameters["temperature"], parameters["top_p"], parameters["max_tokens"]) == (0.7, 0.9, 4)
    assert engine["options"]["tensor_parallel_size"] == 2
    assert engine["options"]["dtype"] == "float32"
    assert not engine["folder"].exists(), "the temporary folder is gone"


def test_it_samples_the_policy_with_its_adapter_or_the_base_without(
    engine: dict[str, Any], tiny_llama: PreTrainedModel
) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    model = LogProbModel(
        tiny_llama,
        adapter=Adapter(tiny_llama, parse_adapter({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})),
    )
    trained = {name: p for name, p in tiny_llama.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.fill_(0.1)
    for with_adapter in (False, True):
        VLLMSampler(model, with_adapter=with_adapter, options={})([[1]], replace(SAMPLING, num_responses=1), VOCABULARY)
        written = engine["weights"]
        assert set(written) == set(base)
        changed = [name for name, tensor in written.items() if not torch.equal(tensor, base[name])]
        assert all("q_proj" in name for name in changed)
        assert len(changed) == (2 if with_adapter else 0)
    assert all((parameter == 0.1).all() for parameter in trained.values()), "the policy itself is as it was"


def test_without_vllm_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'evaluation\.engine: vLLM is not installed; pip install "lit_isdpo\[vllm\]"'):
        check_vllm("evaluation.engine")


def test_what_only_pads_the_vocabulary_is_not_sampled(engine: dict[str, Any], tiny_llama: PreTrainedModel) -> None:
    policy = LogProbModel(tiny_llama)
    for num_tokens, bias in ((None, None), (50, None), (48, {48: -100.0, 49: -100.0})):
        policy.num_tokens = num_tokens
        VLLMSampler(policy, options={})([[1]], replace(SAMPLING, num_responses=1), VOCABULARY)
        assert engine["parameters"][0].logit_bias == bias
