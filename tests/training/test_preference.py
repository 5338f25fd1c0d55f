"""The module: what a step does, what it checks, and the physics of training."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_isdpo.cli import main
from lit_isdpo.data.collation import batch_prompts, collate_pairs
from lit_isdpo.objective.losses import DPOLoss, PreferenceLoss, RPOLoss, SimPOLoss
from lit_isdpo.objective.weights import ImportanceWeighting, PairWeighting, UniformWeighting, WPOWeighting
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.reading import total_steps
from lit_isdpo.types import InputError, PreferenceBatch, TokenizedPair
from tests.conftest import pair_logps
from tests.runs import read_metrics

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
    module.comparison.on_fit_start(module.trainer, module)
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
    pairs = module.comparison.pair_logps(module.policy, plain, "train")
    behavior = [pairs.chosen_logps - 0.5, pairs.rejected_logps + 0.2]  # mu likes the chosen ones less, the others more
    names = ("chosen_behavior_logps", "rejected_behavior_logps")
    of_data = {name: part.detach() for name, part in zip(names, behavior, strict=True)}
    known = plain._replace(numbers=plain.numbers | of_data)

    def log_weights(batch: PreferenceBatch) -> Tensor:
        return module.comparison.weighting(module.comparison.pair_logps(module.policy, batch, "train")).log_weights

    torch.testing.assert_close(log_weights(known), torch.full((2,), 0.3))
    torch.testing.assert_close(log_weights(plain), torch.zeros(2))
    module.comparison.mu = "reference"
    torch.testing.assert_close(log_weights(known), torch.zeros(2))
    module.comparison.mu = "data"
    torch.testing.assert_close(log_weights(known), torch.full((2,), 0.3))
    known.numbers[names[0]][1] = torch.nan  # of the second pair's chosen response
    module.comparison.mu = "auto"
    torch.testing.assert_close(log_weights(known), torch.tensor([0.3, -0.2]))


def test_weights_that_mix_pairs_are_taken_among_random_ones(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other weightings the rows of a step are sorted by length; both read the same ones."""
    step = PreferenceModule.training_step
    seen: dict[str, list[int]] = {}

    def remember(self: PreferenceModule, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        seen.setdefault(type(self.comparison.weighting).__name__, []).extend(batch.row_ids.tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PreferenceModule, "training_step", remember)
    for name in ("ShuffledImportanceWeighting", "BatchMeanImportanceWeighting", "ImportanceWeighting"):
        options = [f"--model.weighting={name}", "--data.micro_batch_size=4", "--trainer.max_steps=1"]
        main(["fit", *tiny, *options, f"--trainer.default_root_dir={tmp_path}"])
    shuffled, mean, by_length = seen.values()
    assert shuffled == mean != by_length
    assert sorted(shuffled) == sorted(by_length)


def test_mu_of_the_data_is_looked_for_before_anything_runs(
    tiny: list[str], pairs_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    known = tmp_path / "known.jsonl"
    for row in rows:
        row |= {"chosen_behavior_logps": -100.0, "rejected_behavior_logps": -100.0}
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.mu=data", "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *tiny, *options, f"--data.train={known}"])
    for verb in ("fit", "validate"):
        arguments = options if verb == "fit" else options[::2]
        with pytest.raises(SystemExit):
            main([verb, *tiny, *arguments, f"--data.train={known}", f"--data.val={pairs_file}"])
        message = capsys.readouterr().err
        assert "data.val: model.mu is 'data', but 40 pairs have no behavior log-probs" in message
        assert f"the first of them row 0 of {pairs_file}" in message


def test_the_datas_weights_multiply_all_of_a_pairs_loss(module: PreferenceModule) -> None:
    module.comparison.loss = RPOLoss(0.1, eta=2.0)
    batch = collate_pairs(
        [PAIRS[0]._replace(weight=3.0), PAIRS[1]._replace(weight=0.0, margin=1.0)], [0, 1], pad_token_id=0
    )
    pairs = module.comparison.pair_logps(module.policy, batch, "train")
    expected = 3 * (math.log(2) - 0.2 * pairs.chosen_logps[0].item()) / 2
    assert module.training_step(batch, 0).item() == pytest.approx(expected)
    batch.pair_weights[1] = 1.0
    with_margin = math.log(1 + math.e) - 0.2 * pairs.chosen_logps[1].item()
    assert module.training_step(batch, 0).item() == pytest.approx(expected + with_margin / 2)


