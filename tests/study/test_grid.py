"""Which runs a study consists of, and what makes two of them the same."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lit_isdpo.study.grid import COLUMNS, Run, StudyPlan, Variant
from lit_isdpo.study.results import SOURCES
from lit_isdpo.study.runner import study
from lit_isdpo.types import InputError


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("design", "dpo", "is_dpo", "sft", "reward"):
        Path(f"{name}.yaml").write_text(f"# a head\nname: {name}\n")


def flags(run: Run) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in run.arguments)


def plan(**changes):
    given = {
        "designs": {"toy": Variant(config="design.yaml", options={"data.train": "pairs@{seed}"})},
        "methods": {"DPO": Variant(config="dpo.yaml"), "IS": Variant(config=["is_dpo.yaml"], options={"epsilon": 1})},
        "grid": {"model.loss.beta": [0.1, 1]},
        "seeds": [0, 7],
        "options": {},
    }
    return StudyPlan(**{**given, **changes}).runs()


@pytest.mark.usefixtures("files")
def test_every_combination_seed_by_seed() -> None:
    runs = plan()
    assert [(run.seed, run.method, run.settings["beta"]) for run in runs] == [
        (seed, method, beta) for seed in (0, 7) for method in ("DPO", "IS") for beta in (0.1, 1)
    ]
    assert runs[7].arguments == (
        "--config=design.yaml",
        "--config=is_dpo.yaml",
        "--data.train=pairs@7",
        "--epsilon=1",
        "--model.loss.beta=1",
        "--seed_everything=7",
    )
    assert runs[7].name == "toy, IS, beta 1, seed 7"
    assert runs[7].folder.startswith("toy/IS-beta=1-seed=7-")
    assert len({run.folder for run in runs}) == 8


@pytest.mark.usefixtures("files")
def test_later_options_win_and_values_are_yaml() -> None:
    design = Variant(config="design.yaml", options={"a": 2, "b": {"path": "x@{seed}", "first": 5}, "c": math.inf})
    method = Variant(config="dpo.yaml", options={"a": 3, "flag": True})
    (run,) = plan(designs={"toy": design}, methods={"DPO": method}, grid={}, seeds=[4], options={"a": 1, "z": None})
    assert run.arguments[2:] == (
        "--a=3",
        "--z=null",
        "--b={first: 5, path: x@4}",
        "--c=.inf",
        "--flag=true",
        "--seed_everything=4",
    )


@pytest.mark.usefixtures("files")
def test_a_method_without_a_setting_runs_once() -> None:
    methods = {"DPO": Variant(config="dpo.yaml", without=["epsilon"]), "IS": Variant(config="is_dpo.yaml")}
    runs = plan(methods=methods, grid={"epsilon": [0.5, 1.0]}, seeds=[0])
    assert [(run.method, dict(run.settings)) for run in runs] == [
        ("DPO", {}),
        ("IS", {"epsilon": 0.5}),
        ("IS", {"epsilon": 1.0}),
    ]


@pytest.mark.usefixtures("files")
def test_the_same_run_has_the_same_folder_in_another_study() -> None:
    one = {run.folder for run in plan(seeds=[0])}
    assert one < {run.folder for run in plan(seeds=[0, 1, 2])}
    Path("dpo.yaml").write_text("# another head\nname:   dpo\n")
    assert {run.folder for run in plan(seeds=[0])} == one
    Path("dpo.yaml").write_text("name: another\n")
    assert len({run.folder for run in plan(seeds=[0])} & one) == 2
    assert not {run.folder for run in plan(seeds=[0], options={"trainer.max_epochs": 1})} & one


@pytest.mark.usefixtures("files")
def test_short_names_that_clash_are_written_out() -> None:
    (run,) = plan(methods={"DPO": Variant()}, grid={"a.eps": [1], "b.eps": [2], "c.lr": [3]}, seeds=[0])
    assert run.settings == {"a.eps": 1, "b.eps": 2, "lr": 3}


@pytest.mark.usefixtures("files")
def test_a_setting_has_no_name_that_the_tables_have_already() -> None:
    assert set(SOURCES) < COLUMNS
    (run,) = plan(methods={"DPO": Variant()}, grid={"model.loss": ["dpo"], "probe.seed": [1]}, seeds=[0])
    assert run.settings == {"model.loss": "dpo", "probe.seed": 1}


@pytest.mark.usefixtures("files")
def test_settings_are_values_that_tables_group_by() -> None:
    values = [None, 1e-8, "linear", True, [0.9, 0.95], {"path": "a"}]
    runs = plan(methods={"DPO": Variant()}, grid={"a.b": values}, seeds=[0])
    assert [run.settings["b"] for run in runs] == ["null", 1e-8, "linear", True, "[0.9, 0.95]", '{"path": "a"}']
    assert [run.arguments[-2] for run in runs][3:] == ["--a.b=true", "--a.b=[0.9, 0.95]", "--a.b={path: a}"]


@pytest.mark.usefixtures("files")
def test_a_method_without_a_setting_takes_it_from_the_options() -> None:
    methods = {"DPO": Variant(without=["eps"], options={"eps": 3}), "IS": Variant()}
    first, *_ = plan(methods=methods, grid={"eps": [1, 2]}, seeds=[0], options={"eps": 4})
    assert "--eps=3" in first.arguments


REWARD = {"class_path": "RewardModel", "init_args": {"path": "{reward model}", "seeds": ["{seed}", 1, "a/{foo}"]}}


def prepared(**changes) -> list[Run]:
    """DPO needs nothing; RLOO a reward model, which is made of an SFT model."""
    given = {
        "methods": {
            "DPO": Variant(config="dpo.yaml"),
            "RLOO": Variant(config="is_dpo.yaml", options={"reward": REWARD}),
        },
        "prepare": {
            "sft": Variant(config="sft.yaml", options={"data.train": "texts@{seed}"}),
            "reward model": Variant(config=["reward.yaml"], options={"backbone": "{sft}"}),
        },
        "root": Path("runs"),
    }
    return plan(**{**given, **changes})


@pytest.mark.usefixtures("files")
def test_a_mention_is_the_folder_of_what_was_prepared_for_the_design_and_the_seed() -> None:
    runs = prepared(options={"z": 1})
    assert [run.method for run in runs] == ["DPO", "DPO", "RLOO", "RLOO"] * 2
    assert not any(run.needs or run.exports for run in runs if run.method == "DPO")
    for run in (run for run in runs if run.method == "RLOO"):
        (reward,) = run.needs
        (sft,) = reward.needs
        assert (reward.design, reward.method, reward.seed, reward.settings) == ("toy", "reward model", run.seed, {})
        assert reward.exports
        assert sft.exports
        assert not run.exports
        folder = Path("runs").absolute() / reward.folder / "exported"
        assert yaml.safe_load(flags(run)["reward"]) == {
            "class_path": "RewardModel",
            "init_args": {"path": str(folder), "seeds": [str(run.seed), 1, "a/{foo}"]},
        }
        assert reward.arguments == (
            "--config=design.yaml",
            "--config=reward.yaml",
            "--z=1",
            f"--data.train=pairs@{run.seed}",
            f"--backbone={Path('runs').absolute() / sft.folder / 'exported'}",
            f"--seed_everything={run.seed}",
        )
        assert sft.folder.startswith(f"toy/sft-seed={run.seed}-")
        assert reward.folder.startswith(f"toy/reward_model-seed={run.seed}-")
    assert len({run.needs[0].folder for run in runs if run.needs}) == 2  # a seed's runs share it


@pytest.mark.usefixtures("files")
def test_a_designs_or_the_studys_options_may_mention_too_and_the_last_one_counts() -> None:
    sft = Variant(options={"policy": "init"})
    for place in ({"options": {"policy": "{sft}"}}, {"designs": {"toy": Variant(options={"policy": "{sft}"})}}):
        methods = {"DPO": Variant(), "own": Variant(options={"policy": "lab"})}
        dpo, own = plan(**place, methods=methods, prepare={"sft": sft}, grid={}, seeds=[3])
        assert [need.method for need in dpo.needs] == ["sft"]
        assert "--policy=init" in dpo.needs[0].arguments
        assert own.needs == ()


@pytest.mark.usefixtures("files")
def test_only_what_is_mentioned_is_prepared() -> None:
    designs = {"a": Variant(options={"policy": "{sft}"}), "b": Variant()}
    runs = plan(designs=designs, methods={"DPO": Variant()}, prepare={"sft": Variant(options={"policy": "init"})})
    assert {(run.design, bool(run.needs)) for run in runs} == {("a", True), ("b", False)}


@pytest.mark.usefixtures("files")
def test_a_changed_preparation_gives_new_folders_to_the_runs_that_build_upon_it() -> None:
    def folders(runs: list[Run], method: str) -> set[str]:
        return {run.folder for run in runs if run.method == method}

    before = prepared()
    assert folders(before, "DPO") == folders(plan(), "DPO")
    Path("sft.yaml").write_text("name: another\n")  # the RLOO runs mention it only by way of the reward model
    after = prepared()
    assert folders(after, "DPO") == folders(before, "DPO")
    assert not folders(after, "RLOO") & folders(before, "RLOO")
    elsewhere = prepared(root=Path("/elsewhere"))
    assert folders(elsewhere, "RLOO") == folders(after, "RLOO")
    assert "--backbone=/elsewhere/toy/sft-" in " ".join(elsewhere[-1].needs[0].arguments)


@pytest.mark.usefixtures("files")
def test_folders_have_the_names_that_they_had_before_there_were_preparations() -> None:
    (run,) = plan(methods={"DPO": Variant(config="dpo.yaml", options={"a": {"b": "x@{seed}"}})}, grid={}, seeds=[1])
    assert run.folder == "toy/DPO-seed=1-d3f2f600"


@pytest.mark.usefixtures("files")
def test_a_preparation_is_no_run_of_a_method_with_the_same_options() -> None:
    methods = {"sft": Variant(), "DPO": Variant(options={"policy": "{sft}"})}
    sft, dpo = plan(methods=methods, prepare={"sft": Variant()}, grid={}, seeds=[0])
    assert replace(sft, digest="", exports=True) == replace(dpo.needs[0], digest="")
    assert sft.folder != dpo.needs[0].folder


@pytest.mark.usefixtures("files")
def test_a_folder_that_looks_like_a_mention_is_left_as_it_is() -> None:
    method = Variant(options={"a": "{sft}", "b": {"path": "{sft}"}})
    (run,) = plan(methods={"DPO": method}, prepare={"sft": Variant()}, grid={}, seeds=[0], root=Path("/{seed} #{sft}"))
    folder = f"/{{seed}} #{{sft}}/{run.needs[0].folder}/exported"
    assert flags(run)["a"] == folder
    assert yaml.safe_load(flags(run)["b"]) == {"path": folder}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", ["sft", "reward model", "SFT, long"])
def test_a_mention_without_quotes_is_one_too(name: str) -> None:
    """YAML reads it as a mapping, and so does jsonargparse where a name has a space."""
    options = yaml.safe_load(f"{{a: {{{name}}}, b: [{{{name}}}]}}")
    assert options != {"a": f"{{{name}}}", "b": [f"{{{name}}}"]}
    (run,) = plan(methods={"DPO": Variant(options=options)}, prepare={name: Variant()}, grid={}, seeds=[0])
    folder = str(Path.cwd() / run.needs[0].folder / "exported")
    assert flags(run)["a"] == folder
    assert yaml.safe_load(flags(run)["b"]) == [folder]


@pytest.mark.parametrize("name", ["sft", "reward model"])
def test_the_command_line_leaves_options_as_they_are(name: str) -> None:
    """It neither builds what has a class_path nor reads a value otherwise than before."""
    reward = {"class_path": "lit_isdpo.evaluation.rewards.RewardModel", "init_args": {"path": f"{{{name}}}"}}
    given = {"reward": reward, "policy": f"{{{name}}}", "a": "3", "b": [1, "2"], "c": None}
    variant = {"DPO": {"config": "x.yaml", "options": given}}
    parser = ArgumentParser()
    parser.add_function_arguments(study)
    config = {"title": "x", "output_dir": "x", "designs": variant, "methods": variant, "seeds": [0], "options": given}
    parsed = parser.instantiate_classes(parser.parse_string(yaml.safe_dump({**config, "prepare": {name: "x.yaml"}})))
    assert parsed.prepare == {name: "x.yaml"}
    for options in (parsed.options, parsed.methods["DPO"].options):
        assert options["reward"] == reward
        assert options["policy"] in (f"{{{name}}}", {name: None})
        assert (options["a"], options["b"], options["c"]) == (3, [1, "2"], None)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prepare": {"seed": Variant()}}, r"prepare: \{seed\} stands for the run's seed already"),
        ({"prepare": {"sft": Variant(without=["model.loss.beta"])}}, "prepare.sft.without: a preparation has no flag"),
        ({"prepare": {"sft": Variant(options={"seed_everything": 1})}}, "prepare.sft.options: seed_everything is each"),
        ({"prepare": {"sft": Variant(config="none.yaml")}}, "cannot read 'none.yaml'"),
        (
            {"prepare": {"reward model": Variant(), "sft": Variant()}},
            r"no run builds upon \['sft'\]; mention \{sft\} in",
        ),
        (
            {"prepare": {"reward model": Variant(options={"a": ["x/{reward model}"]})}},
            r"prepare.reward model: its options, with those of 'toy' and the study, mention \{reward model\}; a prep",
        ),
        (
            {"prepare": {"reward model": Variant(options={"a": "{sft}"}), "sft": Variant()}},
            r"prepare.reward model: .* mention \{sft\}; a preparation can build upon those before it",
        ),
        (
            {"designs": {"toy: x": Variant()}},
            r"no option can be given the folder .*runs/toy: x/sft-.*, as ': ' is in its",
        ),
        (
            {"root": Path("my: runs")},
            r"no option can be given the folder .*/my: runs/toy/sft-.*; name runs_dir and the des",
        ),
        ({"options": {"reward": "{reward model}"}}, r"prepare.sft: .* mention \{reward model\}; a preparation can"),
    ],
)
def test_preparations_that_cannot_be_planned(changes, message) -> None:
    if "options" in changes:  # the SFT model is made first, and its options have what all options have
        changes["methods"] = {"DPO": Variant(options={"policy": "{sft}"})}
    with pytest.raises(InputError, match=message):
        prepared(**changes)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"designs": {}}, "designs: a study needs at least one"),
        ({"seeds": []}, "seeds: a study needs at least one"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"grid": {"beta": []}}, "grid: beta has no values"),
        ({"methods": {"DPO": Variant(without=["beta"])}}, r"methods.DPO.without: \['beta'\] is not in the grid"),
        ({"methods": {"DPO": Variant(config="none.yaml")}}, "cannot read 'none.yaml'"),
        ({"grid": {"epsilon": [1]}}, r"methods.IS.options: \['epsilon'\] is in the grid too"),
        ({"grid": {"data.train": ["a"]}}, r"designs.toy.options: \['data.train'\] is in the grid too"),
        ({"grid": {"lr": [1]}, "options": {"lr": 1}}, r"options: \['lr'\] is in the grid too"),
        ({"options": {"seed_everything": 1}}, "options: seed_everything is each run's own"),
    ],
)
def test_what_cannot_be_planned(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        plan(**changes)
