"""The shipped references of the enumerable tasks against what they were trained on, exactly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.lab.designs import Design, length, verbosity
from lit_isdpo.lab.exact import ResponseDistribution, enumerate_responses
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm
from lit_isdpo.policy.logprob_model import LogProbModel

CONFIGS = Path(__file__).parent.parent.parent / "configs"
BOTH = pytest.mark.parametrize("build", [verbosity, length])


def distance(design: Design, found: ResponseDistribution, num_prompts: int) -> float:
    """KL(demonstrations || model) in nats, mean over the first prompts."""
    target = design.target[:num_prompts]
    return float(torch.special.xlogy(target, target).sub(target * found.logps).sum(dim=1).mean())


@BOTH
def test_the_shipped_reference_says_what_demonstrations_say(build: Callable[[], Design]) -> None:
    """Measured over all eight prompts: 0.019 nats (verbosity) and 0.042; a random model is 4 nats off, or more."""
    design = build()
    model = LogProbModel(load_causal_lm(PolicyConfig(path=str(design.reference))))
    found = enumerate_responses(model, design.prompts[:1], design.tree)
    assert distance(design, found, 1) < 0.1
    assert found.unfinished.max() < 0.01
    rare = design.feature >= (3 if design is verbosity() else 7)
    share, expected = (float(p[:1, rare].sum()) for p in (found.logps.exp(), design.target))
    assert share == pytest.approx(expected, rel=0.5)


@pytest.mark.rebuild
@BOTH
def test_its_command_makes_its_like(build: Callable[[], Design], tmp_path: Path) -> None:
    design = build()
    options = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    options += ["--trainer.limit_val_batches=0"]  # changes nothing of what is trained
    main(["fit", f"--config={CONFIGS / f'sft_{design.name}.yaml'}", *options])
    rebuilt = LogProbModel(load_policy(tmp_path / "version_0" / "checkpoints" / "last.ckpt"))
    assert distance(design, enumerate_responses(rebuilt, design.prompts, design.tree), 8) < 0.1
