"""Which tensors an exported folder has: a head that is tied to the embeddings once, and one of its own as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_isdpo.cli import main
from lit_isdpo.commands.export import load_policy
from lit_isdpo.data.collation import collate_completions
from lit_isdpo.policy.logprob_model import LogProbModel
from tests.ranks import run_on_ranks
from tests.runs import newest_run

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = collate_completions([[1, 5, 7]], [[6, 2]], pad_token_id=0)
LORA = "--model.policy.peft={peft_type: LORA, r: 4, lora_alpha: 8, target_modules: all-linear}"
SHARDED = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]


def export(root: Path, *options: str) -> Path:
    """The folder that is made of the newest run's last checkpoint."""
    last = newest_run(root) / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={last}", f"--output_dir={root / 'exported'}", *options])
    return root / "exported"


@pytest.fixture(scope="module")
def own_head_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a head of its own in its file, and a configuration that ties it to the embeddings."""
    folder = tmp_path_factory.mktemp("own head")
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return str(folder)


@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter"])
def test_a_tied_head_is_written_and_counted_once(
    kind: str, tiny: list[str], model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *tiny, "--trainer.max_steps=1", "--probe.num_prompts=0", f"--trainer.default_root_dir={tmp_path}"]
    if kind == "sharded":
        run_on_ranks([[*fit, *SHARDED]])
    else:
        main([*fit, *([LORA] if kind == "adapter" else [])])
    capsys.readouterr()
    written, before = load_file(export(tmp_path) / "model.safetensors"), load_file(f"{model_dir}/model.safetensors")
    assert written.keys() == before.keys()
    assert HEAD not in written
    number = sum(tensor.numel() for tensor in before.values())
    assert f"({number:,} parameters, torch.float32)" in capsys.readouterr().out
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
    trained = load_policy(newest_run(tmp_path) / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        assert torch.equal(LogProbModel(read)(TOKENS).logps, LogProbModel(trained)(TOKENS).logps)


@pytest.mark.filterwarnings("error:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_head_of_its_own_stays_so_whatever_the_configuration_says(
    kind: str, tiny: list[str], own_head_dir: str, tmp_path: Path
) -> None:
    fit = ["fit", *tiny, f"--model.policy.path={own_head_dir}", "--trainer.max_steps=1", "--probe.num_prompts=0"]
    main([*fit, f"--trainer.default_root_dir={tmp_path}", *([LORA] if kind == "adapter" else [])])
    state = torch.load(newest_run(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    written = load_file(export(tmp_path) / "model.safetensors")
    expected = load_file(f"{own_head_dir}/model.safetensors")
    if kind == "whole":
        expected = {name: state[f"policy.model.{name}"] for name in expected}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in (HEAD, EMBEDDINGS))
    assert not torch.equal(written[HEAD], written[EMBEDDINGS])
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_of_its_own_is_not_sharded_as_a_tied_one(tiny: list[str], own_head_dir: str, tmp_path: Path) -> None:
    fit = ["fit", *tiny, f"--model.policy.path={own_head_dir}", "--trainer.max_steps=1", *SHARDED]
    with pytest.raises(AssertionError, match=r"error: model\.policy\.path: .* has a head of its own"):
        run_on_ranks([[*fit, f"--trainer.default_root_dir={tmp_path}"]])