@pytest.mark.parametrize(
    ("loss", "weighting", "mu", "message"),
    [
        (DPOLoss(), UniformWeighting(), "auto", r"model\.reference: DPOLoss needs a reference"),
        (SimPOLoss(), ImportanceWeighting(), "auto", r"ImportanceWeighting on SimPOLoss without a reference has no mu"),
        (SimPOLoss(), ImportanceWeighting(), "reference", r"has no mu to divide by"),
    ],
)
def test_what_needs_a_reference_says_so(
    loss: PreferenceLoss, weighting: PairWeighting, mu: Literal["auto", "reference"], message: str, model_dir: str
) -> None:
    with pytest.raises(InputError, match=message):
        PreferenceModule(PolicyConfig(path=model_dir), reference=None, loss=loss, weighting=weighting, mu=mu)


def test_simpo_holds_no_reference_unless_it_is_to_be_measured_against_one(tiny: list[str], tmp_path: Path) -> None:
    options = ["--trainer.max_steps=2", "--model.loss=SimPOLoss", "--model.weighting=UniformWeighting"]
    main(["fit", *tiny, *options, "--model.reference=null", f"--trainer.default_root_dir={tmp_path}"])
    main(["fit", *tiny, *options, f"--trainer.default_root_dir={tmp_path}"])
    without, beside = (read_metrics(tmp_path / f"version_{number}") for number in range(2))
    assert without["train/loss"] == beside["train/loss"]
    missing = {key.split("/", 1)[1].split("/")[0] for key in set(beside) - set(without)}
    assert missing == {"kl", "logratios"}


def test_wpo_weighs_by_the_policys_own_distribution(module: PreferenceModule) -> None:
    """Against the whole distribution at each token, by hand."""
    module.comparison.weighting = WPOWeighting()
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    weights = module.comparison.weighting(module.comparison.pair_logps(module.policy, batch, "train")).log_weights
    logps = module.policy.token_logits(module.policy.completion_states(batch.tokens)).log_softmax(dim=1)  # (N, V)
    targets = batch.tokens.completion_ids[batch.tokens.completion_mask]
    aligned = logps.gather(1, targets[:, None])[:, 0] - (2 * logps).exp().sum(dim=1).log()
    means = [part.mean() for part in aligned.split([2, 2, 3, 2])]  # chosen of 2 and 2 tokens, rejected of 3 and 2
    expected = torch.stack([means[0] + means[2], means[1] + means[3]]).clamp(max=0)
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad
    module.comparison.weighting = UniformWeighting()
    assert module.comparison.pair_logps(module.policy, batch, "train").chosen_alignment.isnan().all(), (
        "not computed where it is not needed"
    )


class BrokenLoss(PreferenceLoss):
    """Infinite for the second pair."""

    def penalty(self, margin: torch.Tensor) -> torch.Tensor:
        return margin * 0 + torch.tensor([1.0, float("inf")])[: len(margin)]


def test_a_loss_that_is_not_finite_names_the_rows(module: PreferenceModule) -> None:
    module.comparison.loss = BrokenLoss(0.1)
    module.training_step(collate_pairs(PAIRS, [3, 14], pad_token_id=0), 1)
    with pytest.raises(InputError, match=r"NaN or infinite at optimizer step 0 for training rows \[14\]"):
        module.guard.on_before_optimizer_step(module.trainer, module, None)  # type: ignore[arg-type]


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
    ],
)
def test_total_steps(limits: dict[str, int], total: int) -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, **limits)
    data: Any = SimpleNamespace(order=SimpleNamespace(steps_per_epoch=10))
    assert total_steps(trainer, lambda: data) == total


def test_a_fit_on_loaders_of_ones_own_needs_no_data_module(model_dir: str) -> None:
    batches = [collate_pairs(PAIRS, [0, 1], pad_token_id=0)] * 3
    module = PreferenceModule(PolicyConfig(path=model_dir))
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(max_steps=3, accelerator="cpu", **options)
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    assert trainer.global_step == 3
    assert trainer.callback_metrics["train/loss"] < 0.6931472


def test_a_gradient_that_is_not_finite_stops_before_the_step(module: PreferenceModule) -> None:
    for parameter in module.policy.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    module.guard.add(torch.zeros(1), torch.tensor([7]))
    with pytest.raises(
        InputError, match=r"gradient is NaN or infinite at optimizer step 0 in the step of training rows \[7\]"
    ):
        module.configure_gradient_clipping(None, 1.0)  # type: ignore[arg-type]


def test_at_reference_forgets_the_policy() -> None:
    pairs = pair_logps(*torch.randn(2, 3), ref=(-1.0, -2.0))
    assert not pairs.at_reference().chosen_logratios.any()
    assert UniformWeighting()(pairs).weights.sum() == 3
