"""What the parser says of a mistake, in the user's own words."""

import difflib
import inspect
import re
from collections.abc import Sequence

from lightning.pytorch import Trainer

from lit_isdpo.data.datamodule import PreferenceDataModule
from lit_isdpo.evaluation import rewards
from lit_isdpo.objective import losses, on_policy, remedies, weights
from lit_isdpo.training.evaluation import Evaluation
from lit_isdpo.training.online import OnlineModule
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.probe import SamplingProbe
from lit_isdpo.training.reward import RewardModule

_CLASSES = (PreferenceModule, OnlineModule, RewardModule, PreferenceDataModule, SamplingProbe, Evaluation, Trainer)
_KINDS: dict[str, list[str]] = {
    name: list(
        dict.fromkeys(
            key
            for module in modules
            for key, cls in vars(module).items()
            if inspect.isclass(cls) and base in inspect.getmro(cls)[1:]
        )
    )
    for name, base, modules in (
        ("loss", losses.PreferenceLoss, (losses, remedies)),
        ("weighting", weights.PairWeighting, (weights, remedies)),
        ("objective", on_policy.OnPolicyObjective, (on_policy,)),
        ("reward", rewards.Reward, (rewards,)),
    )
}
"""The classes that go by their bare name."""
_REQUIRED = {
    "reward": "a reward (LabReward, RewardModel or a class of yours)",
    "weight": "a term's weight (of on_policy_kl, say)",
    "task": "a task of the lab (lab:posts, lab:verbosity or lab:length)",
    "loss": "a class of losses (DPOLoss, say)",
    "logratio": "IPO's kind of log-ratio (sum or mean)",
}
"""What options without a default are; the parser tells the last part of their name alone."""


def explain_option(message: str, arguments: Sequence[str]) -> str:
    """A parser's message, with the flag that it is about, and what it may have been meant to be.

    Args:
        message: in one line; of an option of ``model`` or ``data`` the parser tells the last part of its name.
        arguments: the command line.
    """
    if "invalid choice" in message and "argument subcommand" in message:
        return message.replace("(choose from ", "(choose from 'export', 'study', ")
    if missing := re.fullmatch(r"the following arguments are required: (\w+)", message):
        return f"{missing[1]}: {_REQUIRED.get(missing[1], 'it')} is missing, and has no default"
    named = re.match(r"(?:Parser key|Option) [\"'](?P<key>[\w.]+)[\"']", message)
    if named is None:
        return message
    key = named["key"]
    flags = [argument.split("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    flag = next((flag for flag in reversed(flags) if flag.endswith(f".{key}")), None)
    if flag is not None:
        message = f"--{flag}: {message}"
    last = key.rpartition(".")[2]
    if "Expected a dot import path string" in message and last in _KINDS:
        value = message.rpartition(": ")[2]
        option = flag or f"model.{last}"
        return f"--{option}: {value!r} is no file and no class; known are {', '.join(_KINDS[last])}"
    if "is not accepted" in message:
        classes = {part for cls in _CLASSES for part in inspect.getmro(cls)}
        known = {name for cls in classes for name in inspect.signature(cls).parameters}
        if close := difflib.get_close_matches(last, sorted(known - {last}), n=1):
            message += f"; did you mean {close[0]}?"
    return message
