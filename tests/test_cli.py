"""The command line as a user meets it: verbs, files, messages."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_isdpo import __version__
from lit_isdpo.cli import main
from lit_isdpo.cli.layers import SECTIONS
from lit_isdpo.data.collation import collate_completions
from lit_isdpo.objective import losses, on_policy, remedies, weights
from lit_isdpo.objective.losses import PreferenceLoss
from lit_isdpo.objective.on_policy import OnPolicyObjective
from lit_isdpo.objective.weights import PairWeighting
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.study.grid import Run, StudyPlan, Variant
from lit_isdpo.training.strategy import FSDP2Strategy
from tests.conftest import tiny_options
from tests.runs import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit."""
    root = tmp_path_factory.mktemp("run")
    main(
        ["fit", *tiny, "--trainer.max_epochs=2", f"--trainer.default_root_dir={root}", "--checkpoint.monitor=val/loss"]
    )
    return root / "version_0"


def test_a_run_leaves_what_belongs_to_it(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model/config.json", "model/tokenizer.json"} <= names
    assert any(name.startswith("checkpoints/best-") for name in names)
    assert list(run.parent.iterdir()) == [run], "all output is in the run's folder"


def test_a_checkpoint_holds_the_policy_alone_and_loads_without_code(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all(key.startswith("policy.model.") for key in checkpoint["state_dict"])


LOGGED = (
    [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
    + [f"{group}/{side}" for group in ("logps", "logratios") for side in ("chosen", "rejected")]
    + [f"weights/{name}" for name in ("mean", "max", "ess", "clip_fraction")]
    + ["loss"]
)
SAMPLED = [f"kl/{name}{suffix}" for name in ("rao_blackwell", "k1", "k3") for suffix in ("", "_stderr")]
PERF = ["tokens_per_second", "pairs_per_second", "padding_fraction", "mfu", "peak_memory_gib"]


def test_tensorboard_has_scalars_histograms_texts_and_the_table_of_runs(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    expected = [f"{stage}/{key}" for stage in ("train", "val") for key in LOGGED]
    expected += [f"val/{key}" for key in SAMPLED] + [f"perf/{key}" for key in PERF] + ["train/grad_norm"]
    assert set(expected) <= set(tags["scalars"])
    assert {"train/log_weights", "val/log_weights"} <= set(tags["histograms"])
    assert "val/samples/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for name in (b"method", b"ImportanceWeighting x DPOLoss", b"beta", b"epsilon", b"lr", b"seed"):
        assert name in content
    steps = [event.step for event in events.Scalars("val/loss")]
    assert steps == [0, 4, 8], "a run is validated before its first step, and after each epoch of four"


def test_csv_has_the_same(run: Path) -> None:
    values = read_metrics(run)
    assert {f"{stage}/{key}" for stage in ("train", "val") for key in LOGGED} <= set(values)
    assert values["data/train/read"] == {0: 40}
    assert values["data/train/kept"] == {0: 32}
    assert values["data/val/dropped_fraction"] == {0: 0}
    assert values["val/kl/rao_blackwell"][0] == 0
    assert values["val/loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert values["train/loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert values["train/weights/ess"][0] == pytest.approx(1)


def test_other_data_than_the_labs_has_no_gold_reward_and_says_so(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["validate", *tiny, f"--trainer.default_root_dir={tmp_path}"])
    assert "no gold reward is known" in caplog.text
    assert "val/gold_reward" not in read_metrics(tmp_path / "version_0")


def test_what_needs_the_gold_reward_switches_off_by_itself(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quickstart = f"--config={ROOT / 'configs' / 'quickstart.yaml'}"
    main(["fit", quickstart, *tiny, "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}"])
    assert "No best checkpoint is kept" in caplog.text
    assert [path.name for path in (tmp_path / "version_0" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_metric_that_is_not_logged_stops_before_the_first_step(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                *tiny,
                "--trainer.max_steps=2",
                "--checkpoint.monitor=val/goldd",
                f"--trainer.default_root_dir={tmp_path}",
            ]
        )
    assert "'val/goldd' is not logged; these are: val/" in capsys.readouterr().err


def test_the_saved_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    main(["fit", f"--config={run / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}"])
    again = torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again["state_dict"], before["state_dict"], atol=0, rtol=0)


@pytest.mark.parametrize("saved", ["fit", "validate", "predict", "plan"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "precompute", "inspect", "plan"])
def test_a_config_of_one_verb_serves_every_verb(
    verb: str, saved: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own options are left out."""
    printed = []
    for each, arguments in ((saved, tiny), (verb, [f"--config={tmp_path / 'config.yaml'}"])):
        with pytest.raises(SystemExit) as end:
            main([each, *arguments, "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "config.yaml").write_text(printed[0])
    before, after = map(yaml.safe_load, printed)
    assert {key: after[key] for key in SECTIONS} == {key: before[key] for key in SECTIONS}


def test_the_config_of_a_run_from_a_checkpoint_serves_other_verbs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(whole.replace("ckpt_path: null", "ckpt_path: last.ckpt"))
    main(["plan", f"--config={tmp_path / 'config.yaml'}"])
    assert "TFLOP" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", f"--config={run / 'config.yaml'}", "--ckpt_path=last.ckpt"])
    assert "error: --ckpt_path: there is no such option" in capsys.readouterr().err


def test_an_option_of_another_verb_in_a_file_of_ones_own_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(f"{(CONFIGS / 'quickstart.yaml').read_text()}devices: 8\n")
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'own.yaml'}", "--print_config"])
    assert "error: devices: there is no such option; did you mean trainer.devices" in capsys.readouterr().err


def test_the_saved_config_keeps_the_labs_names(tiny: list[str], tmp_path: Path) -> None:
    """They mean the same on every machine; the folders that they stand for do not."""
    main(
        [
            "fit",
            *tiny,
            "--model.policy.path=lab:posts",
            "--trainer.max_steps=1",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    config = yaml.safe_load((tmp_path / "version_0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["policy"]["path"] == "lab:posts"
    assert config["trainer"]["default_root_dir"] == str(tmp_path)


@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
def test_runs_do_not_overwrite_each_other_whatever_the_logger(logger: str, tiny: list[str], tmp_path: Path) -> None:
    options = [f"--trainer.logger={logger}", "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]
    if logger != "false":
        options.append(f"--trainer.logger.save_dir={tmp_path / 'logs'}")
    for _ in range(2):
        main(["fit", *tiny, *options])
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2


def test_export_gives_the_modules_logps(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    main(["export", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--output_dir={output}"])
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = AutoModelForCausalLM.from_config(model.config)
    trained.load_state_dict({key.removeprefix("policy.model."): value for key, value in state.items()})
    tokens = collate_completions([tokenizer.encode("POST: price good TL;DR:")], [[5, 6, 7]], pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(LogProbModel(model)(tokens).logps, LogProbModel(trained)(tokens).logps)
    card = (output / "README.md").read_text()
    assert "ImportanceWeighting" in card
    assert "| val/loss |" in card


def test_export_of_a_log_that_was_cut_or_damaged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    log = copy / "metrics.csv"
    header, *lines = log.read_text().splitlines()
    place = header.split(",").index("step")

    def at_step(line: str, step: str) -> str:
        return ",".join([*line.split(",")[:place], step, *line.split(",")[place + 1 :]])

    last = f"--ckpt_path={copy / 'checkpoints' / 'last.ckpt'}"
    log.write_text("\n".join([header, *lines, at_step(lines[-1], "1")[:-3]]))  # by a kill
    main(["export", last, f"--output_dir={tmp_path / 'whole'}"])
    assert "| val/loss |" in (tmp_path / "whole" / "README.md").read_text()
    log.write_text("\n".join([header, *(at_step(line, "x") for line in lines), ""]))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["export", last, f"--output_dir={tmp_path / 'none'}"])
    assert re.search(r"metrics\.csv' is damaged \(.*\); mend it", capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


def test_a_fit_that_has_ended_says_so(
    run: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    last = run / "checkpoints" / "last.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"]
    options = [*tiny, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *options, f"--ckpt_path={last}"])
    assert f"Nothing was left to train: the checkpoint is at optimizer step {steps}" in caplog.text
    assert "Trained for" not in capsys.readouterr().out


def test_what_is_not_trained_on_is_told(model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "english.jsonl"
    rows = [{"prompt": f"Name fruit {n}.", "chosen": f" An apple, {n}.", "rejected": " A chair."} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*tiny_options(model_dir, str(file)), "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *options])
    said = caplog.text
    assert "An epoch has 1 optimizer steps of 8 rows; 4 more rows do not fill one" in said
    assert "spells the training text nearly byte by byte" in said


def test_validate_prints_a_table_of_its_own(
    run: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["validate", *tiny, root, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    captured = capsys.readouterr()
    assert "KL(policy, reference), nats" in captured.out
    assert "Validate metric" not in captured.out  # Lightning's
    assert "No --ckpt_path" not in caplog.text
    main(["validate", *tiny, root])
    assert "No --ckpt_path is given" in caplog.text


def test_test_and_predict_on_a_checkpoint(run: Path, tiny: list[str], pairs_file: str, tmp_path: Path) -> None:
    last = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    options = [*tiny, f"--data.test={pairs_file}", last, f"--trainer.default_root_dir={tmp_path}"]
    main(["test", *options])
    assert {f"test/{key}" for key in LOGGED + SAMPLED} <= set(read_metrics(tmp_path / "version_0"))
    main(["predict", *options, "--model.sampling.max_new_tokens=5"])
    rows = [json.loads(line) for line in (tmp_path / "version_1" / "predictions.jsonl").read_text().splitlines()]
    assert [row["row_id"] for row in rows] == list(range(40))
    assert all(row["prompt"].startswith("POST:") and isinstance(row["finished"], bool) for row in rows)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--version"], __version__),
        (["--help"], "export"),
        (["fit", "--help"], "--probe.num_prompts"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert text in capsys.readouterr().out


CONFIGS = ROOT / "configs"
FSDP2 = f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"
METHODS = [file for folder in ("model", "control", "remedy") for file in sorted((CONFIGS / folder).glob("*.yaml"))]
LARGE = sorted((CONFIGS / "experiment").glob("*/*.yaml"))  # the paper's scale and larger
EXPERIMENTS = [CONFIGS / "quickstart.yaml", *sorted((CONFIGS / "experiment").glob("*.yaml"))]
STUDIES = sorted((CONFIGS / "study").glob("*.yaml"))
PAPER = CONFIGS / "study" / "paper.yaml"
OTHERS = sorted(set(CONFIGS.rglob("*.yaml")) - {*METHODS, *LARGE, *EXPERIMENTS, *STUDIES})


def test_no_config_holds_the_path_of_a_class() -> None:
    """A bare name is shorter, and stays valid when a class moves."""
    assert [file for file in CONFIGS.rglob("*.yaml") if re.search(r"\blit_isdpo\.[a-z]", file.read_text())] == []


@pytest.mark.parametrize("config", OTHERS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_other_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that take no step below."""
    text = config.read_text()
    base = [] if "trainer:" in text else [f"--config={CONFIGS / ('sft' if 'SFT' in text else 'quickstart')}.yaml"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *base, f"--config={config}", "--print_config"])
    assert end.value.code == 0
    assert "class_path" in capsys.readouterr().out


def planned(config: Path) -> list[Run]:
    """The runs of a study."""
    given = yaml.safe_load(config.read_text())
    designs, methods, prepare = (
        {name: Variant(config=value) if isinstance(value, str) else Variant(**value) for name, value in part.items()}
        for part in (given["designs"], given["methods"], given.get("prepare", {}))
    )
    grid, options = given.get("grid", {}), given.get("options", {})
    return StudyPlan(designs, methods, grid, given["seeds"], options, prepare=prepare).runs()


@pytest.mark.parametrize("config", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_planned(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = planned(config)
    assert len({run.folder for run in runs}) == len(runs) >= 24


@pytest.mark.slow
def test_every_variant_of_the_studies_parses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of each design and one of each method, by what they set."""
    monkeypatch.chdir(ROOT)
    runs = [run for config in STUDIES for run in planned(config)]
    some = {run.design: run for run in runs} | {f"{run.method} {sorted(run.settings)}": run for run in runs}
    for run in some.values():
        with pytest.raises(SystemExit) as end:
            main(["fit", *run.arguments, "--print_config"])
        assert end.value.code == 0, capsys.readouterr().err


SMALL = ["--data.val=null", "--data.num_workers=0", "--trainer.strategy=auto", "--trainer.num_nodes=1"]


def takes_a_step(arguments: list[str], folder: Path) -> None:
    options = ["--trainer.max_steps=1", f"--trainer.default_root_dir={folder}", "--checkpoint.monitor=null"]
    main(["fit", *arguments, *options])
    checkpoint = torch.load(folder / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


@pytest.mark.filterwarnings("ignore:The mean importance weight of the training pairs fell")
@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_takes_a_step(config: Path, tiny: list[str], tmp_path: Path) -> None:
    takes_a_step([f"--config={config}", *tiny], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", [*LARGE, *METHODS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_method_and_large_experiment_takes_a_step(
    config: Path, tiny: list[str], model_dir: str, tmp_path: Path
) -> None:
    others = [*SMALL] if config in LARGE else []
    if "OnlineModule" in config.read_text():
        others.append("--model.reward.task=lab:posts")  # whose words the tiny data is in
    takes_a_step([f"--config={config}", *tiny, *others, "--probe.num_prompts=0"], tmp_path)


def paper_runs() -> list[Run]:
    """Every method on the first data set, and the first method on the others."""
    runs = planned(PAPER)
    return [run for run in runs if run.design == runs[0].design or run.method == runs[0].method]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(17))
def test_every_method_and_data_set_of_the_paper_takes_a_step(
    number: int, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    runs = paper_runs()
    assert len(runs) == 17
    small = [*SMALL, "--data.test=null", "--probe.num_prompts=0"]
    takes_a_step([*runs[number].arguments, *tiny, *small], tmp_path)


OBJECTIVE = {name: cls for module in (losses, weights, remedies, on_policy) for name, cls in vars(module).items()}


def built(config: dict[str, Any]) -> Any:
    """What a ``class_path`` of a file stands for."""
    arguments = config.get("init_args", {})
    if "factors" in arguments:
        arguments = {"factors": [built(factor) for factor in arguments["factors"]]}
    elif "loss" in arguments:
        arguments = arguments | {"loss": built(arguments["loss"])}
    return OBJECTIVE[config["class_path"]](**arguments)


@pytest.mark.parametrize("config", [*LARGE, *METHODS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_loss_and_weighting_of_a_file_can_be_built(config: Path) -> None:
    model = yaml.safe_load(config.read_text())["model"]["init_args"]
    if "objective" in model:
        assert isinstance(built(model["objective"]), OnPolicyObjective)
    elif not config.stem.startswith(("sft", "reward")):
        assert isinstance(built(model["loss"]), PreferenceLoss)
        assert isinstance(built(model["weighting"]), PairWeighting)


def test_the_paper_s_runs_differ_in_their_method_and_data_only() -> None:
    """Equal batch, budget, optimizer and schedule, or a comparison says nothing."""
    study = yaml.safe_load(PAPER.read_text())
    assert "Not yet run." in PAPER.read_text()
    assert "options" not in study
    assert len(study["methods"]) == 15
    for method in study["methods"].values():
        overlay = yaml.safe_load((ROOT / (method if isinstance(method, str) else method["config"])).read_text())
        assert list(overlay) == ["model"]
        assert list(overlay["model"]["init_args"]) == ["loss", "weighting"]
    assert list(study["designs"]) == ["tldr", "hh", "ultrafeedback"]
    for name, design in study["designs"].items():
        common, data = design["config"]
        assert common == "configs/experiment/paper/preference.yaml"
        assert data == f"configs/data/{name}.yaml"
        ready = yaml.safe_load((ROOT / data).read_text())
        assert list(ready) == ["data"]
        assert ready["data"]["init_args"]["batch_size"] == 128
        own = {"data.test", "data.micro_batch_size", "model.policy.path", "probe.max_new_tokens"}
        assert set(design.get("options", {})) <= own


TLDR = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
HH = {"path": "Anthropic/hh-rlhf", "revision": "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"}
ULTRAFEEDBACK = {
    "path": "HuggingFaceH4/ultrafeedback_binarized",
    "revision": "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
}
ROWS = {
    "tldr": ({"path": TLDR, "split": "train"}, *[{"path": TLDR, "split": "validation"}] * 2),
    "hh": (HH | {"split": "train"}, HH | {"split": "test"}, None),
    "ultrafeedback": (ULTRAFEEDBACK | {"split": "train_prefs"}, None, ULTRAFEEDBACK | {"split": "test_prefs"}),
}
LIMITS = {"tldr": (640, 512, 4, 128), "hh": (640, 512, 4, 128), "ultrafeedback": (1024, 512, 2, 256)}
PAPER_LOSSES = {
    "DPO": {"beta": 0.05},
    "IS-DPO": {"beta": 0.05},
    "IPO": {"beta": 0.05, "logratio": "sum"},
    "IS-IPO": {"beta": 0.05, "logratio": "sum"},
    "SLiC": {"beta": 0.05},
    "IS-SLiC": {"beta": 0.05},
    "RPO": {"beta": 0.05, "eta": 0.5},
    "RPO, published eta": {"beta": 0.05, "eta": 0.005},
    "iterative RPO": {"beta": 0.05, "alpha": 1.0},
    "chi-PO": {"beta": 0.05, "alpha": 1.0, "gamma": 1.0, "reward_bound": 1.0},
    "R-DPO": {"beta": 0.05, "alpha": 0.01},
    "cDPO": {"beta": 0.05, "label_smoothing": 0.1},
    "robust DPO": {"beta": 0.05, "label_smoothing": 0.1},
    "WPO": {"beta": 0.05},
    "SimPO": {"beta": 2.0, "gamma_beta_ratio": 0.25},
}


def test_the_numbers_of_the_paper_s_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the parser has them, layer by layer: the losses on one data set, all else on each."""
    monkeypatch.chdir(ROOT)
    for run in paper_runs():
        with pytest.raises(SystemExit):
            main(["fit", *run.arguments, "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        assert model["loss"]["init_args"] == PAPER_LOSSES[run.method]
        assert model["weighting"].get("init_args", {}).get("epsilon") == (1.0 if run.method.startswith("IS-") else None)
        assert (data["train"], data["val"], data["test"]) == ROWS[run.design]
        limits = data["max_length"], data["max_prompt_length"], data["micro_batch_size"]
        assert (*limits, config["probe"]["max_new_tokens"]) == LIMITS[run.design]
        assert (data["batch_size"], data["truncation_mode"], data["num_workers"]) == (128, "keep_end", 2)
        assert data["val_size"] == (2000 if run.design == "ultrafeedback" else 0.05)
        sft = "runs/paper_sft_ultrachat" if run.design == "ultrafeedback" else "runs/paper_sft"
        assert model["policy"]["path"] == f"{sft}/policy"
        assert (model["policy"]["compute_dtype"], model["policy"]["gradient_checkpointing"]) == ("bfloat16", True)
        assert model["schedule"] == {"decay": "cosine", "warmup_steps": 50, "final_factor": 0.1}
        optimizer = model["optimizer"]["init_args"]
        assert (optimizer["lr"], optimizer["eps"], optimizer["weight_decay"], optimizer["fused"]) == (
            1e-6,
            1e-5,
            0,
            True,
        )
        trainer = config["trainer"]
        assert (trainer["devices"], trainer["strategy"], trainer["max_epochs"]) == (8, "fsdp2", 1)
        assert (trainer["gradient_clip_val"], trainer["log_every_n_steps"]) == (10.0, 1)
        assert (trainer["val_check_interval"], trainer["limit_val_batches"]) == (0.125, 200)
        assert (config["seed_everything"], config["probe"]["num_prompts"]) == (1, 512)
        assert config["last"]["every_n_steps"] == 100


@pytest.mark.parametrize("verb", ["plan", "test"])
def test_a_shown_run_is_a_config_of_every_verb(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["study", f"--config={PAPER}", "--show=ultrafeedback/RPO, published eta"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit) as end:
        main([verb, f"--config={tmp_path / 'run.yaml'}", "--print_config"])
    assert end.value.code == 0
    parsed, shown = yaml.safe_load(capsys.readouterr().out), yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert parsed["model"] == shown["model"]
    assert parsed["data"] == shown["data"]
    assert shown["model"]["init_args"]["loss"]["init_args"]["eta"] == 0.005
    name = "runs/paper/ultrafeedback/RPO__published_eta-beta=0.05-seed=1-"
    assert shown["trainer"]["default_root_dir"].startswith(name)


def test_the_diff_of_the_dpo_and_the_is_dpo_file_is_the_method() -> None:
    dpo, is_dpo = (
        yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text()) for name in ("dpo", "is_dpo")
    )
    del dpo["model"]["init_args"]["weighting"]
    weighting = is_dpo["model"]["init_args"].pop("weighting")
    assert dpo == is_dpo
    assert weighting == {"class_path": "ImportanceWeighting", "init_args": {"epsilon": 1.0}}


SHUFFLED = "--model.weighting=ShuffledImportanceWeighting"
PRODUCT = (
    "--model.weighting={class_path: ProductWeighting, init_args: {factors: "
    "[{class_path: WPOWeighting}, {class_path: BatchMeanImportanceWeighting}]}}"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train=nowhere.jsonl"], r"data\.train: no such file"),
        (["--data.format=poems"], r"poems"),
        (["--model.policy.path=./nowhere"], r"model\.policy\.path: no such folder"),
        (["--model.reference.path=./nowhere"], r"model\.reference\.path: no such folder"),
        (["--model.policy.chunk_size=0"], r"chunk_size must be at least 1"),
        (["--data.max_length=4096"], r"more than the model's 2048"),
        (["--ckpt_path=last"], r"no such checkpoint"),
        (["--model.loss.beta=0"], r"loss\.beta must be a finite number above 0"),
        (["--model.weighting.epsilon=.nan"], r"model\.weighting\.epsilon is nan"),
        (["--model.loss=lit_isdpo.objective.losses.IPOLoss"], r"logratio"),
        ([SHUFFLED, "--data.micro_batch_size=1"], r"micro_batch_size must be at least 2, not 1"),
        ([SHUFFLED, "--data.eval_batch_size=1"], r"eval_batch_size must be at least 2, not 1"),
        ([SHUFFLED, "--data.length_window=2"], r"length_window is 2, but model\.weighting mixes the pairs"),
        ([PRODUCT, "--data.length_window=2"], r"length_window is 2, but model\.weighting mixes the pairs"),
        (["--trainer.precision=16-mixed"], r"precision '16-mixed' is not supported"),
        (["--trainer.precision=bf16-true"], r"compute_dtype bfloat16"),
        (["--trainer.gradient_clip_algorithm=value"], r"clipped by norm"),
        (
            ["--trainer.strategy=fsdp"],
            r"strategy 'fsdp' is not supported: use .*'fsdp2' .* successor of PyTorch's older",
        ),
        (["--trainer.strategy=deepspeed"], r"trainer\.strategy 'deepspeed' is not supported: use .*'fsdp2'"),
        (["--trainer.strategy=fsdp2", "--model.policy.compile=true"], r"compile is not supported with .* fsdp2"),
        (["--trainer.strategy=FSDP2Strategy"], r"strategy 'FSDP2Strategy' is not supported: use .*'fsdp2'"),
        ([f"--trainer.strategy={FSDP2}", "--trainer.strategy.shard_size=0"], r"shard_size must be at least 1"),
        (["--trainer.accumulate_grad_batches=3"], r"accumulate_grad_batches"),
        (["--data.micro_batch_size=3"], r"micro_batch_size"),
        (["--data.batch_size=64"], r"batch_size"),
        (["--ckpt_path=nowhere.ckpt"], r"no such checkpoint"),
        (["--model.policy.init=random"], r"model\.reference\.path"),
        (["--model.loss.betta=1"], r"betta"),
        (
            ["--trainer.max_epoch=1"],
            r"max_epoch: there is no such option; did you mean --trainer\.max_epochs\?",
        ),
        (["--probe.num_prompts=-1"], r"probe\.num_prompts"),
        (["--model.sampling.top_p=0"], r"sampling\.top_p"),
        (["--model.schedule.final_factor=2"], r"schedule\.final_factor"),
        (["--checkpoint.mode=most"], r"checkpoint\.mode"),
        (["--data.max_length=0"], r"max_length"),
        (["--config=nowhere.yaml"], r"nowhere\.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", *tiny, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1", *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    line = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert re.search(message, errors), line


def test_weights_of_single_pairs_cannot_be_evaluated_shuffled(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["validate", *tiny, SHUFFLED, "--data.micro_batch_size=1", f"--trainer.default_root_dir={tmp_path}"])
    assert "data.eval_batch_size must be at least 2, not 1" in capsys.readouterr().err


def test_a_model_that_is_no_causal_language_model(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SystemExit):
        main(["fit", *tiny, "--trainer.max_steps=1", f"--model.policy.path={tmp_path / 'vit'}"])
    assert "is not a causal language model" in capsys.readouterr().err


def test_no_end_and_no_data(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((tiny, "max_epochs or max_steps"), (["--trainer.max_steps=1", tiny[0]], "data.train")):
        with pytest.raises(SystemExit):
            main(["fit", *arguments])
        assert message in capsys.readouterr().err


def test_an_empty_data_set(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit):
        main(["fit", *tiny, "--trainer.max_steps=1", f"--data.train={tmp_path / 'empty.jsonl'}"])
    assert "empty.jsonl" in capsys.readouterr().err


def test_no_such_column(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 20)
    with pytest.raises(SystemExit):
        main(["fit", *tiny, "--trainer.max_steps=1", f"--data.train={tmp_path / 'odd.jsonl'}"])
    assert "question" in capsys.readouterr().err


def test_export_refuses_what_it_cannot_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run / "checkpoints" / "last.ckpt"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(last.read_bytes()[:1000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for arguments, message in (
        ([f"--ckpt_path={tmp_path / 'none.ckpt'}", f"--output_dir={tmp_path / 'x'}"], "no such checkpoint"),
        ([f"--ckpt_path={cut}", f"--output_dir={tmp_path / 'x'}"], "is not the run's folder"),
        ([f"--ckpt_path={cut}", f"--output_dir={tmp_path / 'x'}", f"--run_dir={run}"], "cannot be read"),
        ([f"--ckpt_path={last}", f"--output_dir={tmp_path / 'full'}"], "not an empty folder"),
        ([f"--ckpt_path={run}", f"--output_dir={tmp_path / 'x'}"], "is a run's folder; name a file in it"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["export", *arguments])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
