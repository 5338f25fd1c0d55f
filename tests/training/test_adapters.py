"""Training with adapters, end to end: every method, checkpoints, resume, export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_isdpo.cli import main
from lit_isdpo.commands.export import export, load_policy
from lit_isdpo.data.collation import collate_completions, collate_pairs
from lit_isdpo.objective import losses
from lit_isdpo.objective.losses import PreferenceLoss
from lit_isdpo.objective.metrics import PairMetrics
from lit_isdpo.objective.weights import ImportanceWeighting, UniformWeighting
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel, load_logprob_model
from lit_isdpo.policy.reference import AdapterOffReference, ReferenceConfig, ResidentReference
from lit_isdpo.training.models import BASE_KEY
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.run_report import write_model_folder
from lit_isdpo.types import InputError, TokenizedPair
from tests.runs import read_metrics
from tests.training.test_invariance import one_rank_is_two
from tests.training.test_resume import assert_same_end, assert_same_log, checkpoint, fit

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
KINDS = {
    "DoRA": {**LORA, "use_dora": True},
    "IA3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VeRA": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "o_proj"]},
}
TOKENS = collate_completions([[1, 5, 7], [1, 9]], [[6, 2], [7, 8, 9, 2]], pad_token_id=0)
PAIRS = [TokenizedPair([1, 5, 7], [6, 2], [8, 9, 2]), TokenizedPair([1], [7, 2], [9, 2])]


def with_adapter(arguments: list[str], options: dict[str, Any] = LORA) -> list[str]:
    return [*arguments, f"--model.policy.peft={json.dumps(options)}", "--model.optimizer.lr=1e-2"]


@torch.no_grad()
def logps(model: Any) -> Tensor:
    return LogProbModel(model.eval())(TOKENS).logps


@torch.no_grad()
def logps_in_training(run: Path, model_dir: str, options: dict[str, Any] = LORA) -> Tensor:
    """Those of the checkpoint's policy as the module holds it: the base with the adapter in it."""
    policy = load_logprob_model(PolicyConfig(path=model_dir, peft=options))
    state = {key.removeprefix("policy.model."): value for key, value in checkpoint(run)["state_dict"].items()}
    policy.adapter.load_state(state)
    return policy(TOKENS).logps


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    return [*with_adapter(tiny), "--data.micro_batch_size=4"]


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit of six steps, four to an epoch."""
    return fit(tmp_path_factory.mktemp("run"), [*options, "--trainer.max_steps=6"])


def test_the_first_step_is_at_the_reference(run: Path) -> None:
    values = read_metrics(run)
    assert values["val/kl/rao_blackwell"][0] == 0
    assert values["train/weights/mean"][0] == values["train/weights/max"][0] == 1
    assert values["train/logratios/chosen"][0] == values["train/logratios/rejected"][0] == 0
    assert values["val/kl/rao_blackwell"][6] > 0


def test_a_checkpoint_holds_the_adapter_alone(run: Path) -> None:
    saved = checkpoint(run)
    assert saved["state_dict"]
    assert all(".lora_" in key for key in saved["state_dict"])
    assert len(saved["optimizer_states"][0]["state"]) == len(saved["state_dict"])
    assert json.loads((run / "model" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_resume_is_bit_for_bit(run: Path, options: list[str], tmp_path: Path) -> None:
    stopped = fit(tmp_path, [*options, "--trainer.max_steps=3", "--probe.num_prompts=0"])
    last = stopped / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path, [*options, "--trainer.max_steps=6", "--probe.num_prompts=0", f"--ckpt_path={last}"])
    assert_same_end(run, resumed)
    assert_same_log(run, resumed, since=3)


def test_validate_on_a_checkpoint_finds_what_the_fit_ended_with(run: Path, options: list[str], tmp_path: Path) -> None:
    last = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    main(["validate", *options, last, f"--trainer.default_root_dir={tmp_path}"])
    ended, again = read_metrics(run), read_metrics(tmp_path / "version_0")
    for key in ("val/loss", "val/logratios/chosen", "val/kl/rao_blackwell", "val/response_length"):
        assert list(again[key].values()) == [ended[key][6]], key


@pytest.mark.slow
def test_test_and_predict_on_a_checkpoint(run: Path, options: list[str], pairs_file: str, tmp_path: Path) -> None:
    arguments = [*options, f"--data.test={pairs_file}", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
    for verb in ("test", "predict"):
        main([verb, *arguments, f"--trainer.default_root_dir={tmp_path}"])
    assert read_metrics(tmp_path / "version_0")["test/kl/rao_blackwell"]
    assert (tmp_path / "version_1" / "predictions.jsonl").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's to mend
def test_export_merged_and_as_an_adapter(run: Path, model_dir: str, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    expected = logps_in_training(run, model_dir)
    assert (expected - logps(AutoModelForCausalLM.from_pretrained(model_dir))).abs().max() > 1e-3
    main(["export", f"--ckpt_path={last}", f"--output_dir={tmp_path / 'merged'}"])
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    main(["export", f"--ckpt_path={last}", f"--output_dir={tmp_path / 'adapter'}", "--as_adapter=true"])
    with_base = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(Path(model_dir).resolve()), "found from every folder"
    assert "with `dtype=float32` its base" in (tmp_path / "adapter" / "README.md").read_text()
    torch.testing.assert_close(logps(with_base.base_model.model), expected)
    for folder, words in (("merged", "library_name: transformers"), ("adapter", "library_name: peft")):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).encode("POST: price good TL;DR:")
        assert words in (tmp_path / folder / "README.md").read_text()
    torch.testing.assert_close(logps(load_policy(last)), expected)


def test_export_of_an_adapter_whose_base_has_moved(
    run: Path, model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, other, lost = tmp_path / "moved", tmp_path / "other", tmp_path / "run"
    shutil.copytree(model_dir, moved)
    shutil.copytree(run, lost)
    config = lost / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace(model_dir, str(tmp_path / "nowhere")))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.model.layers[0].mlp.up_proj.weight.data *= 1.01
    model.save_pretrained(other)
    last = f"--ckpt_path={lost / 'checkpoints' / 'last.ckpt'}"
    for arguments, message in (
        ([], "no such folder"),
        ([f"--base_model={other}"], "has other weights"),
        ([f"--base_model={moved}"], None),
    ):
        command = ["export", last, f"--output_dir={tmp_path / 'out'}", *arguments]
        if message is None:
            main(command)
        else:
            with pytest.raises(SystemExit):
                main(command)
            error = capsys.readouterr().err
            assert error.startswith("error: base_model")
            assert message in error


def module_of(policy: PolicyConfig, **more: Any) -> PreferenceModule:
    module = PreferenceModule(policy, **more)
    module.trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.configure_model()
    return module


def saved_by(module: PreferenceModule) -> dict[str, Any]:
    saved = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(saved)
    return saved


def test_what_does_not_belong_together_is_refused(model_dir: str) -> None:
    """Whole models and adapters, adapters of other shapes, other bases."""
    whole, adapted = module_of(PolicyConfig(path=model_dir)), module_of(PolicyConfig(path=model_dir, peft=LORA))
    other, narrow = (
        module_of(PolicyConfig(path=model_dir, peft={**LORA, "r": 2})),
        module_of(PolicyConfig(path=model_dir, peft=LORA, dtype="bfloat16", compute_dtype="bfloat16")),
    )
    for module, saved, message in (
        (whole, saved_by(adapted), "holds only an adapter; set model.policy.peft"),
        (adapted, saved_by(whole), "holds a whole model and no adapter"),
        (adapted, saved_by(narrow), "other weights"),
        (adapted, saved_by(other), r"not those of model.policy.peft \(.*lora_A.*\)"),
        (whole, {"state_dict": {}}, "not those of model.policy.path"),
    ):
        with pytest.raises(InputError, match=message):
            take(module, saved)
    take(adapted, saved_by(adapted))


def take(module: PreferenceModule, saved: dict[str, Any]) -> None:
    """As Lightning restores a checkpoint."""
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])


def test_export_of_a_whole_model_takes_no_options_of_an_adapter(model_dir: str, tmp_path: Path) -> None:
    module = module_of(PolicyConfig(path=model_dir))
    write_model_folder(module, tmp_path / "model")
    last, output = tmp_path / "last.ckpt", str(tmp_path / "out")
    torch.save(saved_by(module), last)
    with pytest.raises(InputError, match=r"as_adapter: .* holds a whole model and no adapter"):
        export(str(last), output, run_dir=str(tmp_path), as_adapter=True)
    with pytest.raises(InputError, match=r"base_model: .* needs no other"):
        export(str(last), output, run_dir=str(tmp_path), base_model=model_dir)


def test_a_folder_of_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a PEFT adapter and not a whole model; merge it first"):
        PreferenceModule(PolicyConfig(path=str(tmp_path)))


@pytest.mark.slow  # the kinds' mathematics is in tests/policy/test_adapters.py
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_take_a_step(kind: str, tiny: list[str], model_dir: str, tmp_path: Path) -> None:
    steps = ["--trainer.max_steps=2", "--probe.num_prompts=0", "--trainer.limit_val_batches=0"]
    made = fit(tmp_path, [*with_adapter(tiny, KINDS[kind]), *steps])
    expected = logps_in_training(made, model_dir, KINDS[kind])
    torch.testing.assert_close(logps(load_policy(made / "checkpoints" / "last.ckpt")), expected)
    assert (expected - logps(AutoModelForCausalLM.from_pretrained(model_dir))).abs().max() > 1e-6


def test_sft(tiny: list[str], model_dir: str, tmp_path: Path) -> None:
    options = ["--model=SFTModule", "--data=SFTDataModule", *with_adapter(tiny), "--trainer.max_steps=2"]
    made = fit(tmp_path, [*options, "--probe.num_prompts=0"])
    assert BASE_KEY in checkpoint(made)
    assert read_metrics(made)["val/loss"][2] < read_metrics(made)["val/loss"][0]
    torch.testing.assert_close(
        logps(load_policy(made / "checkpoints" / "last.ckpt")), logps_in_training(made, model_dir)
    )


LOSSES = [loss for loss in vars(losses).values() if isinstance(loss, type) and issubclass(loss, PreferenceLoss)]


def test_every_method_trains_the_adapter_alone(model_dir: str) -> None:
    """The interface is the same, so one module serves them all: the loss's gradient reaches what is trained."""
    module = module_of(PolicyConfig(path=model_dir, peft=LORA))
    assert isinstance(module.reference, AdapterOffReference)
    trained = {name for name, parameter in module.policy.named_parameters() if parameter.requires_grad}
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
    batch = collate_pairs(PAIRS, [0, 1], pad_token_id=0)
    for loss in [loss for loss in LOSSES if loss is not PreferenceLoss]:
        module.comparison.loss = loss(logratio="sum") if loss is losses.IPOLoss else loss()
        for weighting in (UniformWeighting(), ImportanceWeighting()):
            module.comparison.weighting, module.train_metrics = weighting, PairMetrics()
            module.zero_grad()
            module.training_step(batch, 0).backward()
            gradients = {name: p.grad for name, p in module.policy.named_parameters() if p.grad is not None}
            assert gradients.keys() == trained, loss
            assert any(gradient.any() for gradient in gradients.values()), loss
            assert module.train_metrics.compute()["weights/mean"] == 1


def test_a_reference_of_its_own_is_a_copy(model_dir: str) -> None:
    module = module_of(PolicyConfig(path=model_dir, peft=LORA), reference=ReferenceConfig(path=model_dir))
    assert isinstance(module.reference, ResidentReference)
    assert module.reference.model.adapter is None
    assert not any("lora" in name for name, _ in module.reference.model.named_parameters())


def test_the_lora_file_lies_over_a_config_of_the_other_module_too(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parent.parent.parent / "configs"
    files = [f"--config={root / 'sft.yaml'}", f"--config={root / 'policy' / 'lora.yaml'}"]
    with pytest.raises(SystemExit):
        main(["fit", *files, "--print_config"])
    policy = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["policy"]
    assert policy["path"].startswith("lab:posts")
    assert policy["peft"]["r"] == 16


@pytest.mark.slow
def test_two_ranks_are_one(tiny: list[str], tmp_path: Path) -> None:
    """DDP over gloo, which looks for no unused parameters: there are none."""
    options = [*with_adapter(tiny), "--trainer.max_steps=5", "--data.val_size=7", "--data.micro_batch_size=2"]
    one_rank_is_two(options, tmp_path)
