"""Secrets: what a user asks for is saved with each run and shown in its model card, so no option may hold one."""

import os
import re
from collections.abc import Iterator
from typing import Any

from lit_isdpo.types import InputError

_NAMES = r"(?:\w+_)?(?:api_?key|access_?key|secret_?key|subscription_?key|password|passwd|secret|credentials?)"
_NAMES += r"|(?:(?:hf|api|auth|access|bearer|session)_)?token|authorization"
SECRET_OPTION = re.compile(_NAMES, re.IGNORECASE)  # with _ for -
SECRET_PARAMETER = re.compile(rf"{_NAMES}|key|code|sig|signature", re.IGNORECASE)  # of a URL
KEEPS_SECRET = re.compile(r"\w*(?:TOKEN|API_?KEY|ACCESS_KEY|SECRET|SECRET_KEY|PASSWORD)", re.IGNORECASE)
LEAST_LENGTH = 8  # characters of what is looked for in other texts
_USER = re.compile(r"\w://[^/?#\s]*@")
_PARAMETER = re.compile(r"[?&]([\w-]+)=[^&\s]")
_ISSUED = re.compile(r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,})")  # as OpenAI and its like, and Hugging Face, issue them


def check_no_secret(options: Any, name: str = "") -> None:
    """Looks through options for what must not be saved.

    Args:
        options: mappings and lists of them, however deep.
        name: of what is there, for the message.

    Raises:
        InputError: names the option, and not what it holds.
    """
    for option, text in _texts(options, name):
        if _is_secret(option, text) or hide_secrets(text) != text:
            raise InputError(
                f"{option} holds a secret, and a run's options are saved with it; leave it to an environment variable."
            )


def hide_secrets(text: str) -> str:
    """The text without what the environment keeps, and without keys that can be told by their look."""
    for key, value in os.environ.items():
        if KEEPS_SECRET.fullmatch(key) and len(value.strip()) >= LEAST_LENGTH:
            text = text.replace(value.strip(), "***")
    return _ISSUED.sub("***", text)


def _is_secret(option: str, text: str) -> bool:
    is_named = SECRET_OPTION.fullmatch(option.rpartition(".")[2].replace("-", "_"))
    parameters = (SECRET_PARAMETER.fullmatch(name.replace("-", "_")) for name in _PARAMETER.findall(text))
    return bool((text and is_named) or any(parameters) or _USER.search(text))


def _texts(options: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text with the option that it belongs to."""
    if isinstance(options, str):
        yield name, options
    elif isinstance(options, dict | list | tuple):
        for key, value in options.items() if isinstance(options, dict) else enumerate(options):
            yield from _texts(value, f"{name}.{key}".lstrip(".") if isinstance(options, dict) else name)
