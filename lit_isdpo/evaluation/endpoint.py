"""An OpenAI-compatible endpoint, asked until it answers, and the secrets that it needs.

The options that a user asks for are saved with each run and shown in its model card, so no option may hold a secret.
"""

import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, Self

import httpx2

from lit_isdpo.types import InputError

FIRST_WAIT_S = 1.0  # before the second attempt; each later wait may be twice as long
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is taken to be down
TRANSIENT = {408, 409, 425, 429}  # and all from 500: the same request may be answered later
QUOTED_LENGTH = 300  # characters of a server's own words in a message

_NAMES = r"(?:\w+_)?(?:api_?key|access_?key|secret_?key|subscription_?key|password|passwd|secret|credentials?)"
_NAMES += r"|(?:(?:hf|api|auth|access|bearer|session)_)?token|authorization"
SECRET_OPTION = re.compile(_NAMES, re.IGNORECASE)  # with _ for -
SECRET_PARAMETER = re.compile(rf"{_NAMES}|key|code|sig|signature", re.IGNORECASE)  # of a URL
KEEPS_SECRET = re.compile(r"\w*(?:TOKEN|API_?KEY|ACCESS_KEY|SECRET|SECRET_KEY|PASSWORD)", re.IGNORECASE)
LEAST_LENGTH = 8  # characters of what is looked for in other texts
_USER = re.compile(r"\w://[^/?#\s]*@")
_PARAMETER = re.compile(r"[?&]([\w-]+)=[^&\s]")
_ISSUED = re.compile(r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,})")  # as OpenAI and its like, and Hugging Face, issue them


class NoAnswerError(Exception):
    """One question stayed without an answer, after all attempts; the message says what came instead."""


class RefusedError(NoAnswerError):
    """The endpoint works but will not answer this question, however often it is asked: too long, say, or filtered."""


class StoppedError(Exception):
    """A question was dropped, as the endpoint has been stopped."""


class Endpoint:
    """An address and a key. Inside ``with``, questions can be asked from several threads.

    Args:
        base_url: up to ``/chat/completions``, without that.
        api_key_env: the environment variable that holds the key; ``None`` sends none.
        timeout_s: seconds that the server may keep silent.
        max_attempts: requests a question.

    Raises:
        InputError: the address cannot be one, or there is no key.
    """

    def __init__(self, base_url: str, *, api_key_env: str | None, timeout_s: float, max_attempts: int) -> None:
        url = _parse_url(base_url)
        self.base_url = str(url.copy_with(query=None))  # to be shown
        self._url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
        self._api_key_env, self._api_key = api_key_env, _read_key(api_key_env, url)
        self._timeout_s, self._max_attempts = timeout_s, max_attempts
        self._jitter = random.Random()  # not the global one: what the run draws must not depend on faults of a network

    def __enter__(self) -> Self:
        self._stopped = Event()
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        # No limit of connections but the caller's threads.
        self._client = httpx2.Client(headers=headers, timeout=self._timeout_s, limits=httpx2.Limits())
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """Drops all questions, those that wait for another attempt too; a request under way is still answered."""
        self._stopped.set()

    def ask(self, request: Mapping[str, Any]) -> str:
        """The answer's text, which may be empty.

        Args:
            request: the body, with ``model`` and ``messages``.

        Raises:
            InputError: the key, the model or the address is wrong, so that no question would be answered.
            RefusedError: this question is not answered.
            NoAnswerError: no attempt was answered.
            StoppedError: the endpoint was stopped, or has stopped itself with one of its ``InputError``.
        """
        body = json.dumps(request)  # ASCII: half a surrogate pair, which broken texts hold, has no UTF-8
        fault, wait_s = "", 0.0
        for attempt in range(self._max_attempts):
            if self._stopped.wait(wait_s):
                raise StoppedError
            wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * self._jitter.uniform(0.5, 1.0)
            try:
                response = self._client.post(self._url, content=body)
            except httpx2.RequestError as error:
                fault = self._quotable(f"{type(error).__name__}: {error}")
                continue
            if response.is_success:
                text = _text(response)
                if text is not None:
                    return text
                fault = f"{response.status_code} without a choice: {self._words(response)}"
            elif response.status_code in TRANSIENT or response.status_code >= 500:
                fault = f"{response.status_code}: {self._words(response)}"
                asked_s = retry_after_s(response.headers.get("Retry-After"), now=datetime.now(UTC))
                if asked_s > LONGEST_RETRY_AFTER_S:
                    raise NoAnswerError(f"{fault} (try again in {asked_s:.0f} s)")
                wait_s = max(wait_s, asked_s)
            else:
                refusal = self._refusal(response, str(request["model"]))
                if isinstance(refusal, InputError):
                    self.stop()  # here, as the other threads would ask on until the caller hears of it
                raise refusal
        raise NoAnswerError(f"{fault} ({self._max_attempts} attempts)")

    def _refusal(self, response: httpx2.Response, model: str) -> InputError | RefusedError:
        """What a status means that no further attempt would change."""
        status, words = response.status_code, f"{response.status_code}: {self._words(response)}"
        if status in (401, 403):
            if self._api_key is None:
                return InputError(
                    f"judge.api_key_env: {self.base_url} wants a key, and none was sent; put it into an environment "
                    f"variable and name that ({words})."
                )
            return InputError(
                f"judge.api_key_env: {self.base_url} does not accept the key in {self._api_key_env} for the model "
                f"{model!r} ({words})."
            )
        if status == 404:
            return InputError(
                f"judge.base_url or judge.model: there is no model {model!r} at {self.base_url} ({words})."
            )
        if status < 400 or status == 405:
            return InputError(
                f"judge.base_url: {self.base_url} is not where chat completions are asked for; most addresses end in "
                f"/v1 ({words})."
            )
        return RefusedError(words)

    def _words(self, response: httpx2.Response) -> str:
        """The server's own words, as far as they can be quoted."""
        try:
            body = response.json()
        except ValueError:
            return self._quotable(response.text or response.reason_phrase)
        found = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or found
        return self._quotable(str(found))

    def _quotable(self, words: str) -> str:
        """One short line without the key, which some servers send back."""
        hidden = words if self._api_key is None else words.replace(self._api_key, "***")
        return " ".join(hidden.split())[:QUOTED_LENGTH]


