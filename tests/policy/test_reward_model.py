"""Reward models: a score is read at a response's last token, whatever stands beside it in a batch."""

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.policy.reward_model import PolicyConfig, ScoreModel, load_score_model, load_sequence_classifier
from lit_isdpo.types import InputError

PROMPTS, COMPLETIONS = [[1, 5], [1, 5, 9, 4], [1]], [[6, 2], [7, 8, 3, 2], [11]]  # the last one was cut
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(model: PreTrainedModel, folder: Path) -> PolicyConfig:
    model.save_pretrained(folder)
    return PolicyConfig(path=str(folder))


def language_models() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    qwen2 = Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=1, max_window_layers=2)
    return [GPT2LMHeadModel(gpt2), Qwen2ForCausalLM(qwen2)]


@pytest.mark.parametrize("language_model", language_models(), ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("pad", [0, 2], ids=["pad", "pad_is_eos"])
def test_a_score_alone_is_the_score_in_a_batch(language_model: PreTrainedModel, pad: int, tmp_path: Path) -> None:
    """Also where padding is EOS: the score is then read before it, alone as well."""
    model = load_score_model(save(language_model, tmp_path))
    model.config.pad_token_id = pad
    scorer = ScoreModel(model)
    with torch.no_grad():
        # The collator's own filling does not matter.
        together = scorer(collate_completions(PROMPTS, COMPLETIONS, pad_token_id=7))
        alone = [
            scorer(collate_completions([p], [c], pad_token_id=7)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(alone))
        read = [
            model(input_ids=torch.tensor([p + [t for t in c if t != pad]])).logits[0]
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(read))
    assert together.unique().numel() == 3


def test_a_new_head_is_small_and_random_and_the_decoder_is_the_language_models(tmp_path: Path) -> None:
    config = LlamaConfig(**{**SIZES, "hidden_size": 1024}, intermediate_size=32, tie_word_embeddings=True)
    language_model = LlamaForCausalLM(config)
    model = load_score_model(save(language_model, tmp_path))
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    assert model.config.num_labels == 1


def test_what_was_saved_scores_the_same_in_transformers(tmp_path: Path) -> None:
    model = load_score_model(save(language_models()[1], tmp_path / "language"))
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "scores")
    tokens = collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0)
    again = load_score_model(PolicyConfig(path=str(tmp_path / "scores")))
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scores")
    with torch.no_grad():
        scores = ScoreModel(model)(tokens)
        assert torch.equal(ScoreModel(again)(tokens), scores)
        assert torch.equal(own(tokens.input_ids, attention_mask=tokens.attention_mask).logits[:, 0], scores)


def test_the_head_is_fp32_in_bfloat16_compute(tmp_path: Path) -> None:
    """A bfloat16 near 300 is a multiple of 2."""
    model = load_score_model(save(language_models()[1], tmp_path))
    model.config.pad_token_id = 0
    with torch.no_grad():
        model.score.weight *= 3000
        scores = ScoreModel(model, compute_dtype=torch.bfloat16)(
            collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0)
        )
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_models_that_do_not_score_are_refused_in_a_sentence(tmp_path: Path) -> None:
    def scorer(name: str, **options: object) -> PolicyConfig:
        return save(
            LlamaForSequenceClassification(LlamaConfig(**SIZES, intermediate_size=32, **options)), tmp_path / name
        )

    language = save(language_models()[0], tmp_path / "language")
    headless = scorer("headless", num_labels=1)
    model = LlamaForSequenceClassification.from_pretrained(headless.path)
    model.save_pretrained(
        headless.path, state_dict={k: v for k, v in model.state_dict().items() if k != "score.weight"}
    )
    for source, message in (
        (language, r"reward\.path: .* is a causal language model without a head for scores"),
        (scorer("two", num_labels=2), r"gives 2 numbers; a reward model gives one"),
        (headless, r"has no weights for score\.weight"),
        (PolicyConfig(path=str(tmp_path / "nowhere")), r"reward\.path: no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_sequence_classifier(source, option="reward.path")
    with pytest.raises(InputError, match="gives 2 numbers"):
        load_score_model(scorer("two_again", num_labels=2))


def test_an_encoder_scores_too(tmp_path: Path) -> None:
    """It is told by the mask, and knows no cache."""
    torch.manual_seed(0)
    source = save(BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=32, num_labels=1)), tmp_path)
    scorer = ScoreModel(load_sequence_classifier(source, option="reward.path"))
    with torch.no_grad():
        together = scorer(collate_completions(PROMPTS, COMPLETIONS, pad_token_id=0))
        alone = scorer(collate_completions(PROMPTS[:1], COMPLETIONS[:1], pad_token_id=0))
    torch.testing.assert_close(together[:1], alone)


WITH_DROPOUT = [
    OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5, num_labels=1),
    BertConfig(**SIZES, intermediate_size=32, hidden_dropout_prob=0.5, num_labels=1),
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, num_labels=1, pad_token_id=0),
]


@pytest.mark.parametrize("config", WITH_DROPOUT, ids=lambda config: config.model_type)
def test_nothing_is_dropped_in_training(config: PretrainedConfig, tmp_path: Path) -> None:
    """Whatever the rate is called, and where a module has kept it as a number that it was built with."""
    source = save(AutoModelForSequenceClassification.from_config(config), tmp_path)
    scorer = ScoreModel(load_score_model(source)).train()
    scores = scorer(collate_completions([[3, 4]] * 8, [[5, 6, 7]] * 8, pad_token_id=0))
    torch.testing.assert_close(scores, scores[:1].expand(8), atol=0, rtol=0)
