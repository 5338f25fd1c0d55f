"""Which runs a study consists of, and what makes two of them the same."""

import math
from pathlib import Path

import pytest

from lit_isdpo.study.plan import COLUMNS, Variant, plan_runs
from lit_isdpo.study.results import SOURCES
from lit_isdpo.types import InputError


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("design", "dpo", "is_dpo"):
        Path(f"{name}.yaml").write_text(f"# a head\nname: {name}\n")


def plan(**changes):
    given = {
        "designs": {"toy": Variant(config="design.yaml", options={"data.train": "pairs@{seed}"})},
        "methods": {"DPO": Variant(config="dpo.yaml"), "IS": Variant(config=["is_dpo.yaml"], options={"epsilon": 1})},
        "grid": {"model.loss.beta": [0.1, 1]},
        "seeds": [0, 7],
        "options": {},
    }
    return plan_runs(**{**given, **changes})


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
        "--b={first: 5, path: 'x@4'}",
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
