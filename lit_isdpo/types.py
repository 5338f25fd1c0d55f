"""What crosses the border of a room: the types that data, objective, policy, lab, evaluation and training share.

Shape legend: B pairs, S sequences (2B in a preference batch: chosen first, then rejected), R rows of the padded
input, T positions of a row, C positions of the longest completion, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor


class InputError(Exception):
    """The user's input (a file, a config, a model) is at fault; the message is one sentence that names the culprit.

    The command line prints it without a traceback and exits with status 2. Programming errors are ``assert``s.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; libraries write many, and the first one says what went wrong."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_least(option: str, value: float | None, least: int) -> None:
    """Raises ``InputError`` for an option's value that is below ``least``; ``None`` is not checked."""
    if value is not None and not value >= least:
        raise InputError(f"{option} must be at least {least}, not {value}.")


def check_choice(option: str, value: str | None, choices: Sequence[str | None]) -> None:
    """Raises ``InputError`` for an option's value that is none of the choices."""
    if value not in choices:
        raise InputError(f"{option} is {value!r}; known: {', '.join(filter(None, choices))}")


NEEDS_CODE = "it needs Python code that comes with it; read that, and set trust_remote_code to true if you trust it."


class Message(TypedDict):
    """One turn of a conversation, as in the Hugging Face chat format. All but ``prefix`` goes to the chat template.

    ``prefix`` marks a last turn of the assistant that is not finished: the response goes on with it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    prefix: NotRequired[bool]


class Conversation(list[Message]):
    """The turns of a conversation, with the tools that the assistant may call; it equals the list of its turns.

    Args:
        turns: one after another.
        tools: their descriptions, as the chat template takes them.
    """

    def __init__(self, turns: Iterable[Message], tools: list[dict[str, Any]] | None = None) -> None:
        super().__init__(turns)
        self.tools = tools

    @classmethod
    def like(cls, prompt: list[Message], turns: Iterable[Message]) -> "Conversation":
        """Other turns with the tools of a conversation; a plain list has none."""
        return cls(turns, prompt.tools if isinstance(prompt, Conversation) else None)


Prompt = str | list[Message]
Answer = str | Message  # a message where it holds more than text: a thought or tool calls


class PreferenceExample(NamedTuple):
    """One preference pair as text: what ``data.formats`` makes of a row.

    A ``str`` prompt is used as it stands; a list of messages is rendered with the tokenizer's chat template (or,
    without one, as a plain transcript). The behavior log-probs, if the data has them, are those of the policy that
    wrote the response: nats, summed over its tokens, EOS included. The pair's loss is multiplied with
    ``weight`` (at least 0), and its scaled preference must exceed ``margin``, both where the user names a column.
    ``changes`` says what was done to the row's text, in words.
    """

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    chosen_behavior_logps: float | None = None
    rejected_behavior_logps: float | None = None
    weight: float = 1.0
    margin: float = 0.0
    changes: tuple[str, ...] = ()


class SFTExample(NamedTuple):
    """One demonstration as text; ``changes`` as in :class:`PreferenceExample`."""

    prompt: Prompt
    completion: Answer
    changes: tuple[str, ...] = ()


class TokenizedPair(NamedTuple):
    """A pair as token ids. The prompt is one list shared by both responses, so that they cannot disagree about it.

    Between the ids and the changes are numbers, which a batch holds under the same names. ``changes`` says what was cut
    of the text, in words.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_behavior_logps: float | None = None
    rejected_behavior_logps: float | None = None
    weight: float = 1.0
    margin: float = 0.0
    changes: Sequence[str] = ()


class TokenizedExample(NamedTuple):
    """A demonstration as token ids; ``changes`` as in :class:`TokenizedPair`."""

    prompt_ids: list[int]
    completion_ids: list[int]
    changes: Sequence[str] = ()


class ProbePrompt(NamedTuple):
    """A prompt to sample responses to, and the data's own response.

    Attributes:
        prompt_ids: token ids.
        text: the prompt without special tokens.
        response: the chosen response (or the demonstration) as it was tokenized, without special tokens.
        row_id: the row that it comes from.
        source: the prompt as the data has it, before any chat template, and whole where ``prompt_ids`` were cut.
    """

    prompt_ids: list[int]
    text: str
    response: str
    row_id: int
    source: Prompt


class TokenBatch(NamedTuple):
    """Padded token ids, and where the model predicts each completion token.

    The completion fields are apart from the input's layout on purpose: a row may hold one sequence (the plain layout),
    a prompt with both of its responses, or several pairs; ``logit_positions`` says where to look.

    Attributes:
        input_ids: ``(R, T)`` int64.
        attention_mask: ``(R, T)`` bool, true at tokens, false at padding.
        position_ids: ``(R, T)`` int64.
        completion_ids: ``(S, C)`` int64, the response tokens, EOS included; 0 where masked.
        completion_mask: ``(S, C)`` bool, true at response tokens.
        logit_positions: ``(S, C)`` int64, index into the flattened ``R * T`` positions of the hidden state that
            predicts ``completion_ids``; 0 where masked.
        completion_index: ``(N,)`` int64, index into the flattened ``S * C`` places of the N response tokens. It is made
            on the host: to index with a mask on a GPU would make the host wait for the GPU.
        segment_ids: ``(R, T)`` int64 where rows hold pairs: ``3 d`` at the prompt of the row's pair number d,
            ``3 d + 1`` at its chosen and ``3 d + 2`` at its rejected response, -1 at padding. ``None`` in the plain
            layout.
        num_prompt_positions: with segments, how many positions of every row, from its beginning, are of its first
            prompt: what is attended to there needs no mask but a causal one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logit_positions: Tensor
    completion_index: Tensor
    segment_ids: Tensor | None = None
    num_prompt_positions: int = 0

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on a device. A GPU gets it while the host goes on, as Lightning moves tensors of its own."""
        moved = (
            field.to(device, non_blocking=device.type == "cuda") if isinstance(field, Tensor) else field
            for field in self
        )
        return TokenBatch(*moved)  # type: ignore[arg-type]

    def at_completions(self, values: Tensor) -> Tensor:
        """The values at the N response tokens, ``(S, C) -> (N,)``, sequence by sequence."""
        return values.take(self.completion_index)

    def spread(self, values: Tensor) -> Tensor:
        """The values of the N response tokens in their places, ``(N,) -> (S, C)``; 0 where masked."""
        shape = self.completion_mask.shape
        flat = values.new_zeros(shape.numel()).index_copy(0, self.completion_index, values)
        return flat.view(shape).clone()  # FSDP warns of views that a forward returns


