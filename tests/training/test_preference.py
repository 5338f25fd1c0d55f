"""The module: what a step does, what it checks, and the physics of training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from lit_isdpo.cli import main
from lit_isdpo.data.collation import batch_prompts, collate_pairs
from lit_isdpo.objective.losses import DPOLoss, PairLogps, PreferenceLoss
from lit_isdpo.objective.weights import ImportanceWeighting, UniformWeighting
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.training.module import Schedule
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.types import InputError, TokenizedPair
from tests.conftest import read_metrics

PAIRS = [TokenizedPair([1, 5, 7], [6, 2], [8, 9, 2]), TokenizedPair([1], [7, 2], [9, 2])]


@pytest.fixture
def module(model_dir: str) -> PreferenceModule:
    module = PreferenceModule(PolicyConfig(path=model_dir), loss=DPOLoss(0.1), weighting=ImportanceWeighting())
    module.trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.configure_model()
    return module


def test_the_reference_is_no_part_of_the_module(module: PreferenceModule) -> None:
    assert all(name.startswith("policy.model.") for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in module.reference.model.parameters())


def test_the_reference_follows_the_module_to_its_device(module: PreferenceModule) -> None:
    module.to("meta")
    module.on_fit_start()
    assert {parameter.device.type for parameter in module.reference.model.parameters()} == {"meta"}


def test_policy_is_reference_at_the_first_step(module: PreferenceModule) -> None:
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(0.6931472)
    values = module.train_metrics.compute()
    assert values["weights/mean"] == values["weights/max"] == 1
    assert values["logratios/chosen"] == values["logratios/rejected"] == 0
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.policy.parameters())
    assert all(parameter.grad is None for parameter in module.reference.model.parameters())


def test_a_policy_that_is_not_its_reference_stops_the_first_step(module: PreferenceModule) -> None:
    with torch.no_grad():
        next(module.policy.parameters()).add_(0.1 * torch.randn(1, 16))
    with pytest.raises(InputError, match=r"At the first step the policy is the reference, yet .* rows \[7"):
        module.training_step(collate_pairs(PAIRS, [7, 8], pad_token_id=0), 0)


def test_behavior_logps_replace_the_reference_in_the_weight_alone(module: PreferenceModule) -> None:
    plain = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    pairs = module._pair_logps(plain)
    behavior = [pairs.chosen_logps - 0.5, pairs.rejected_logps + 0.2]  # mu likes the chosen ones less, the others more
    known = plain._replace(behavior_logps=torch.cat(behavior).detach())
    torch.testing.assert_close(module._weights(pairs, known).log_weights, torch.full((2,), 0.3))
    torch.testing.assert_close(module._weights(pairs, plain).log_weights, torch.zeros(2))
    known.behavior_logps[1] = torch.nan  # of the second pair's chosen response: it is weighed against the reference
    torch.testing.assert_close(module._weights(pairs, known).log_weights, torch.tensor([0.3, -0.2]))


class BrokenLoss(PreferenceLoss):
    """Infinite for the second pair."""

    def penalty(self, margin: torch.Tensor) -> torch.Tensor:
        return margin * 0 + torch.tensor([1.0, float("inf")])[: len(margin)]


def test_a_loss_that_is_not_finite_names_the_rows(module: PreferenceModule) -> None:
    module.loss = BrokenLoss(0.1)
    module.training_step(collate_pairs(PAIRS, [3, 14], pad_token_id=0), 1)
    with pytest.raises(InputError, match=r"NaN or infinite at optimizer step 0 for training rows \[14\]"):
        module.on_before_optimizer_step(None)  # type: ignore[arg-type]


def test_vanishing_weights_warn(module: PreferenceModule) -> None:
    values = {"weights/mean": torch.tensor(0.05), "weights/ess": torch.tensor(0.5)}
    with pytest.warns(UserWarning, match="mean importance weight fell below"):
        module._warn_of_vanishing_weights(values)
    values = {"weights/mean": torch.tensor(0.5), "weights/ess": torch.tensor(0.005)}
    with pytest.warns(UserWarning, match="effective sample size fell below"):
        module._warn_of_vanishing_weights(values)


def test_prompts_come_back_out_of_a_batch() -> None:
    batch = collate_pairs(PAIRS, [3, -1], pad_token_id=0)
    assert batch_prompts(batch) == [(3, [1, 5, 7]), (-1, [1])]


def test_eight_pairs_can_be_overfitted(tiny: list[str], pairs_file: str, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in Path(pairs_file).read_text().splitlines()[:9]))
    options = [f"--data.train={few}", "--data.val_size=1", "--trainer.max_epochs=40", "--trainer.limit_val_batches=0"]
    options += ["--model.optimizer.lr=1e-2", "--model.weighting=UniformWeighting"]
    main(["fit", *tiny, *options, f"--trainer.default_root_dir={tmp_path}"])
    logged = read_metrics(tmp_path / "version_0")
    assert logged["train/rewards/accuracies"][0] == 0.5
    assert logged["train/rewards/accuracies"][39] == 1
    assert logged["train/loss"][39] < 0.1 < logged["train/loss"][0]


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 50}, 30),
        ({"max_epochs": 3, "limit_train_batches": 8, "accumulate_grad_batches": 2}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 15),
    ],
)
def test_total_steps(limits: dict[str, int], total: int, module: PreferenceModule) -> None:
    module.trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, **limits)
    module.trainer.datamodule = SimpleNamespace(steps_per_epoch=10)
    assert module.total_steps == total


def test_a_gradient_that_is_not_finite_stops_before_the_step(module: PreferenceModule) -> None:
    for parameter in module.policy.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    with pytest.raises(InputError, match="gradient is NaN or infinite at optimizer step 0"):
        module.configure_gradient_clipping(None, 1.0)  # type: ignore[arg-type]


def test_schedule() -> None:
    cosine = Schedule(decay="cosine", warmup_steps=10, final_factor=0.1)
    assert [cosine.factor(step, 110) for step in (0, 9, 10, 60, 110, 200)] == pytest.approx([0.1, 1, 1, 0.55, 0.1, 0.1])


def test_at_reference_forgets_the_policy() -> None:
    pairs = PairLogps(*torch.randn(4, 3), *torch.ones(2, 3))
    assert not pairs.at_reference().chosen_logratios.any()
    assert UniformWeighting()(pairs.chosen_logratios, pairs.rejected_logratios).weights.sum() == 3
