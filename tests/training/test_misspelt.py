"""What is said of a mistake names the flag, and what it may have been meant to be."""

import pytest

from lit_isdpo.training.misspelt import explain_option


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        (
            "Option 'tran' is not accepted",
            ["fit", "--data.tran", "x"],
            "--data.tran: Option 'tran' is not accepted; did you mean train?",
        ),
        (
            'Parser key "beta": Expected a float',
            ["fit", "--model.beta.x=1", "--model.loss.beta=a"],
            '--model.loss.beta: Parser key "beta": Expected a float',
        ),
        ('Parser key "trainer.max_steps": no', ["fit", "--config", "x"], 'Parser key "trainer.max_steps": no'),
        (
            "argument subcommand: invalid choice: 'train' (choose from 'fit')",
            ["train"],
            "argument subcommand: invalid choice: 'train' (choose from 'export', 'study', 'fit')",
        ),
        (
            "the following arguments are required: reward",
            ["fit", "--model=OnlineModule"],
            "reward: a reward (LabReward, RewardModel or a class of yours) is missing, and has no default",
        ),
        ("something else", [], "something else"),
    ],
)
def test_messages(message: str, arguments: list[str], expected: str) -> None:
    assert explain_option(message, arguments) == expected


def test_the_classes_of_a_kind_are_named() -> None:
    message = 'Parser key "weighting": - Expected a path - Expected a dot import path string: IS'
    said = explain_option(message, ["fit", "--model.weighting=IS"])
    assert said.startswith("--model.weighting: 'IS' is no file and no class; known are ")
    assert "ImportanceWeighting" in said
    assert "PairWeighting" not in said
