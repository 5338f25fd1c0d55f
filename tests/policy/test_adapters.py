"""Adapters of many kinds: what is trained, what switches off, what is saved; and what is refused."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.policy.adapters import Adapter, fingerprint, parse_adapter
from lit_isdpo.policy.loading import PolicyConfig, enable_gradient_checkpointing
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import AdapterOffReference, Reference, ResidentReference
from lit_isdpo.types import InputError, PreferenceBatch
from tests.policy.test_logprob_model import COMPLETIONS, PROMPTS, direct_logps

ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"]}
LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": {**LORA, "use_dora": True},
    "LoRA and a norm": {**LORA, "modules_to_save": ["norm"]},
    "IA3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHa": {"peft_type": "LOHA", "r": 4, **ATTENTION},
    "LoKr": {"peft_type": "LOKR", "r": 4, **ATTENTION},
    "OFT": {"peft_type": "OFT", "oft_block_size": 4, "r": 0, **ATTENTION},
    "VeRA": {"peft_type": "VERA", "r": 4, **ATTENTION},  # its layers share tensors that are not trained
    "RandLoRA": {"peft_type": "RANDLORA", "r": 4, **ATTENTION},
    "DeLoRA": {"peft_type": "DELORA", "r": 4, **ATTENTION},
    "FourierFT": {"peft_type": "FOURIERFT", "n_frequency": 8, "init_weights": True, **ATTENTION},
}
TOKENS = collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0)


def logps_of(reference: Reference) -> torch.Tensor:
    """What a reference says of the completions."""
    nothing = torch.empty(0)
    return reference.logps(PreferenceBatch(TOKENS, {}, nothing, 0), "train")


def adapted(model: PreTrainedModel, options: dict[str, Any], **more: Any) -> LogProbModel:
    return LogProbModel(model, adapter=Adapter(model, parse_adapter(options)), **more)


@torch.no_grad()
def train(policy: LogProbModel) -> None:
    """Stands for a training: adds noise to what is trained."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind(kind: str, tiny_llama: PreTrainedModel) -> None:
    """It starts at its base, is what the model's own forward says, switches off, comes back, and merges."""
    plain, names = copy.deepcopy(tiny_llama), tiny_llama.state_dict().keys()
    base = LogProbModel(plain)(TOKENS).logps
    policy = adapted(tiny_llama, KINDS[kind])
    assert policy.adapter is not None
    torch.testing.assert_close(policy(TOKENS).logps, base, atol=1e-6, rtol=1e-6)
    assert {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}

    train(policy)
    trained = policy(TOKENS).logps
    assert (trained - base).abs().max() > 1e-4
    torch.testing.assert_close(trained, torch.tensor(direct_logps(policy.model)[0]), atol=2e-5, rtol=1e-5)
    with policy.adapter.switched_off():
        assert torch.equal(policy(TOKENS).logps, base)
    assert torch.equal(policy(TOKENS).logps, trained)

    torch.manual_seed(1)  # other random numbers than before: all there is must be in the state
    again = adapted(plain, KINDS[kind])
    assert again.adapter is not None
    again.adapter.load_state(copy.deepcopy(policy.adapter.state()))
    assert torch.equal(again(TOKENS).logps, trained)

    merged = LogProbModel(again.adapter.merge())
    assert merged.model.state_dict().keys() == names
    torch.testing.assert_close(merged(TOKENS).logps, trained, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"r": 4}, "must be one that PEFT knows, LORA say, not None"),
    "unknown type": ({"peft_type": "LORAA"}, "not 'LORAA'"),
    "unknown option": ({"peft_type": "LORA", "rr": 4}, "LORA has no option 'rr'"),
    "task": ({**LORA, "task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM"),
    "prefix": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "learns a prompt"),
    "prompt": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "learns a prompt"),
    "p-tuning": ({"peft_type": "P_TUNING", "num_virtual_tokens": 2}, "learns a prompt"),
    "AdaLoRA": ({"peft_type": "ADALORA", "total_step": 10}, "ADALORA is not supported: its ranks"),
    "dropout": ({**LORA, "lora_dropout": 0.1}, "lora_dropout must be 0"),
    "module dropout": ({"peft_type": "LOHA", "module_dropout": 0.1}, "module_dropout must be 0"),
    "bias": ({**LORA, "bias": "all"}, "bias must be 'none'"),
    "another model": ({**LORA, "base_model_name_or_path": "gpt2"}, "named by model.policy.path"),
    "inference": ({**LORA, "inference_mode": True}, "nothing would be trained"),
    "aLoRA": ({**LORA, "alora_invocation_tokens": [5]}, "PEFT's own forward"),
    "LoftQ": ({**LORA, "loftq_config": {"loftq_bits": 4}}, "needs a preparation"),
    "QALoRA": ({**LORA, "use_qalora": True}, "for quantised models"),
    "EVA": ({**LORA, "init_lora_weights": "eva"}, "needs a preparation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_can_tell_is_refused_when_it_is_parsed(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        PolicyConfig(peft=options)
    assert str(error.value).startswith("model.policy.peft: ")


def test_random_weights_are_no_base() -> None:
    with pytest.raises(InputError, match="init cannot be random"):
        PolicyConfig(peft=LORA, init="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LORA", "target_modules": ["q_projj"]}, r"LORA: Target modules .*q_projj.* not found"),
        ({**LORA, "target_modules": ["q_proj", "lm_head"]}, "embeddings or the head"),
        ({**LORA, "target_modules": ["q_proj", "embed_tokens"]}, "embeddings or the head"),
        ({**LORA, "modules_to_save": ["lm_head"]}, "embeddings or the head"),
        ({**LORA, "trainable_token_indices": [3]}, "embeddings or the head"),
        ({**LORA, "init_lora_weights": False}, "changes the model before it is trained"),
        ({**LORA, "init_lora_weights": "pissa"}, "cannot be switched off"),
        ({**LORA, "init_lora_weights": "olora"}, "cannot be switched off"),
        ({"peft_type": "PVERA", "r": 4, **ATTENTION}, "draws noise"),
        ({"peft_type": "SHIRA", "r": 2, **ATTENTION}, "keeps a state that a checkpoint would lack"),
        ({"peft_type": "MISS", "r": 64, **ATTENTION}, "MISS: "),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_a_trial_shows_is_refused_when_it_is_loaded(
    options: dict[str, Any], message: str, tiny_llama: PreTrainedModel
) -> None:
    with pytest.raises(InputError, match=message) as error:
        adapted(tiny_llama, options)
    assert str(error.value).startswith("model.policy.peft: ")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_tied_to_the_embeddings_cannot_be_adapted_either() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    with pytest.raises(InputError, match="embeddings or the head"):
        adapted(LlamaForCausalLM(config).eval(), {**LORA, "modules_to_save": ["embed_tokens"]})


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_reference_is_the_policy_with_its_adapter_off(
    gradient_checkpointing: bool, tiny_llama: PreTrainedModel
) -> None:
    """Bit for bit the copy; and a reference's forward between the policy's forward and backward changes no gradient."""
    copied = ResidentReference(LogProbModel(copy.deepcopy(tiny_llama)))
    if gradient_checkpointing:
        enable_gradient_checkpointing(tiny_llama)
    policy = adapted(tiny_llama, LORA)
    train(policy)
    policy.train()
    reference = AdapterOffReference(policy)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    gradients = []
    for own in (copied, reference):
        policy.zero_grad()
        logps = policy(TOKENS).logps
        ref_logps = logps_of(own.to(torch.device("cpu")))
        assert not ref_logps.requires_grad
        (logps - ref_logps).square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        assert gradients[-1].keys() == trainable
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    assert torch.equal(logps_of(copied), logps_of(reference))
    with reference.scoring() as model, copied.scoring() as other:
        assert torch.equal(
            model.token_logits(model.completion_states(TOKENS)), other.token_logits(other.completion_states(TOKENS))
        )
        assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in policy.parameters()}
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable


