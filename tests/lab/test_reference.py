"""The shipped reference against the one that its command makes from random weights."""

from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.evaluation.probe import ProbeValues, run_probe
from lit_isdpo.lab.environments import Posts
from lit_isdpo.lab.posts import MAX_NEW_TOKENS, GoldReward, render_prompt, sample_post
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import ResidentReference

REFERENCE = Posts.reference
CONFIGS = Path(__file__).parent.parent.parent / "configs"


def probe(policy: LogProbModel, reference: ResidentReference | None) -> ProbeValues:
    """Samples of ``policy`` on 1,024 test posts."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    rng = Random("reference")
    prompts = [render_prompt(sample_post(rng, "test")) for _ in range(1024)]
    return run_probe(
        policy,
        reference,
        [tokenizer.encode(prompt) for prompt in prompts],
        prompt_texts=prompts,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=512,
        seed=0,
        reward=GoldReward(),
    )


@pytest.fixture(scope="module")
def shipped() -> LogProbModel:
    return LogProbModel(load_causal_lm(PolicyConfig(path=str(REFERENCE))))


def test_the_shipped_reference_tells_facts(shipped: LogProbModel) -> None:
    """By its design, demonstrations earn 0.65 on average; a model that has not learnt to copy earns about -2."""
    values = probe(shipped, None)
    assert values.rewards is not None
    assert values.rewards.mean().item() == pytest.approx(0.65, abs=0.15)
    assert values.finished.mean() == 1


@pytest.mark.rebuild
def test_its_command_makes_its_like(shipped: LogProbModel, tmp_path: Path) -> None:
    options = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    options += ["--trainer.limit_val_batches=0"]  # changes nothing of what is trained
    main(["fit", f"--config={CONFIGS / 'lab' / 'reference.yaml'}", *options])
    rebuilt = LogProbModel(load_policy(tmp_path / "version_0" / "checkpoints" / "last.ckpt"))
    there, back = probe(shipped, ResidentReference(rebuilt)), probe(rebuilt, ResidentReference(shipped))
    assert there.kl is not None
    assert back.kl is not None
    assert there.rewards is not None
    assert back.rewards is not None
    assert abs(there.rewards.mean() - back.rewards.mean()) < 0.15
    # Two references from different orders of the data measured 0.13 and 0.15 nats; one that cannot copy is 3 nats off.
    assert there.kl[..., 0].mean() < 0.5
    assert back.kl[..., 0].mean() < 0.5
