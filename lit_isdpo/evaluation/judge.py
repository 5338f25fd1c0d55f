"""Which of two responses a language model prefers: pairs of responses, judged over an OpenAI-compatible endpoint.

A judge has a taste for places: many prefer whatever is shown first. So each pair is asked about twice, once in each
order, and its score is the mean of the two answers:

    first shown first    first shown second    score
    wins                 wins                  1
    wins                 ties                  0.75
    wins                 loses                 0.5   the judge saw the place, not the response
    ties                 ties                  0.5
    loses                ties                  0.25
    loses                loses                 0
    no verdict in either order                 NaN   one order alone would measure the place as well

``template: tldr`` and ``dialogue`` follow the GPT-4 evaluations of DPO (arXiv 2305.18290, appendix C.2) in what they
ask for: the summary with the most important points and nothing unimportant, precise and concise (its prompt "C", that
of the paper's main results), or the more helpful response; a sentence of comparison before the choice; A or B on a line
of its own. The words are ours, and the paper asked once, in random order. Neither template offers a tie; one that a
judge answers all the same is counted, and a template of yours may offer it.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from math import isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from lit_isdpo.data.tokenization import transcript
from lit_isdpo.evaluation.endpoint import Endpoint, NoAnswerError, RefusedError, StoppedError
from lit_isdpo.evaluation.store import Answers
from lit_isdpo.types import InputError, Prompt, check_least

TEMPLATES = Path(__file__).parent / "judge_prompts"
PLACEHOLDERS = ("{prompt}", "{response_a}", "{response_b}")
MAX_INVALID = 3  # answers without a verdict, after which a question is not asked again
MAX_UNANSWERED = 3  # questions without an answer, one after the other, after which the endpoint is taken to be down

_CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5, "equal": 0.5, "neither": 0.5, "both": 0.5}
_CHOICE = rf"(?:(?:summary|response) )?({'|'.join(_CHOICES)})"
_LABEL = r"(?:preferred|more helpful)(?: summary| response)?"

logger = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What the judge says about a pair: 1 where ``first`` is better, 0 where ``second`` is, 0.5 for a tie.

    Attributes:
        score: the mean of both orders; NaN where either has no valid answer.
        shown_first: what was answered with ``first`` in the first place; NaN where there is no valid answer.
        shown_second: what was answered with ``first`` in the second place; likewise.
    """

    score: float
    shown_first: float
    shown_second: float