def test_the_adapter_is_on_again_after_an_exception(tiny_llama: PreTrainedModel) -> None:
    policy = adapted(tiny_llama, LORA)
    train(policy)
    before = policy(TOKENS).logps
    with pytest.raises(KeyboardInterrupt), AdapterOffReference(policy).scoring():
        raise KeyboardInterrupt
    assert torch.equal(policy(TOKENS).logps, before)
    assert before.requires_grad


def test_a_bfloat16_base_has_fp32_adapters(tiny_llama: PreTrainedModel) -> None:
    plain = tiny_llama.to(torch.bfloat16)
    with pytest.raises(InputError, match="trains bfloat16 weights"):
        adapted(copy.deepcopy(plain), {**LORA, "modules_to_save": ["norm"]})
    policy = adapted(plain, LORA, compute_dtype=torch.bfloat16)
    reference = AdapterOffReference(policy)
    assert torch.equal(policy(TOKENS).logps, logps_of(reference))
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in policy.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    policy(TOKENS).logps.sum().backward()


def test_the_fingerprint_tells_bases_apart(tiny_llama: PreTrainedModel) -> None:
    own = fingerprint(tiny_llama)
    narrow = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    assert fingerprint(narrow) != own
    assert fingerprint(narrow) == fingerprint(narrow.float()), "widening changes no value"
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    assert fingerprint(tiny_llama) != own


def test_the_state_is_taken_back_whole_or_not_at_all(tiny_llama: PreTrainedModel) -> None:
    adapter = adapted(tiny_llama, LORA).adapter
    assert adapter is not None
    state = adapter.state()
    name, tensor = next(iter(state.items()))
    for wrong, message in (
        ({key: value for key, value in state.items() if key != name}, "is missing"),
        ({**state, "model.norm.weight": torch.ones(16)}, "is unknown here"),
        ({**state, name: tensor[:2]}, r"is \(2, 16\) and not \(4, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.load_state(wrong)


def test_what_cannot_be_merged_says_so(tiny_llama: PreTrainedModel) -> None:
    adapter = adapted(tiny_llama, {"peft_type": "LILY", **ATTENTION}).adapter
    assert adapter is not None
    with pytest.raises(InputError, match=r"cannot be merged, so export it with --as_adapter true: .*not supported"):
        adapter.merge()