class PreferenceBatch(NamedTuple):
    """B pairs, stacked once as ``[chosen; rejected]`` (S = 2B).

    Attributes:
        tokens: the stacked sequences.
        numbers: what the data says of each pair in numbers, ``(B,)`` float32 under the names that
            :class:`TokenizedPair` gives them; NaN where the data has none.
        row_ids: ``(B,)`` int64, the pair's line in its table; -1 marks a pair that only fills up the last batch of an
            evaluation.
        num_counted: how many pairs count: the first ones. The others, if any, only fill up the batch.
    """

    tokens: TokenBatch
    numbers: dict[str, Tensor]
    row_ids: Tensor
    num_counted: int

    @property
    def behavior_logps(self) -> Tensor:
        """``(2B,)`` float32 in nats, NaN where the data has none."""
        return torch.cat([self.numbers["chosen_behavior_logps"], self.numbers["rejected_behavior_logps"]])

    @property
    def pair_weights(self) -> Tensor:
        """``(B,)`` the data's own factor of each pair's loss, at least 0; 1 where it has none."""
        return self.numbers["weight"]

    @property
    def margins(self) -> Tensor:
        """``(B,)`` what the pair's scaled preference must exceed; 0 where the data has none."""
        return self.numbers["margin"]


class SFTBatch(NamedTuple):
    """S demonstrations. ``row_ids`` and ``num_counted`` as in :class:`PreferenceBatch`."""

    tokens: TokenBatch
    row_ids: Tensor
    num_counted: int


class SequenceLogps(NamedTuple):
    """Log-probabilities of S completions given their prompts, in nats, fp32.

    Attributes:
        logps: ``(S,)`` sums over the completion's tokens, EOS included.
        num_tokens: ``(S,)`` int64, completion tokens.
        per_token_logps: ``(S, C)``, 0 where masked.
        alignment: ``(S,)`` mean over the completion's tokens of ``log pi(y_t) - log sum_v pi(v)^2`` (arXiv 2406.11827),
            without gradient; NaN where it was not asked for.
    """

    logps: Tensor
    num_tokens: Tensor
    per_token_logps: Tensor
    alignment: Tensor


class Response(NamedTuple):
    """One sampled response. ``token_ids`` ends with EOS where ``finished``; otherwise it was cut at the token limit."""

    token_ids: list[int]
    finished: bool


class Reward(Protocol):
    """Scores responses. A class of yours works by its import path if it has these members, with these types."""

    @property
    def identity(self) -> str:
        """Names what scored, the same in every process and run: scores in files are keyed by it."""
        ...

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
    ) -> Sequence[float]:
        """Scores N responses: a number for each, higher is better.

        Args:
            prompts: each response's prompt as the data has it, before any chat template.
            responses: text, special tokens left out.
            finished: false where the token limit cut a response.
        """
        ...


def score(
    reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool], *, option: str
) -> list[float]:
    """The scores that a reward gives to N responses, one finite number each; every caller of a reward asks here.

    ``option`` names the reward in messages. The other arguments are those of :class:`Reward`.

    Raises:
        InputError: the reward gives something else.
    """
    given = reward(prompts, responses, finished)
    name, number = type(reward).__name__, len(responses)
    rule = f"{option}: {name} must give a finite number to each of {number} responses, and gave"
    try:
        values = list(given)
    except TypeError as error:
        raise InputError(f"{rule} {given!r}.") from error
    if len(values) != len(responses):
        raise InputError(f"{rule} {len(values)}.")
    scores = []
    for value, response in zip(values, responses, strict=True):
        try:
            scores.append(float(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{rule} {value!r} for {response!r}.") from error
        if not isfinite(scores[-1]):
            raise InputError(f"{rule} {scores[-1]} for {response!r}.")
    return scores


class Ranks(NamedTuple):
    """The processes that share the work. All must make the same calls.

    Attributes:
        rank: of this process.
        size: how many there are.
        gather: takes each rank's object and returns those of all.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]

    def on_all(self, compute: Callable[[], Any]) -> list[Any]:
        """What each rank computes. If one fails for the user's input, all fail, and none waits for it.

        Raises:
            InputError: that of the first rank that failed.
        """
        result = error = None
        try:
            result = compute()
        except InputError as caught:
            error = caught
        outcomes = self.gather((result, error))
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [outcome for outcome, _ in outcomes]
