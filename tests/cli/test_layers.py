"""What later config files change is said; rows for validation and test go with their training rows."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_isdpo.cli import main
from lit_isdpo.cli.layers import changed, left_out
from tests.runs import read_metrics
from tests.test_cli import CONFIGS, METHODS, ROOT, STUDIES, planned

REWARD = f"--config={CONFIGS / 'reward.yaml'}"
LAB = "lab:posts"
CLASS = "lit_isdpo.data.datamodule.PreferenceDataModule"


def in_force(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, Any, Any]:
    """``data.train``, ``val`` and ``test`` as the run would save them."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    data = yaml.safe_load(printed.out)["data"]["init_args"]
    return data["train"], data["val"], data["test"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a config file, and gives the flag for it."""

    def write(name: str, content: Any) -> str:
        (tmp_path / name).write_text(yaml.safe_dump(content))
        return f"--config={tmp_path / name}"

    return write


def section(**options: Any) -> dict[str, Any]:
    return {"data": {"class_path": CLASS, "init_args": options}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.train=mine.jsonl"],
        ["--data.train", "mine.jsonl"],
        ["--data.init_args.train=mine.jsonl"],
        ["--data.init_args", "{train: mine.jsonl}"],
        ["--data={train: mine.jsonl}"],
        ["--data", f"{{class_path: {CLASS}, init_args: {{train: mine.jsonl}}}}"],
        ["--data=PreferenceDataModule", "--data.train=mine.jsonl"],
        ["--config={data: {train: mine.jsonl}}"],
    ],
    ids=" ".join,
)
def test_a_flag_for_the_training_rows_leaves_out_the_files_other_rows(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_force(["fit", REWARD, *arguments], capsys) == ("mine.jsonl", None, None)
    assert in_force(["fit", f"-c{CONFIGS / 'reward.yaml'}", *arguments], capsys) == ("mine.jsonl", None, None)


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "precompute", "inspect", "plan"])
def test_every_verb_does_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_force([verb, REWARD, "--data.train=mine.jsonl"], capsys) == ("mine.jsonl", None, None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([REWARD], (LAB, LAB)),
        ([REWARD, "--data.val=v", "--data.train=mine.jsonl"], ("v", None)),
        ([REWARD, "--data.train=mine.jsonl", "--data.val=v", "--data.init_args.test", "t"], ("v", "t")),
        ([REWARD, "--data.train=mine.jsonl", "--data={val: v}"], ("v", None)),
        ([REWARD, "--data={test: t}", "--data.train=mine.jsonl"], (None, "t")),
        ([REWARD, "--data.val.path=v", "--data.train=mine.jsonl"], ("v", None)),
        (["--data.train=mine.jsonl", REWARD], (LAB, LAB)),
        ([REWARD, "--data.train+=mine.jsonl"], (LAB, LAB)),
        ([REWARD, "--data.train.split=train"], (LAB, LAB)),
        ([REWARD, "--data.train=null"], (LAB, LAB)),
        ([REWARD, "--data.batch_size=32"], (LAB, LAB)),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_a_user_names_stays_and_what_belongs_together_too(
    arguments: list[str], expected: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    val, test = in_force(["fit", *arguments], capsys)[1:]
    assert tuple(part["path"] if isinstance(part, dict) else part for part in (val, test)) == expected


def test_a_later_file_counts_as_a_flag_does(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own, both = write("own.yaml", section(train="mine")), write("both.yaml", section(train="mine", val="v"))
    flat, val = write("flat.yaml", {"data": {"train": "mine"}}), write("val.yaml", {"data": {"val": "v"}})
    for files, expected in (
        ([REWARD, own], (None, None)),
        ([REWARD, flat], (None, None)),
        ([REWARD, both], ("v", None)),
        ([both, REWARD], (LAB, LAB)),
        ([REWARD, val, own], (None, None)),
        ([REWARD, own, val], ("v", None)),
        ([REWARD, f"--config={CONFIGS / 'data' / 'nectar.yaml'}"], (None, None)),
    ):
        assert in_force(["fit", *files], capsys)[1:] == expected, files
    tldr = in_force(["fit", REWARD, f"--config={CONFIGS / 'data' / 'tldr.yaml'}"], capsys)
    assert tldr[1]["split"] == "validation"
    assert tldr[2] is None


def test_a_section_in_a_file_of_its_own(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``data`` may name one, from the command line or from a config file beside it."""
    own = write("section.yaml", section(train="mine", val="v")["data"]).removeprefix("--config=")
    outer = write("outer.yaml", {"data": "section.yaml"})
    for arguments in ([REWARD, f"--data={own}"], [REWARD, outer]):
        assert in_force(["fit", *arguments], capsys) == ("mine", "v", None)
        assert in_force(["fit", *arguments, "--data.train=other"], capsys) == ("other", None, None)
    assert [one.file for one in left_out(["fit", outer, "--data.train=x"], "fit")] == [str(tmp_path / "outer.yaml")]


def test_a_file_of_all_verbs(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    common = write("all.yaml", {"fit": section(train="a", val="v"), "test": section(train="b", test="t")})
    assert in_force([common, "fit", "--data.batch_size=2"], capsys) == ("a", "v", None)
    assert in_force([common, "fit", "--data.train=mine"], capsys) == ("mine", None, None)
    assert [one.option for one in left_out([common, "test", "--data.train=mine"], "test")] == ["data.test"]


def test_what_cannot_be_read_is_left_to_the_parser(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("data: [")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.yaml").write_text("- data")
    (tmp_path / "odd.yaml").write_text("init_args: {val: v}\n1: 2\ndata: null\n")
    for name in ("broken.yaml", "bytes.yaml", "list.yaml", "odd.yaml", "nowhere.yaml", "", "x" * 5000):
        assert left_out(["fit", f"--config={tmp_path / name}", "--data.train=mine"], "fit") == []
    assert left_out(["fit", "--config"], "fit") == left_out(["fit", "--config", "-"], "fit") == []


def test_a_run_says_so_and_saves_what_was_in_force(
    tiny: list[str], pairs_file: str, tmp_path: Path, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = write("lab.yaml", section(train=LAB, val="nowhere.jsonl", test=LAB))
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", file, *tiny, "--trainer.max_steps=1", root])
    said = [line for line in caplog.messages if line.startswith("data.")]
    assert [line.split()[0] for line in said] == ["data.val", "data.test"]
    assert all(str(tmp_path / "lab.yaml") in line for line in said)
    assert "--data.val names" in said[0]
    assert read_metrics(tmp_path / "version_0")["data/val/kept"] == {0: 8}, "held out of the file of pairs"
    saved = tmp_path / "version_0" / "config.yaml"
    data = yaml.safe_load(saved.read_text())["data"]["init_args"]
    assert (data["train"], data["val"], data["test"]) == (pairs_file, None, None)
    caplog.clear()
    last = f"--ckpt_path={tmp_path / 'version_0' / 'checkpoints' / 'last.ckpt'}"
    main(["fit", f"--config={saved}", last, "--trainer.max_steps=2", root])
    assert not [line for line in caplog.messages if line.startswith("data.")]
    assert not [line for line in caplog.messages if "data.val" in line]


def test_no_study_loses_rows_that_its_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = [run for config in STUDIES for run in planned(config)]
    assert [run.name for run in runs if left_out(["fit", *run.arguments], "fit")] == []


CAUSAL_LM = CONFIGS / "experiment" / "causal_lm.yaml"


def told(*arguments: str, verb: str = "fit") -> list[str]:
    return [str(change) for change in changed([verb, *arguments], verb)]


def model(**options: Any) -> dict[str, Any]:
    return {"model": {"init_args": options}}


OWN: dict[str, list[str]] = {  # what a file of a method sets besides the method
    "simpo": ["model.loss.beta"],  # its rewards are means per token, so no other method has a beta of its size
    "stopped": ["trainer.val_check_interval"],  # it stops at a validation
    "reward_model": ["model.optimizer.lr", "model.schedule.decay", "model.schedule.warmup_steps"],
}


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_file_of_a_method_changes_the_method_alone(method: Path) -> None:
    found = changed(["fit", f"--config={CAUSAL_LM}", f"--config={method}"], "fit")
    assert [change.option for change in found] == OWN.get(method.stem, [])


@pytest.mark.parametrize(
    ("method", "beta"),
    [
        ("model/is_dpo", 0.1),
        ("model/ipo", 0.1),
        ("remedy/forward_kl", 0.1),
        ("model/chi_hypo", 0.1),
        ("model/simpo", 2.0),
    ],
)
def test_methods_on_one_base_have_one_beta(method: str, beta: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CAUSAL_LM}", f"--config={CONFIGS / method}.yaml", "--print_config"])
    loss = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["loss"]
    assert loss["init_args"]["beta"] == beta


def test_what_is_said_of_layers(write: Any, tmp_path: Path) -> None:
    flags = {
        "first": write("first.yaml", model(loss={"init_args": {"beta": 0.1}}) | {"seed_everything": 1}),
        "other": write("other.yaml", {"model": {"loss": {"beta": 0.01}}, "seed_everything": 1}),
        "dotted": write("dotted.yaml", {"model.loss.beta": 0.02}),
        "again": write("again.yaml", {"model": {"loss.beta": 0.1}}),
        "text": write("text.yaml", {"model": {"loss": {"beta": "1e-1"}}}),
        "null": write("null.yaml", {"model": {"loss": {"beta": None}}}),
    }
    (tmp_path / "section.yaml").write_text("init_args: {loss: {init_args: {beta: 0.5}}}")
    flags["section"] = f"--model={tmp_path / 'section.yaml'}"
    flags["nested"] = write("nested.yaml", {"model": "section.yaml"})

    def line(file: str, value: str, before: str, has: str) -> list[str]:
        place = before if " " in before else tmp_path / before
        return [f"{tmp_path / file} sets model.loss.beta to {value} ({place} has {has})."]

    for names, expected in (
        (["first"], []),
        (["first", "other"], line("other.yaml", "0.01", "first.yaml", "0.1")),
        (["other", "first"], line("first.yaml", "0.1", "other.yaml", "0.01")),
        (["first", "dotted"], line("dotted.yaml", "0.02", "first.yaml", "0.1")),
        (["first", "again"], []),
        (["first", "text"], []),
        (["first", "other", "again"], line("again.yaml", "0.1", "other.yaml", "0.01")),
        (["first", "null"], line("null.yaml", "null", "first.yaml", "0.1")),
        (["first", "section"], line("section.yaml", "0.5", "first.yaml", "0.1")),
        (["section", "first"], line("first.yaml", "0.1", "section.yaml", "0.5")),
        (["first", "nested"], line("nested.yaml", "0.5", "first.yaml", "0.1")),
        (["--model.loss.beta=0.3", "first"], line("first.yaml", "0.1", "the command line", "0.3")),
        (["first", "--model.loss.beta=0.3"], []),
        (["first", "other", "--model.loss.beta=0.3"], []),
        (["first", "other", "--model.loss={class_path: DPOLoss, init_args: {beta: 0.3}}"], []),
        (["first", "other", "--model.loss=DPOLoss"], line("other.yaml", "0.01", "first.yaml", "0.1")),
    ):
        assert told(*(flags.get(name, name) for name in names)) == expected, names


def test_classes_and_rows_need_no_line_and_long_values_are_cut(write: Any) -> None:
    loss = "lit_isdpo.objective.losses"
    first = write("a.yaml", model(loss={"class_path": f"{loss}.DPOLoss"}) | section(train="a", val="v", val_size=0.1))
    other = write("b.yaml", model(loss={"class_path": f"{loss}.IPOLoss"}) | section(train=["b"], val="w", val_size=0.2))
    (line,) = told(first, other)
    assert "data.val_size to 0.2" in line
    long = {"trainer": {"plugins": [f"number {number}" for number in range(99)]}}
    (line,) = told(write("c.yaml", {"trainer": {"plugins": []}}), write("d.yaml", long))
    assert 'sets trainer.plugins to ["number 0", "number 1", ' in line
    assert len(line.partition(" to ")[2].partition(" (")[0]) <= 60


def test_a_run_says_which_values_change(
    tiny: list[str], tmp_path: Path, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = (write(f"{beta}.yaml", {"model": {"loss": {"beta": beta}}}) for beta in (0.1, 0.01))
    main(["validate", first, other, *tiny, f"--trainer.default_root_dir={tmp_path}"])
    (said,) = (line for line in caplog.messages if "model.loss.beta" in line)
    assert said == f"{tmp_path / '0.01.yaml'} sets model.loss.beta to 0.01 ({tmp_path / '0.1.yaml'} has 0.1)."


def test_every_file_of_all_verbs_has_its_own_values(write: Any) -> None:
    common = write("all.yaml", {"fit": model(loss={"beta": 0.1}), "test": model(loss={"beta": 0.2})})
    own = write("own.yaml", model(loss={"beta": 0.2}))
    for verb, number in (("fit", 1), ("test", 0)):
        assert len(changed([common, verb, own], verb)) == number
