"""Models whose vocabularies differ, and tokenizers that are too large: found before data is read, or made right."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.evaluation.rewards import RewardModel
from lit_isdpo.lab.designs import build_closed_tokenizer
from lit_isdpo.policy.generation import Sampling, sample
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reference import ReferenceConfig
from lit_isdpo.policy.reward_model import load_score_model
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.reward import RewardModule
from lit_isdpo.training.sft import SFTModule
from lit_isdpo.types import InputError
from tests.runs import read_metrics


def padded(model_dir: str, folder: Path, rows: int, seed: int | None = None) -> str:
    """The model with more rows, which say what no token says; with a seed, its other weights are changed too."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(0 if seed is None else seed)
    if seed is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        tokens = len(AutoTokenizer.from_pretrained(model_dir))
        model.get_input_embeddings().weight[tokens:] = 0.5 * torch.randn(rows - tokens, 16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def too_small(model_dir: str, tmp_path: Path) -> str:
    """A folder whose tokenizer got a token that its model has no row for."""
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_before_data_is_read(too_small: str) -> None:
    tokens = len(AutoTokenizer.from_pretrained(too_small))
    says = (
        f"the tokenizer has ids up to {tokens - 1}, and the embedding of '{too_small}' only {tokens - 1} rows; resize"
    )
    for build, option in (
        (lambda: PreferenceModule(PolicyConfig(path=too_small)), "model.policy.path"),
        (lambda: SFTModule(PolicyConfig(path=too_small)), "model.policy.path"),
        (lambda: RewardModule(PolicyConfig(path=too_small)), "model.policy.path"),
    ):
        with pytest.raises(InputError, match=f"^{option}: {says}"):
            build()


def test_a_reward_model_is_held_to_it_too(model_dir: str, too_small: str, tmp_path: Path) -> None:
    load_score_model(PolicyConfig(path=model_dir)).save_pretrained(tmp_path / "scorer")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "scorer")
    RewardModel(str(tmp_path / "scorer"))
    AutoTokenizer.from_pretrained(too_small).save_pretrained(tmp_path / "scorer")
    with pytest.raises(InputError, match=r"^reward.path: the tokenizer has ids up to \d+, .*resize_token_embeddings\("):
        RewardModel(str(tmp_path / "scorer"))


@pytest.mark.parametrize("cache", [False, True])
def test_another_tokenizer_is_found_before_weights_are_loaded(model_dir: str, tmp_path: Path, cache: bool) -> None:
    """Of the same size: the words in another order. The folder has no weights to load."""
    policy = PolicyConfig(path=model_dir)
    own = AutoTokenizer.from_pretrained(model_dir)
    AutoModelForCausalLM.from_pretrained(model_dir).config.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    PreferenceModule(policy, reference=ReferenceConfig(path=str(tmp_path), cache=cache))
    words = [word for word, _ in sorted(own.get_vocab().items(), key=lambda entry: entry[1])]
    build_closed_tokenizer([*words[1:-1], words[0]]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model.reference.path: .* token\(s\) differ in all"):
        PreferenceModule(policy, reference=ReferenceConfig(path=str(tmp_path), cache=cache))


@pytest.fixture
def options(tiny: list[str]) -> list[str]:
    return [*tiny, "--trainer.max_steps=2", "--model.prefix_sharing=false"]


@pytest.mark.parametrize("cache", ["false", "true"])
def test_a_fit_against_a_reference_that_is_padded_is_one_against_it_without(
    cache: str, options: list[str], model_dir: str, tmp_path: Path
) -> None:
    """By its KL, which is over the tokens; the loss has log-probs over all entries."""
    tokens = len(AutoTokenizer.from_pretrained(model_dir))
    plain, large = padded(model_dir, tmp_path / "plain", tokens, 3), padded(model_dir, tmp_path / "large", 1024, 3)
    values = {}
    for name, reference in (("plain", plain), ("large", large)):
        root = tmp_path / f"runs_{name}"
        arguments = [*options, f"--model.reference.path={reference}", f"--model.reference.cache={cache}"]
        main(["fit", *arguments, f"--trainer.default_root_dir={root}"])
        values[name] = read_metrics(root / "version_0")
    for step in (0, 2):
        kl = [values[name]["val/kl/rao_blackwell"][step] for name in values]
        assert kl[0] == pytest.approx(kl[1], abs=1e-3)
        assert kl[0] > 0.01
    assert values["plain"]["val/loss"][2] != values["large"]["val/loss"][2]


def test_a_padded_policy_and_its_reference_sample_tokens_alone(
    options: list[str], model_dir: str, pairs_file: str, tmp_path: Path
) -> None:
    tokens = len(AutoTokenizer.from_pretrained(model_dir))
    large = padded(model_dir, tmp_path / "large", 1024)
    module = PreferenceModule(PolicyConfig(path=large), reference=ReferenceConfig(path=model_dir))
    module.trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.configure_model()
    drawn = {}
    for model in (module.policy, module.reference.model):
        sampling = Sampling(num_responses=200, max_new_tokens=4, batch_size=200)
        (responses,) = sample(model, [[1, 5]], sampling, module.vocabulary)
        drawn[model.vocabulary_size] = {token for response in responses for token in response.token_ids}
    assert set(drawn) == {tokens, 1024}
    assert max(max(ids) for ids in drawn.values()) < tokens

    arguments = [*options[1:], f"--model.policy.path={large}", f"--model.reference.path={model_dir}"]
    main(["test", *arguments, f"--data.test={pairs_file}", f"--trainer.default_root_dir={tmp_path}"])
    metrics = json.loads((tmp_path / "version_0" / "evaluation.json").read_text())["metrics"]
    # Of the same tokens both say the same.
    assert metrics["test/kl/rao_blackwell"] == pytest.approx(0, abs=1e-5)
    assert metrics["test/kl/k1"] == pytest.approx(0, abs=1e-4)
