"""Reward sources behind one interface: whatever gives a number to a prompt and a response to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lit_isdpo.data.tokenization import Prompt
from lit_isdpo.lab.folder import ENVIRONMENTS, PREFIX, environment_of
from lit_isdpo.types import InputError


class Reward(Protocol):
    """Scores responses. Sources of your own work by their import path if they have these two members."""

    @property
    def identity(self) -> str:
        """Names what scored, the same in every process and run: scores in files are keyed by it."""
        ...

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        """Scores N responses.

        Args:
            prompts: each response's prompt as the data has it, before any chat template.
            responses: text, special tokens left out.
            finished: false where the token limit cut a response.

        Returns:
            One number a response, higher is better.
        """
        ...


class LabReward(Reward):
    """The gold reward of a task of the lab.

    Args:
        task: ``lab:posts``, ``lab:verbosity`` or ``lab:length``.

    Raises:
        InputError: the lab has no such task; when called: a prompt is not one of the task's.
    """

    def __init__(self, task: str) -> None:
        name = task.removeprefix(PREFIX)
        if name not in ENVIRONMENTS:
            known = ", ".join(f"{PREFIX}{name}" for name in ENVIRONMENTS)
            raise InputError(f"reward.task: the lab has no task {task!r}; it has {known}.")
        self._name, self._environment = name, ENVIRONMENTS[name]

    @classmethod
    def for_folder(cls, folder: Path) -> "LabReward | None":
        """The gold reward that belongs to a data folder, or ``None`` if it is not one of the lab's."""
        name = environment_of(folder)
        return None if name is None else cls(name)

    @property
    def identity(self) -> str:
        """The task and the format of its files, which changes with the reward."""
        return f"{PREFIX}{self._name} format {self._environment.format}"

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        """Scores responses to the task's own prompts, which are text."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise InputError(f"The prompts of {PREFIX}{self._name} are text; its reward cannot read a conversation.")
        return self._environment.gold_reward(texts, responses, finished)