def retry_after_s(value: str | None, *, now: datetime) -> float:
    """Seconds that a ``Retry-After`` header asks for, 0 where there is none or it cannot be read (RFC 9110, 10.2.3).

    >>> now = datetime(2025, 1, 1, 12, 0, 0, tzinfo=UTC)
    >>> [retry_after_s(value, now=now) for value in ("2", "Wed, 01 Jan 2025 12:00:30 GMT", "soon", None)]
    [2.0, 30.0, 0.0, 0.0]
    """
    if value is None:
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError):
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())
    return 0.0


def _text(response: httpx2.Response) -> str | None:
    """The first choice's text; ``None`` where the body is no chat completion.

    A choice whose text is null (filtered, or all tokens went into reasoning) is an answer that says nothing.
    """
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else "" if text is None else None


def _parse_url(base_url: str) -> httpx2.URL:
    check_no_secret(base_url, "judge.base_url")
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise InputError(f"judge.base_url: {base_url!r} is no address: {error}.") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"judge.base_url must begin with http:// or https:// and name a host, not {base_url!r}.")
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise InputError(f"judge.base_url: leave /chat/completions off {base_url!r}; it is added.")
    return url


def _read_key(variable: str | None, url: httpx2.URL) -> str | None:
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise InputError(
            "judge.api_key_env must be the name of an environment variable, in capitals, OPENAI_API_KEY say, and not "
            "the key itself."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        if url.scheme == "http":  # a server of one's own, which mostly wants none
            return None
        raise InputError(
            f"judge.api_key_env: the environment variable {variable} is not set; put the key for {url.host} there, or "
            "set judge.api_key_env to null where none is wanted."
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"judge.api_key_env: what the environment variable {variable} holds cannot be a key.")
    return key


def check_no_secret(options: Any, name: str = "") -> None:
    """Looks through options for what must not be saved.

    Args:
        options: mappings and lists of them, however deep.
        name: of what is there, for the message.

    Raises:
        InputError: names the option, and not what it holds.
    """
    for option, text in _texts(options, name):
        is_named = SECRET_OPTION.fullmatch(option.rpartition(".")[2].replace("-", "_"))
        parameters = (SECRET_PARAMETER.fullmatch(name.replace("-", "_")) for name in _PARAMETER.findall(text))
        if (text and is_named) or any(parameters) or _USER.search(text) or hide_secrets(text) != text:
            raise InputError(
                f"{option} holds a secret, and a run's options are saved with it; leave it to an environment variable."
            )


def hide_secrets(text: str) -> str:
    """The text without what the environment keeps, and without keys that can be told by their look."""
    for key, value in os.environ.items():
        if KEEPS_SECRET.fullmatch(key) and len(value.strip()) >= LEAST_LENGTH:
            text = text.replace(value.strip(), "***")
    return _ISSUED.sub("***", text)


def _texts(options: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text with the option that it belongs to."""
    if isinstance(options, str):
        yield name, options
    elif isinstance(options, dict | list | tuple):
        for key, value in options.items() if isinstance(options, dict) else enumerate(options):
            yield from _texts(value, f"{name}.{key}".lstrip(".") if isinstance(options, dict) else name)
