"""Gold labelling: from a policy's responses and a reward to preference pairs that can be trained on.

A row is one that the format ``strings`` reads or, where the prompt is a conversation, ``messages``:

    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "chosen_behavior_logps": -0.3,
     "rejected_behavior_logps": -1.6, "chosen_score": 9.0, "rejected_score": 1.0}

Its log-probs are those of the tokens that were sampled, so a response is left out whose text training would read as
other tokens, or cut.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_isdpo.data.collation import collate_completions
from lit_isdpo.data.outcomes import RowError
from lit_isdpo.data.tokenization import Limits, TextEncoder, tokenize_example
from lit_isdpo.policy.generation import Sampling
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.types import Conversation, InputError, Message, Prompt, Response, Reward, SFTExample, score

_WHOLE = Limits(2**31, 2**31 - 1)  # nothing is cut
PairRow = dict[str, Any]  # of a file of pairs; log-probs in nats, summed, EOS included, of the sampled distribution


class UnusableError(Exception):
    """A response cannot be used; the message says why, in words that are counted and printed."""


class SampledRow(NamedTuple):
    """A row of the data, and a policy's responses to its prompt.

    Attributes:
        row_id: the row.
        prompt: as the data has it, before any chat template.
        prompt_ids: as the policy got it.
        responses: the policy's.
    """

    row_id: int
    prompt: Prompt
    prompt_ids: list[int]
    responses: Sequence[Response]


class Candidate(NamedTuple):
    """A response that can be trained on, and its score."""

    text: str
    token_ids: list[int]
    score: float


class Preference(NamedTuple):
    """Two responses to one prompt, and which of them is preferred."""

    row: SampledRow
    chosen: Candidate
    rejected: Candidate


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """Makes preferences of sampled responses.

    Attributes:
        reward: scores each response that can be used, once.
        encoder: writes text as training does, with the policy's tokenizer.
        choose: which responses to a prompt become pairs, given prompt, texts and scores.
        noise_temperature: labels follow Bradley-Terry, see :func:`first_wins`; 0 makes the first of a pair the chosen
            one.
        noise: the random numbers for a row's labels, by its id.
        max_length: of a prompt with its response, in tokens, beyond which training cuts.
    """

    reward: Reward
    encoder: TextEncoder
    choose: Callable[[Prompt, Sequence[str], Sequence[float]], list[tuple[int, int]]]
    noise_temperature: float
    noise: Callable[[int], Random]
    max_length: int

    def __call__(self, rows: Sequence[SampledRow]) -> tuple[list[Preference], Counter[str]]:
        """Labels the responses to some prompts.

        Returns:
            The preferences in the order of the rows; and counts by reason, of responses that were left out and of
            prompts that gave no pair.

        Raises:
            InputError: the reward gives a score that is no finite number.
        """
        left_out: Counter[str] = Counter()
        usable: list[dict[str, Response]] = []  # text -> response
        for row in rows:
            texts: dict[str, Response] = {}
            for response in row.responses:
                try:
                    text = self.read_back(row, response)
                    if text in texts:
                        raise UnusableError("responses equal to another")
                    texts[text] = response
                except UnusableError as reason:
                    left_out[str(reason)] += 1
            usable.append(texts)
        prompts = [row.prompt for row, texts in zip(rows, usable, strict=True) for _ in texts]
        responses = [text for texts in usable for text in texts]
        finished = [True] * len(responses)
        scores = iter(score(self.reward, prompts, responses, finished, option="labels.reward") if responses else [])
        preferences = []
        for row, texts in zip(rows, usable, strict=True):
            candidates = [Candidate(text, response.token_ids, next(scores)) for text, response in texts.items()]
            pairs = self.choose(row.prompt, list(texts), [candidate.score for candidate in candidates])
            if not pairs:
                few = len(candidates) < 2
                left_out["prompts with fewer than two responses left" if few else "prompts with equal scores"] += 1
            rng = self.noise(row.row_id)
            for first, second in ((candidates[i], candidates[j]) for i, j in pairs):
                wins = self.noise_temperature == 0 or first_wins(rng, first.score, second.score, self.noise_temperature)
                preferences.append(Preference(row, *((first, second) if wins else (second, first))))
        return preferences, left_out

    def read_back(self, row: SampledRow, response: Response) -> str:
        """The text that training reads as exactly the tokens that were sampled.

        Raises:
            UnusableError: there is none.
        """
        if not response.finished:
            raise UnusableError("responses unfinished")
        decoded = str(self.encoder.tokenizer.decode(response.token_ids, skip_special_tokens=True))
        # Conversations without a chat template, and some templates, put a blank before the response by themselves.
        for text in dict.fromkeys((decoded, decoded.removeprefix(" "))):
            example = SFTExample(row.prompt, text)
            try:
                read = tokenize_example(example, self.encoder, _WHOLE)
            except RowError as error:
                raise UnusableError(f"responses left out as {error.reason.value}") from error
            except InputError:  # a template that shows some responses otherwise than others
                continue
            if read.prompt_ids != row.prompt_ids:
                raise UnusableError("responses to a prompt that was cut")
            if read.completion_ids == response.token_ids:
                if len(row.prompt_ids) + len(response.token_ids) > self.max_length:
                    raise UnusableError("responses longer than data.max_length allows")
                return text
        raise UnusableError("responses whose text has other tokens")


def first_wins(rng: Random, first: float, second: float, temperature: float) -> bool:
    """A Bradley-Terry label of two scores: true with probability ``sigmoid((first - second) / temperature)``."""
    logit = (first - second) / temperature
    probability = 1 / (1 + math.exp(-logit)) if logit > 0 else math.exp(logit) / (1 + math.exp(logit))
    return rng.random() < probability


def sampled_pairs(
    policy: LogProbModel,
    preferences: Sequence[Preference],
    sampling: Sampling,
    *,
    pad_token_id: int,
    score_name: str = "score",
) -> list[PairRow]:
    """Rows of a file for preferences between responses that the policy sampled; arguments as below."""
    responses = [pair.chosen for pair in preferences] + [pair.rejected for pair in preferences]
    logps = sampled_logps(
        policy,
        [pair.row.prompt_ids for pair in preferences] * 2,
        [response.token_ids for response in responses],
        sampling,
        pad_token_id=pad_token_id,
    )
    return to_rows(preferences, logps, score_name)


def to_rows(preferences: Sequence[Preference], logps: Sequence[float], score_name: str = "score") -> list[PairRow]:
    """Writes N preferences as rows of a file.

    Args:
        preferences: N of them.
        logps: ``2N``, of all chosen responses and then of all rejected ones.
        score_name: of the columns ``chosen_...`` and ``rejected_...`` that hold the scores.
    """

    def shown(row: SampledRow, text: str) -> str | list[Message]:
        return text if isinstance(row.prompt, str) else [Message(role="assistant", content=text)]

    rows = []
    for number, (row, chosen, rejected) in enumerate(preferences):
        pair: PairRow = {
            "prompt": row.prompt,
            "chosen": shown(row, chosen.text),
            "rejected": shown(row, rejected.text),
            "chosen_behavior_logps": logps[number],
            "rejected_behavior_logps": logps[len(preferences) + number],
            f"chosen_{score_name}": chosen.score,
            f"rejected_{score_name}": rejected.score,
        }
        if isinstance(row.prompt, Conversation) and row.prompt.tools:
            pair["tools"] = row.prompt.tools
        rows.append(pair)
    return rows


@torch.no_grad()
def sampled_logps(
    policy: LogProbModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    pad_token_id: int,
) -> list[float]:
    """Log-probs of S responses under the distribution that they were sampled from: nats, summed, EOS included.

    Computed as training computes them; generation's own arithmetic, with its cache and its padding, differs. At
    temperature 1 and top-p 1 they are training's to the bit, so that entries of the vocabulary that are no tokens count
    as they do there.

    Args:
        policy: the model that was sampled.
        prompts: token ids of S prompts.
        responses: token ids of S responses.
        sampling: temperature and nucleus that were sampled with, and the responses per forward.
        pad_token_id: padding.
    """
    logps: list[float] = []
    for start in range(0, len(responses), sampling.batch_size):
        rows = slice(start, start + sampling.batch_size)
        tokens = collate_completions(prompts[rows], responses[rows], pad_token_id=pad_token_id).to(policy.device)
        if sampling.is_plain:
            logps += policy(tokens).logps.tolist()
            continue
        targets, states = tokens.at_completions(tokens.completion_ids), policy.completion_states(tokens)
        values = [
            nucleus_logps(policy.token_logits(some)[:, : policy.num_tokens], picked, sampling)
            for some, picked in zip(
                states.split(policy.logits_at_a_time), targets.split(policy.logits_at_a_time), strict=True
            )
        ]
        logps += tokens.spread(torch.cat(values)).sum(dim=1).tolist()
    return logps


def nucleus_logps(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs of N sampled tokens after temperature and nucleus, in nats.

    The nucleus (arXiv 1904.09751) is the fewest most likely tokens with a mass of at least ``top_p``. A token that was
    sampled belongs to it, also where rounding would have it just outside.

    Args:
        logits: ``(N, V)``.
        targets: ``(N,)`` the sampled tokens.
        sampling: temperature and nucleus.

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> nucleus_logps(logits, torch.tensor([1]), Sampling(top_p=0.6)).exp()
    tensor([0.3750])
    """
    logps = (logits / sampling.temperature).log_softmax(dim=1)
    if sampling.top_p < 1:
        ordered, order = logps.sort(dim=1, descending=True)
        mass_before = ordered.exp().cumsum(dim=1) - ordered.exp()
        inside = torch.zeros_like(logps, dtype=torch.bool).scatter(1, order, mass_before < sampling.top_p)
        inside.scatter_(1, targets[:, None], True)
        logps = logps.masked_fill(~inside, -math.inf).log_softmax(dim=1)
    return logps.gather(1, targets[:, None])[:, 0]