class Judge:
    """Compares responses by asking a language model; see the module's docstring for what a score means.

    Every answer is appended to a file as it comes. A run that was interrupted, or is repeated, asks what is
    missing there. The base URL is no part of an answer's key: two servers that give a model the same name are
    taken to serve the same model. Interrupting waits for the requests that are under way.

    Args:
        model: the name that the endpoint knows the judge by.
        template: ``tldr``, ``dialogue``, or a text file with ``{prompt}``, ``{response_a}`` and ``{response_b}`` that
            asks for a line ``Preferred: A``, ``B`` or ``tie`` (or ``More helpful: ...``).
        base_url: of the endpoint, up to ``/chat/completions``: ``http://localhost:8000/v1`` for a local server.
        api_key_env: the environment variable that holds the key, which is neither stored nor shown. An ``http://``
            server may do without; ``null`` sends no key.
        temperature: of the judge's sampling, at least 0; ``null`` leaves it to the endpoint.
        max_tokens: of an answer; ``null`` leaves it to the endpoint. Reasoning counts.
        extra_body: more fields of the request, ``{seed: 0, reasoning_effort: low}`` say.
        concurrency: requests under way at a time.
        timeout_s: seconds that the endpoint may keep silent.
        max_attempts: requests a question, where the endpoint is busy, fails or cannot be reached; the wait between
            them doubles from a second to a minute, and is longer where the endpoint says so.
        answers: the file of answers, JSON lines.

    Attributes:
        identity: names what judged: model, template and sampling.

    Raises:
        InputError: an argument is out of range, there is no such template, or no key.
    """

    def __init__(
        self,
        model: str,
        template: str = "tldr",
        base_url: str = "https://api.openai.com/v1",
        api_key_env: str | None = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        extra_body: dict[str, Any] | None = None,
        concurrency: int = 4,
        timeout_s: float = 120.0,
        max_attempts: int = 6,
        answers: str = "runs/judge_answers.jsonl",
    ) -> None:
        for name, value in (("concurrency", concurrency), ("max_attempts", max_attempts), ("max_tokens", max_tokens)):
            check_least(f"judge.{name}", value, 1)
        if temperature is not None and not (isfinite(temperature) and temperature >= 0):
            raise InputError(f"judge.temperature must be at least 0, not {temperature}.")
        if not (isfinite(timeout_s) and timeout_s > 0):
            raise InputError(f"judge.timeout_s must be a number of seconds above 0, not {timeout_s}.")
        if not model:
            raise InputError("judge.model is empty: name the model that is to judge.")
        sampling = {"temperature": temperature, "max_tokens": max_tokens}
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        for name in extra_body or {}:
            if name in {"model", "messages", "n", "stream", *self._sampling}:
                raise InputError(f"judge.extra_body must not hold {name!r}: it is set already, or cannot be changed.")
        self._sampling |= extra_body or {}
        self._template = _read_template(template)
        try:
            digest = _digest([self._template, self._sampling])
        except (TypeError, ValueError) as error:
            raise InputError(f"judge.extra_body cannot be written as JSON: {error}.") from error
        self.identity = f"{model}/{Path(template).stem}/{digest[:8]}"
        self._model, self._concurrency, self._answers = model, concurrency, Path(answers)
        self._endpoint = Endpoint(base_url, api_key_env=api_key_env, timeout_s=timeout_s, max_attempts=max_attempts)

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        """Judges P pairs of responses, each in both orders; equal responses tie unasked.

        Raises:
            InputError: the file of answers cannot be used, or the endpoint refuses the settings or is down.
        """
        questions = [
            None if a.strip() == b.strip() else (self._request(prompt, a, b), self._request(prompt, b, a))
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        requests = {_digest(request): request for orders in questions if orders is not None for request in orders}
        answers = Answers(self._answers)
        if any(not _is_settled(answers[key]) for key in requests):
            self._ask(requests, answers)
        invalid = [answers[key][-1] for key in requests if answers[key] and isnan(_preference(answers[key]))]
        if invalid:
            logger.warning(
                "judge: %d of %d answers hold no verdict, such as %r", len(invalid), len(requests), invalid[-1][-200:]
            )
        verdicts = []
        for orders in questions:
            # What was answered is who won of A and B; second was A in the second order.
            forth, back = (0.5, 0.5) if orders is None else (_preference(answers[_digest(order)]) for order in orders)
            verdicts.append(Verdict((forth + 1 - back) / 2, forth, 1 - back))
        return verdicts

    def _request(self, prompt: Prompt, response_a: str, response_b: str) -> dict[str, Any]:
        """The body of a request. Its digest is the answer's key."""
        texts = dict(zip(PLACEHOLDERS, (_prompt_text(prompt), response_a.strip(), response_b.strip()), strict=True))
        # In one pass, as a response may itself hold "{prompt}".
        content = re.sub("|".join(map(re.escape, PLACEHOLDERS)), lambda found: texts[found.group()], self._template)
        return {"model": self._model, "messages": [{"role": "user", "content": content}], **self._sampling}

    def _ask(self, requests: Mapping[str, Mapping[str, Any]], answers: Answers) -> None:
        """Asks what has no answer yet, with a progress bar on a terminal."""
        unsettled = [key for key in requests if not _is_settled(answers[key])]
        in_touch = len(unsettled) < len(requests)  # the endpoint has answered something, now or in an earlier run
        unanswered: list[NoAnswerError] = []
        in_a_row = 0

        def settle(key: str) -> None:
            while not _is_settled(answers[key]):
                answers.add(key, requests[key], endpoint.ask(requests[key]))

        console = Console(stderr=True)
        with (
            self._endpoint as endpoint,
            ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge") as pool,
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            try:
                futures = [pool.submit(settle, key) for key in unsettled]
                for future in bar.track(as_completed(futures), len(futures), description=f"asking {self._model}"):
                    try:
                        future.result()
                    except StoppedError:
                        continue  # why is what another question says
                    except NoAnswerError as fault:
                        unanswered.append(fault)
                        # Refusals come from an endpoint that works, once it has answered anything.
                        in_a_row += not (in_touch and isinstance(fault, RefusedError))
                        if in_a_row == (MAX_UNANSWERED if in_touch else min(MAX_UNANSWERED, len(futures))):
                            raise InputError(self._why_stopped(fault)) from fault
                    else:
                        in_touch, in_a_row = True, 0
            finally:
                endpoint.stop()  # else the pool would ask all the rest before it ends
        if unanswered:
            logger.warning(
                "judge: %d of %d questions stay without an answer: %s", len(unanswered), len(requests), unanswered[-1]
            )

    def _why_stopped(self, fault: NoAnswerError) -> str:
        if isinstance(fault, RefusedError):
            return (
                f"judge: {self._endpoint.base_url} refuses the request ({fault}); what it holds is set by "
                "judge.temperature, judge.max_tokens and judge.extra_body."
            )
        return (
            f"judge.base_url: {self._endpoint.base_url} does not answer ({fault}); what it has answered so far is kept "
            f"in {str(self._answers)!r}, and the same command asks for the rest."
        )


def parse_preference(answer: str) -> float | None:
    r"""1 where the answer prefers A, 0 for B, 0.5 for a tie; ``None`` where it does not clearly say.

    The verdict is a line with its label (the choice may stand on the next line) or, without any such line, a last line
    that is nothing but the choice. Quotes, brackets and Markdown do not matter. What a model thinks aloud in
    ``<think>`` is no answer.

    >>> parse_preference('Comparison: A says more.\nPreferred: "A"')
    1.0
    >>> parse_preference("**More helpful:** Response B.")
    0.0
    >>> parse_preference("Both leave out the question.\ntie")
    0.5
    >>> parse_preference("A is better.")
    >>> parse_preference('Preferred: <"A" or "B">')
    >>> parse_preference("Preferred: A\nPreferred: B")
    """
    spoken = answer.rpartition("</think>")[2]
    if "<think>" in spoken:
        return None
    lines = [" ".join(re.findall(r"[^\W_]+|:", line)) for line in spoken.casefold().splitlines()]
    text = "\n".join(line for line in lines if line)
    found = re.findall(rf"^{_LABEL} :\s{_CHOICE}$", text, re.MULTILINE) or re.findall(rf"(?:^|\n){_CHOICE}\Z", text)
    preferences = {_CHOICES[choice] for choice in found}
    return preferences.pop() if len(preferences) == 1 else None


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Log keys of how far the judge can be trusted, without the stage prefix; NaN where there is nothing to count.

    ``judge/invalid_fraction`` of the pairs have no score, ``judge/inconsistent_fraction`` of the others got another
    verdict in the other order, and ``judge/first_place_win_rate`` is how often the response shown first won (0.5: the
    judge does not mind places).
    """
    score, shown_first, shown_second = torch.tensor(verdicts, dtype=torch.float64).reshape(-1, 3).unbind(dim=1)
    valid = ~score.isnan()
    values = {
        "judge/invalid_fraction": ~valid,
        "judge/inconsistent_fraction": (shown_first != shown_second)[valid],
        "judge/first_place_win_rate": ((shown_first + 1 - shown_second) / 2)[valid],
    }
    return {key: value.double().mean().item() for key, value in values.items()}


def _preference(answers: Sequence[str]) -> float:
    """The first one that an answer gives; NaN where none does."""
    return next((found for found in map(parse_preference, answers) if found is not None), float("nan"))


def _is_settled(answers: Sequence[str]) -> bool:
    return len(answers) >= MAX_INVALID or not isnan(_preference(answers))


def _prompt_text(prompt: Prompt) -> str:
    """A prompt as the judge reads it: the turn alone where there is one, else a transcript."""
    if isinstance(prompt, str):
        return prompt.strip()
    if [turn["role"] for turn in prompt] == ["user"]:
        return prompt[0]["content"].strip()
    return transcript(prompt).removesuffix("\n\nAssistant:").strip()


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_template(template: str) -> str:
    shipped = TEMPLATES / f"{template}.txt"
    file = shipped if template == Path(template).name and shipped.is_file() else Path(template)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.txt")))
        raise InputError(f"judge.template: {template!r} is neither one of {names} nor a readable text file.") from error
    if missing := [placeholder for placeholder in PLACEHOLDERS if placeholder not in text]:
        raise InputError(f"judge.template: {template!r} has no place for {' and '.join(missing)}.")
    if not re.search(rf"{_LABEL}\W*:", text, re.IGNORECASE):
        raise InputError(
            f"judge.template: {template!r} does not ask for a line 'Preferred: ...' or 'More helpful: ...', by which a "
            "verdict is recognised."
        )
    return text.strip()
