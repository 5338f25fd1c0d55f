"""Files from others: no code of theirs runs, nothing outside their folders is touched, and no secret is kept."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_in_parts
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from lit_isdpo.cli import main
from lit_isdpo.data.encoding import load_tokenizer
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.sources import DataSource, open_source
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_pair
from lit_isdpo.evaluation.endpoint import check_no_secret
from lit_isdpo.policy.adapters import CONFIG_NAME
from lit_isdpo.policy.loading import PolicyConfig, load_causal_lm, load_config
from lit_isdpo.study.grid import Variant, plan_runs
from lit_isdpo.training.checkpoint_files import EXTRAS, INDEX, StoredCheckpoint
from lit_isdpo.training.checkpoints import BestCheckpoint
from lit_isdpo.types import InputError, Message, PreferenceExample
from tests.evaluation.chat_server import ChatServer, Reply
from tests.ranks import run_on_ranks
from tests.runs import newest_run


class Payload:
    """Pickled, it makes a folder where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """There if code ran."""
    return tmp_path / "code_ran"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    main(["fit", *tiny, "--trainer.max_steps=1", f"--trainer.default_root_dir={root}", "--checkpoint.monitor=val/loss"])
    return newest_run(root)


VERBS = ("fit", "validate", "test", "predict", "export")


def arguments_of(verb: str, checkpoint: Path, tiny: list[str], pairs_file: str, folder: Path) -> list[str]:
    if verb == "export":
        return [verb, f"--ckpt_path={checkpoint}", f"--output_dir={folder / 'exported'}"]
    options = [*tiny, "--trainer.max_steps=2", f"--data.test={pairs_file}", f"--trainer.default_root_dir={folder}"]
    return [verb, *options, f"--ckpt_path={checkpoint}"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_runs_no_code(
    verb: str,
    run: Path,
    tiny: list[str],
    pairs_file: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what some advise for older checkpoints
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "more": Payload(trace)}, file)
    assert "could run code" in refusal(arguments_of(verb, file, tiny, pairs_file, tmp_path), capsys)
    assert not trace.exists()


