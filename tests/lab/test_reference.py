"""The shipped reference against the one that its command makes from random weights."""

from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.evaluation.evaluator import Evaluator
from lit_isdpo.lab.environments import Posts
from lit_isdpo.lab.posts import MAX_NEW_TOKENS, render_prompt, sample_post
from lit_isdpo.policy.generation import Sampling, Vocabulary
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference
from lit_isdpo.types import ProbePrompt

REFERENCE = Posts.reference
CONFIGS = Path(__file__).parent.parent.parent / "configs"


def probe(policy: LogProbModel, reference: ResidentReference | None) -> dict[str, float]:
    """Values of samples of ``policy`` on 1,024 test posts."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    rng = Random("reference")
    posts = [render_prompt(sample_post(rng, "test")) for _ in range(1024)]
    prompts = [ProbePrompt(tokenizer.encode(post), post, "", row, post) for row, post in enumerate(posts)]
    vocabulary = Vocabulary(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True), [tokenizer.eos_token_id], tokenizer.pad_token_id
    )
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, batch_size=512)
    return Evaluator(prompts, vocabulary, sampling, kl_prompts=1024, reward=Posts())(policy, reference).values


@pytest.fixture(scope="module")
def shipped() -> LogProbModel:
    return LogProbModel(load_causal_lm(PolicyConfig(path=str(REFERENCE))))


def test_the_shipped_reference_tells_facts(shipped: LogProbModel) -> None:
    """By its design, demonstrations earn 0.65 on average; a model that has not learnt to copy earns about -2."""
    values = probe(shipped, None)
    assert values["reward"] == pytest.approx(0.65, abs=0.15)
    assert values["finished_fraction"] == 1
    assert "kl/rao_blackwell" not in values


@pytest.mark.rebuild
def test_its_command_makes_its_like(shipped: LogProbModel, tmp_path: Path) -> None:
    options = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    options += ["--trainer.limit_val_batches=0"]  # changes nothing of what is trained
    main(["fit", f"--config={CONFIGS / 'lab' / 'reference.yaml'}", *options])
    rebuilt = LogProbModel(load_policy(tmp_path / "version_0" / "checkpoints" / "last.ckpt"))
    there, back = probe(shipped, ResidentReference(rebuilt)), probe(rebuilt, ResidentReference(shipped))
    assert abs(there["reward"] - back["reward"]) < 0.15
    # Two references from different orders of the data measured 0.13 and 0.15 nats; one that cannot copy is 3 nats off.
    for values in (there, back):
        assert 0 < values["kl/rao_blackwell"] < 0.5
        assert values["finished_fraction"] > 0.99