def test_the_trainer_is_told_so_too(
    run: Path, tiny: list[str], tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Behind the check of the command line: a file that was changed in between, say."""
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "more": Payload(trace)}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("lit_isdpo.cli.check", lambda *_: None)
    arguments = ["validate", *tiny, f"--ckpt_path={file}", f"--trainer.default_root_dir={tmp_path}"]
    assert "could run code" in refusal(arguments, capsys)
    monkeypatch.setattr("lit_isdpo.training.checkpoint_files.StoredCheckpoint", lambda _: SimpleNamespace(check=int))
    with pytest.raises(Exception, match="Weights only load failed"):
        main(arguments)
    assert not trace.exists()


def test_nobody_switches_that_off(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "weights_only" in refusal(["validate", *tiny, "--weights_only=false"], capsys)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint as ranks write it."""
    folder = tmp_path / "sharded.ckpt"
    state = {"state_dict": {"policy.model.weight": torch.ones(2)}, "optimizer_0": {"lr": 0.1}}
    save_in_parts(state, storage_writer=FileSystemWriter(folder, single_file_per_rank=True), no_dist=True)
    torch.save({"global_step": 1}, folder / EXTRAS)
    StoredCheckpoint(folder)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("part", [EXTRAS, INDEX, "outside"])
def test_a_sharded_checkpoint_runs_no_code_and_stays_in_its_folder(
    part: str, sharded: Path, trace: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if part == EXTRAS:
        torch.save({"global_step": 1, "more": Payload(trace)}, sharded / EXTRAS)
    else:
        index = pickle.loads((sharded / INDEX).read_bytes())
        if part == INDEX:
            index.planner_data = Payload(trace)
        else:
            for stored in index.storage_data.values():
                stored.relative_path = f"../{stored.relative_path}"
        (sharded / INDEX).write_bytes(pickle.dumps(index))
    said = refusal(["validate", *tiny, "--trainer.strategy=fsdp2", f"--ckpt_path={sharded}"], capsys)
    assert "cannot be read as a checkpoint" in said
    assert not trace.exists()


@pytest.fixture
def model(model_dir: str, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(model_dir, tmp_path / "model")


OPTIONS = {
    "policy": ["fit", "--model.policy.path=CHANGED"],
    "reference": ["fit", "--model.reference.path=CHANGED"],
    "reward model": ["fit", "--model=RewardModule", "--model.policy.path=CHANGED"],
    "reward": ["test", "--evaluation.reward=RewardModel", "--evaluation.reward.path=CHANGED"],
}
NAMED = {"reward model": "policy"}


def arguments_with(model: Path, option: str, tiny: list[str], pairs_file: str, folder: Path) -> list[str]:
    verb, *others = [argument.replace("CHANGED", str(model)) for argument in OPTIONS[option]]
    given = [each for each in tiny if option != "reward model" or not each.startswith(("--model", "--probe"))]
    shared = [f"--data.test={pairs_file}", "--trainer.max_steps=1", f"--trainer.default_root_dir={folder}"]
    return [verb, *others[:1], *given, *others, *shared]


@pytest.mark.parametrize("option", OPTIONS)
def test_pickled_weights_run_no_code(
    option: str,
    model: Path,
    tiny: list[str],
    pairs_file: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((model / "config.json").read_text())
    if option == "reward":
        config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
        (model / "config.json").write_text(json.dumps(config))
    (model / SAFE_WEIGHTS_NAME).unlink()
    torch.save({"lm_head.weight": torch.ones(2), "more": Payload(trace)}, model / WEIGHTS_NAME)
    said = refusal(arguments_with(model, option, tiny, pairs_file, tmp_path), capsys)
    assert "could run code; save it as safetensors" in said
    assert f"{NAMED.get(option, option)}.path" in said
    assert not trace.exists()


def test_pickled_weights_that_are_tensors_are_read(model: Path, model_dir: str) -> None:
    expected = load_causal_lm(PolicyConfig(path=model_dir)).state_dict()
    (model / SAFE_WEIGHTS_NAME).unlink()
    torch.save(expected, model / WEIGHTS_NAME)
    torch.testing.assert_close(load_causal_lm(PolicyConfig(path=str(model))).state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("option", ["policy", "reference"])
def test_an_adapter_is_not_read_as_a_model(
    option: str,
    model: Path,
    tiny: list[str],
    pairs_file: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (model / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model)}))
    torch.save({"more": Payload(trace)}, model / "adapter_model.bin")
    assert "holds a PEFT adapter" in refusal(arguments_with(model, option, tiny, pairs_file, tmp_path), capsys)
    assert not trace.exists()


@pytest.mark.parametrize("index", [SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME])
@pytest.mark.parametrize("option", ["policy", "reward"])
def test_weights_lie_in_their_folder(
    option: str,
    index: str,
    model: Path,
    tiny: list[str],
    pairs_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (model / SAFE_WEIGHTS_NAME).rename(tmp_path / "elsewhere.safetensors")
    content = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (model / index).write_text(json.dumps(content))
    said = refusal(arguments_with(model, option, tiny, pairs_file, tmp_path), capsys)
    assert "names a file outside of that folder: '../elsewhere.safetensors'" in said


def with_code(model: Path, trace: Path) -> Path:
    """Makes it an architecture of its own, whose code makes a folder."""
    config = json.loads((model / "config.json").read_text())
    classes = {f"Auto{kind}": f"modeling_foreign.{kind}" for kind in ("Config", "ModelForCausalLM")}
    classes["AutoModelForSequenceClassification"] = classes["AutoModelForCausalLM"]
    (model / "config.json").write_text(json.dumps(config | {"model_type": "foreign", "auto_map": classes}))
    code = f"import os\nimport transformers\nos.mkdir({str(trace)!r})\n"
    code += "class Config(transformers.LlamaConfig):\n    model_type = 'foreign'\n"
    code += "class ModelForCausalLM(transformers.LlamaForCausalLM):\n    config_class = Config\n"
    (model / "modeling_foreign.py").write_text(code)
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_code_that_comes_with_a_model_does_not_run(
    option: str,
    model: Path,
    tiny: list[str],
    pairs_file: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(arguments_with(with_code(model, trace), option, tiny, pairs_file, tmp_path), capsys)
    assert "set trust_remote_code to true if you trust it" in said
    assert f"{NAMED.get(option, option)}.path" in said
    assert not trace.exists()


def test_it_runs_where_the_user_says_so(
    model: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = load_config(PolicyConfig(path=str(with_code(model, trace)), trust_remote_code=True))
    assert config.model_type == "foreign"
    assert trace.exists()


def test_a_known_architecture_needs_no_code_that_comes_with_it(model: Path, trace: Path) -> None:
    with_code(model, trace)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    (model / "custom_generate").mkdir()
    shutil.copy(model / "modeling_foreign.py", model / "custom_generate" / "generate.py")
    load_causal_lm(PolicyConfig(path=str(model)))
    assert not trace.exists()


def test_a_tokenizers_code_does_not_run(
    model: Path, trace: Path, tiny: list[str], pairs_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model / "tokenizer_config.json"
    own = {
        "tokenizer_class": "Foreign",
        "auto_map": {"AutoTokenizer": ["tokenization.Foreign", "tokenization.Foreign"]},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (model / "tokenization.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    said = refusal(arguments_with(model, "policy", tiny, pairs_file, tmp_path), capsys)
    assert "set trust_remote_code to true if you trust it" in said
    assert not trace.exists()


def test_a_chat_template_reaches_no_python(model: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
    )
    tokenizer = load_tokenizer(str(model))
    example = PreferenceExample([Message(role="user", content="POST: price")], " good", " bad")
    with pytest.raises(RowError, match="refused by the chat template"):
        tokenize_pair(example, TextEncoder(tokenizer), Limits(64, 32))


def test_a_runs_code_is_not_exported(
    run: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    with_code(copy / "model", trace)
    command = ["export", f"--ckpt_path={copy / 'checkpoints' / 'last.ckpt'}", f"--output_dir={tmp_path / 'exported'}"]
    assert "set trust_remote_code to true" in refusal(command, capsys)
    assert not trace.exists()
    assert not (tmp_path / "exported").exists()


def test_a_loading_script_does_not_run(
    tiny: list[str], pairs_file: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    script = folder / "pairs.py"
    script.write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    for path, why in ((folder, "no data files"), (script, "unknown suffix")):
        assert why in refusal(["fit", *tiny, "--trainer.max_steps=1", f"--data.train={path}"], capsys)
    shutil.copy(pairs_file, folder / "train.jsonl")
    assert len(open_source(DataSource(str(folder)), "data.train").read("train")) == 40
    assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "!!python/object/apply:os.mkdir [TRACE]\n"),
        ("config.yaml", "\t: [\n"),
    ],
    ids=["code", "no YAML"],
)
@pytest.mark.parametrize("verb", ["fit", "export"])
def test_a_runs_config_runs_no_code(
    verb: str,
    file: str,
    content: str,
    run: Path,
    tiny: list[str],
    pairs_file: str,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / file).write_text(content.replace("TRACE", str(trace)))
    command = arguments_of(verb, copy / "checkpoints" / "last.ckpt", tiny, pairs_file, tmp_path)
    assert "is no config of a run" in refusal(command, capsys)
    assert not trace.exists()


def test_a_resumed_run_deletes_nothing_that_its_checkpoint_names(tmp_path: Path) -> None:
    """Lightning would delete the former best checkpoint, of which it is told here that it is a file of the user's."""
    callback = BestCheckpoint(monitor="val/loss")
    callback.dirpath = str(tmp_path / "run" / "checkpoints")
    other = f"{callback.dirpath}/../../precious"
    state = callback.state_dict() | {"best_k_models": {other: torch.tensor(9.0)}, "kth_best_model_path": other}
    callback.load_state_dict(state | {"best_model_path": other, "last_model_path": other})
    assert not any("precious" in str(value) for value in callback.state_dict().values())


def test_a_model_card_is_not_rewritten_by_what_a_run_says(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["init_args"]["policy"]["path"] = "a\n```\n# Injected\n---\nlicense: mine\n"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = (copy / "metrics.csv").read_text().splitlines()
    metrics[0] += ',"val/a | b |\n# Injected"'
    (copy / "metrics.csv").write_text("\n".join(line + (",1" if number else "") for number, line in enumerate(metrics)))
    output = tmp_path / "out\n# Injected"
    main(["export", f"--ckpt_path={copy / 'checkpoints' / 'last.ckpt'}", f"--output_dir={output}"])
    card = (output / "README.md").read_text()
    before, block, after = card.split("````")
    assert yaml.safe_load(block.removeprefix("yaml\n")) == config
    assert "\n# Injected" not in before + after
    assert len(list(yaml.safe_load_all(card.split("---")[1]))) == 1


@pytest.mark.parametrize("design", ["../../x", "/tmp/x", "..", ""])
def test_a_study_stays_in_its_folder(design: str) -> None:
    with pytest.raises(InputError, match="cannot be a path"):
        plan_runs({design: Variant()}, {"DPO": Variant()}, {}, [0], {})


def test_a_methods_name_makes_no_path() -> None:
    (planned,) = plan_runs({"x": Variant()}, {"../../y": Variant()}, {"a.b": ["../z"]}, [0], {})
    assert Path(planned.folder).parent == Path("x")


SECRET = "sk-9f8e7d6c5b4a39281706f5e4d3c2b1a0"


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--evaluation.judge.base_url=https://user:{SECRET}@judge.example/v1"],
        [f"--evaluation.judge.base_url=https://judge.example/v1?api-key={SECRET}"],
        ["--evaluation.judge.base_url=https://judge.example/v1?key=short"],
        [f"--evaluation.judge.base_url=https://judge.example/{SECRET}"],
        ["--evaluation.judge.base_url=https://judge.example/of-the-environment"],
        [f"--evaluation.judge.api_key_env={SECRET}"],
        ["--evaluation.judge.api_key_env=0f1e2d3c4b5a"],
        [f"--evaluation.judge.extra_body={{api_key: {SECRET}}}"],
        ["--evaluation.judge.extra_body={headers: {Authorization: Basic}}"],
        ["--data.test=https://user:word@data.example/pairs.jsonl"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", f"--trainer.logger.prefix={SECRET}"],
        [f"--trainer.max_steps={SECRET}"],
    ],
    ids=lambda arguments: arguments[-1].removeprefix("--").replace(SECRET, "SECRET"),
)
def test_no_option_holds_a_secret_and_no_message_shows_it(
    arguments: list[str],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN", "of-the-environment")
    judge = ["--evaluation.judge=Judge", "--evaluation.judge.model=a"] if "judge" in arguments[0] else []
    given = ["test", *tiny, *judge, *arguments, f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        main(given)
    said = capsys.readouterr().err
    assert "environment" in said or "***" in said
    assert not any(word in said for word in (SECRET, "of-the-environment", "0f1e2d3c4b5a", ":word@"))
    assert not list(tmp_path.iterdir())


def test_usual_options_are_no_secrets() -> None:
    check_no_secret(
        {
            "base_url": "https://x.openai.azure.com/openai/deployments/a?api-version=2024-10-21",
            "api_key_env": "OPENAI_API_KEY",
            "tokenizer": "a@b",
            "path": "lab:posts/pairs@1",
            "max_tokens": 5,
            "extra_body": {"prompt_cache_key": "a", "stop": "token"},
            "token": None,
        }
    )


def test_no_secret_is_in_what_a_run_leaves(
    tiny: list[str], pairs_file: str, model_dir: str, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    """The judge's key and the hub's, of a fit, an evaluation and an export."""
    keys = {"OPENAI_API_KEY": SECRET, "HF_TOKEN": "hf_" + "Ab3" * 12, "WANDB_API_KEY": "0a1b2c3d4e5f"}
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    main(["fit", *tiny, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"])
    last = newest_run(tmp_path) / "checkpoints" / "last.ckpt"
    refused = Reply(401, json.dumps({"error": {"message": f"Incorrect API key: {SECRET}"}}))
    for replies in ((refused,), ()):  # what was answered is not asked again
        with ChatServer(lambda _: "Preferred: A", replies) as server:
            judge = ["--evaluation.judge=Judge", f"--evaluation.judge.base_url={server.base_url}"]
            judge += [
                "--evaluation.judge.model=a",
                "--evaluation.reward=LabReward",
                "--evaluation.reward.task=lab:posts",
            ]
            judge += [f"--evaluation.judge.answers={tmp_path / str(len(replies)) / 'answers.jsonl'}"]
            data = [f"--data.test={pairs_file}", f"--model.reference.path={model_dir}", "--evaluation.kl_prompts=0"]
            command = ["test", *tiny, *data, *judge, f"--ckpt_path={last}", f"--trainer.default_root_dir={tmp_path}"]
            with nullcontext() if not replies else pytest.raises(SystemExit):
                main(command)
            assert server.headers[-1]["Authorization"] == f"Bearer {SECRET}"
    main(["export", f"--ckpt_path={last}", f"--output_dir={tmp_path / 'exported'}"])
    printed = "".join(capfd.readouterr()).encode()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "evaluation.json", "answers.jsonl", "README.md", "last.ckpt"} <= {
        file.name for file in files
    }
    for key in keys.values():
        assert not [file for file in files if key.encode() in file.read_bytes()]
        assert key.encode() not in printed


AUDIT = Path(__file__).parent.parent / ".ci" / "audit"
FIXED = {"id": "GHSA-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"]}
AUDITED = {"name": "a", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([AUDITED, UNKNOWN], 0, "1 packages audited, 1 unknown"),
        ([AUDITED | {"vulns": [FIXED]}], 1, "a 1.0: GHSA-1 (fixed in 1.1)"),
        ([AUDITED | {"vulns": [FIXED | {"fix_versions": []}]}], 0, "not fixed yet"),
        ([UNKNOWN], 0, "skipped, as no service could be asked: Dependency not found"),
        (None, 0, "skipped, as no service could be asked: ConnectionError"),
    ],
    ids=["no vulnerability", "one that is fixed", "one that is not", "no package known", "no network"],
)
def test_the_audit_fails_where_something_can_be_done(packages: Any, status: int, said: str) -> None:
    report = "" if packages is None else json.dumps({"dependencies": packages})
    stub = f"import sys; print({report!r}); sys.exit('many lines\\nConnectionError: no such host')"
    audit = subprocess.run([sys.executable, AUDIT, sys.executable, "-c", stub], capture_output=True, text=True)
    assert (audit.returncode, audit.stderr) == (status, "")
    assert said in audit.stdout


def test_the_audit_knows_exceptions(tmp_path: Path) -> None:
    copy = tmp_path / "audit"
    copy.write_text(AUDIT.read_text().replace("] = {}", "] = {'CVE-1': 'not reached by us'}"))
    stub = f"print({json.dumps({'dependencies': [AUDITED | {'vulns': [FIXED]}]})!r})"
    audit = subprocess.run([sys.executable, copy, sys.executable, "-c", stub], capture_output=True, text=True)
    assert audit.returncode == 0
    assert "GHSA-1 (allowed: not reached by us)" in audit.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_optimizer_runs_no_code(
    tiny: list[str], trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plain values are pickles in the files of the tensors, which torch reads as any."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    fit = ["fit", *tiny, "--trainer.strategy=fsdp2", "--probe.num_prompts=0", "--trainer.limit_val_batches=0"]
    run_on_ranks([[*fit, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'stopped'}"]], size=1)
    checkpoint = newest_run(tmp_path / "stopped") / "checkpoints" / "last.ckpt"
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    commands = []
    for name in ("as it was", "changed"):
        copy = tmp_path / name
        save_in_parts(state, storage_writer=FileSystemWriter(copy, single_file_per_rank=True), no_dist=True)
        shutil.copy(checkpoint / EXTRAS, copy)
        target = f"--trainer.default_root_dir={tmp_path / 'resumed' / name}"
        commands.append([*fit, "--trainer.max_steps=2", f"--ckpt_path={copy}", target])
        state["optimizer_0"]["param_groups"][0]["lr"] = Payload(trace)
    with pytest.raises(AssertionError, match=r"error: ckpt_path: .*changed.* could run code"):
        run_on_ranks(commands, size=1)
    assert newest_run(tmp_path / "resumed" / "as it was")
    assert not (tmp_path / "resumed" / "changed" / "version_0" / "checkpoints").exists()
    assert not trace.exists()
