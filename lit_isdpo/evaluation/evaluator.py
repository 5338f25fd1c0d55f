r"""What a policy is worth: its responses against the reference's and the data's, its KL, with intervals over prompts.

prompts -> responses (policy, reference; the data's chosen ones) -> rewards -> verdicts of a judge -> win rates
       \-> responses at temperature 1 and top-p 1 -> KL to the reference

With a folder every arrow goes through files (:mod:`lit_isdpo.evaluation.store`), so that it is followed once. Without
one this is the probe of a validation: no files, no chosen responses, no judge, and the KL of the responses that are
scored.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_isdpo.evaluation import judge as judging
from lit_isdpo.evaluation.judge import Judge, Verdict
from lit_isdpo.evaluation.rewards import LabReward
from lit_isdpo.evaluation.statistics import (
    ESTIMATORS,
    Interval,
    bootstrap_interval,
    flatten,
    repetition,
    sampled_kl,
    win_rate_interval,
    win_rates,
    win_scores,
)
from lit_isdpo.evaluation.store import RESPONSES, Columns, ResponseSet, digest, weights_fingerprint
from lit_isdpo.policy.generation import Sampling, Vocabulary, sample
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.policy.vllm_sampler import VLLMSampler
from lit_isdpo.types import ProbePrompt, Ranks, Reward, score

Engine = Literal["transformers", "vllm"]


class SampledText(NamedTuple):
    """A response to read."""

    prompt: str
    response: str
    finished: bool
    reward: float | None


class Outcome(NamedTuple):
    """The result of an evaluation.

    Attributes:
        values: by log key, without the stage; keys about the reference's or the chosen responses begin with
            ``reference/`` or ``chosen/``.
        settings: the values are a function of these, in plain types.
        files: the Parquet files, by whose responses they hold.
        samples: the first response to each prompt, by whose they are.
    """

    values: dict[str, float]
    settings: dict[str, Any]
    files: dict[str, str]
    samples: dict[str, list[SampledText]]


@dataclass
class Evaluator:
    """An evaluation of policies on P prompts.

    Args:
        prompts: the same on every rank.
        vocabulary: of the policy's tokenizer.
        sampling: of the responses that are scored.
        folder: of all files; ``None`` keeps the responses in memory.
        kl_prompts: how many of the prompts the KL is measured on; 0 measures none.
        kl_sampling: of the responses that the KL is measured on; ``None`` takes those that are scored. KL estimates are
            unbiased for temperature 1 and top-p 1, and for those only.
        reward: scores the responses, and decides who wins.
        proxy: the reward that the policy is trained on, if any; scores the policy's responses too.
        reward_option: names the reward in messages.
        judge: compares the responses, and counts each of them once against one of the reference's, and the chosen one.
        engine: samples.
        engine_options: of ``vllm.LLM``; they change no distribution, and are left out of the set's name.
        ranks: who shares the work.
        show: wraps the shards that are about to be computed, with a word for the work, to show progress.
    """

    prompts: Sequence[ProbePrompt]
    vocabulary: Vocabulary
    sampling: Sampling
    folder: Path | None = None
    kl_prompts: int = 0
    kl_sampling: Sampling | None = None
    reward: Reward | None = None
    proxy: Reward | None = None
    reward_option: str = "model.reward"
    judge: Judge | None = None
    engine: Engine = "transformers"
    engine_options: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = Ranks()  # noqa: RUF009 - immutable
    show: Callable[[Iterable[int], str], Iterable[int]] = lambda shards, _: shards

    def __post_init__(self) -> None:
        assert not self.kl_prompts or (self.kl_sampling or self.sampling).is_plain
        self._new_set = partial(ResponseSet, self.folder, ranks=self.ranks, show=self.show)
        self._reference: tuple[ResponseSet, str | None, dict[str, Tensor]] | None = None

    def __call__(self, policy: LogProbModel, reference: Reference | None) -> Outcome:
        """Evaluates a policy; without a reference, what needs one is left out.

        The reference is sampled and scored in the first call only.
        """
        name = None if self.folder is None else weights_fingerprint(policy)
        own = self._sampled(policy, name, "policy", self.prompts, self.sampling)
        sets, ref_name = {"policy": own}, None
        columns = {"policy": self._columns(own, "policy")}
        if reference is not None:
            sets["reference"], ref_name, columns["reference"] = self._of_reference(reference)
        if self.folder is not None:
            sets["chosen"] = self._chosen()
            columns["chosen"] = self._columns(sets["chosen"], "chosen")
        kl: dict[str, Interval] = {}
        if reference is not None and self.kl_prompts:
            kl = self._kl(policy, name, own, reference, ref_name)
        values = {key: bootstrap_interval(column) for key, column in columns["policy"].items()} | kl
        verdicts: list[Verdict] = []
        for owner, suffix in {"reference": "", "chosen": "_vs_chosen"}.items():
            if owner not in sets:
                continue
            if self.folder is not None:
                values |= {f"{owner}/{key}": bootstrap_interval(column) for key, column in columns[owner].items()}
            # win_rate_vs_chosen, win_rate_vs_chosen_lc
            rates = self._wins(columns["policy"], columns[owner])
            if self.judge is not None:
                judged = self._judge(self.judge, own, sets[owner])
                verdicts += judged
                scores = torch.tensor([verdict.score for verdict in judged]).unflatten(0, (-1, own.num_responses))
                lengths = columns["policy"]["response_characters"] - columns[owner]["response_characters"]
                rates |= {f"judge/{key}": value for key, value in win_rates(scores.double(), lengths).items()}
            values |= {key.replace("win_rate", f"win_rate{suffix}"): value for key, value in rates.items()}
        for responses in sets.values():
            responses.save()
        return Outcome(
            flatten(values) | (judging.summarize(verdicts) if verdicts else {}),
            {
                "policy": name,
                "reference": ref_name,
                "num_prompts": len(self.prompts),
                "sampling": {**asdict(self.sampling), "engine": self.engine, "engine_options": self.engine_options},
                "kl_prompts": min(self.kl_prompts, len(self.prompts)),
                "kl_sampling": asdict(self.kl_sampling or self.sampling),
                "reward": None if self.reward is None else self.reward.identity,
                "judge": None if self.judge is None else self.judge.identity,
            },
            {owner: str(responses.file) for owner, responses in sets.items() if responses.file is not None},
            {owner: self._samples(responses, columns[owner]) for owner, responses in sets.items()},
        )

    @property
    def reward_key(self) -> str:
        """The log key of the reward."""
        return "gold_reward" if isinstance(self.reward, LabReward) else "reward"

    def _of_reference(self, reference: Reference) -> tuple[ResponseSet, str | None, dict[str, Tensor]]:
        """Its responses, the name of its weights, and the values of the responses."""
        if self._reference is None:
            with reference.scoring() as model:
                name = None if self.folder is None else weights_fingerprint(model, with_adapter=False)
                responses = self._sampled(model, name, "reference", self.prompts, self.sampling, with_adapter=False)
            self._reference = responses, name, self._columns(responses, "reference")
        return self._reference

    def _sampled(
        self,
        model: LogProbModel,
        name: str | None,
        stream: str,
        prompts: Sequence[ProbePrompt],
        sampling: Sampling,
        *,
        with_adapter: bool = True,
        **about: Any,
    ) -> ResponseSet:
        """The model's responses, from their files or drawn now.

        ``stream`` decides the random numbers: a win rate compares independent responses.
        """
        about |= {"weights": name, "stream": stream, "engine": self.engine, **asdict(sampling)}
        # The source too, which rewards read: a prompt that was cut may be that of several.
        about["prompts"] = digest([[prompt.prompt_ids, prompt.source] for prompt in prompts])
        about["eos_token_ids"] = self.vocabulary.eos_token_ids
        if model.num_tokens not in (None, model.vocabulary_size):  # without this padding would be sampled
            about["num_tokens"] = model.num_tokens
        size = sampling.batch_size
        if self.folder is None:  # nobody else reads these shards, so that all ranks get a share
            size = min(size, -(-len(prompts) // self.ranks.size) * sampling.num_responses)
        responses = self._new_set(about, prompts, num_responses=sampling.num_responses, shard_size=size)
        vllm = VLLMSampler(model, with_adapter=with_adapter, options=self.engine_options)
        draw = vllm if self.engine == "vllm" else partial(sample, model)
        with closing(vllm):

            def columns(shard: int) -> Columns:
                ids = [prompts[row].prompt_ids for row in responses.shards[shard]]
                drawn = [one for some in draw(ids, sampling, self.vocabulary, stream, shard) for one in some]
                return {
                    "token_ids": [one.token_ids for one in drawn],
                    "finished": [one.finished for one in drawn],
                    "response": [self.vocabulary.decode(one.token_ids) for one in drawn],
                }

            responses.fill(RESPONSES, columns, f"sampling, {stream}")
        return responses

    def _chosen(self) -> ResponseSet:
        """The data's own responses, one per prompt; they count as finished."""
        about = {"responses": "of the data", "prompts": digest([tuple(prompt) for prompt in self.prompts])}
        size = self.sampling.batch_size
        responses = self._new_set(about, self.prompts, num_responses=1, shard_size=size)

        def columns(shard: int) -> Columns:
            texts = [prompt.response for prompt in responses.asked(shard)]
            return {"token_ids": [[]] * len(texts), "finished": [True] * len(texts), "response": texts}

        responses.fill(RESPONSES, columns, "reading, chosen")
        return responses

    def _columns(self, responses: ResponseSet, owner: str) -> dict[str, Tensor]:
        """Values of single responses, ``(P, n)``, by log key."""
        texts, ids = responses.values(RESPONSES, "response"), responses.values(RESPONSES, "token_ids")
        columns = {"response_characters": _tensor(texts, len)}
        if owner != "chosen":  # those are text and no more
            ends = set(self.vocabulary.eos_token_ids)
            columns["response_length"] = _tensor(ids, len)
            columns["finished_fraction"] = responses.tensor(RESPONSES, "finished")
            columns["repetition"] = _tensor(ids, lambda row: repetition([token for token in row if token not in ends]))
        if self.proxy is not None and owner == "policy":
            columns["reward"] = self._rewards(self.proxy, responses)
        if self.reward is not None:
            columns[self.reward_key] = self._rewards(self.reward, responses)
        return columns

    def _rewards(self, reward: Reward, responses: ResponseSet) -> Tensor:
        column = f"reward/{reward.identity}"

        def columns(shard: int) -> Columns:
            sources = [prompt.source for prompt in responses.asked(shard)]
            finished = [response.finished for response in responses.responses(shard)]
            return {column: score(reward, sources, responses.texts(shard), finished, option=self.reward_option)}

        responses.fill(f"reward-{digest(reward.identity)}", columns, "scoring")
        return responses.tensor(f"reward-{digest(reward.identity)}", column)

    def _wins(self, own: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Interval]:
        """Win rates by reward, over all pairs of responses to a prompt."""
        if self.reward is None:
            return {}
        scores = win_scores(own[self.reward_key], others[self.reward_key])
        if self.folder is None:
            return {"win_rate": win_rate_interval(scores)}
        lengths = others["response_characters"].mean(dim=1, keepdim=True)
        return win_rates(scores, own["response_characters"] - lengths)

    def _judge(self, judge: Judge, own: ResponseSet, others: ResponseSet) -> list[Verdict]:
        """Verdicts on each response against the other's of the same number, prompt by prompt."""
        name = f"judge-{digest([judge.identity, others.key])}"
        titles = [f"judge/{judge.identity}/{others.key}/{part}" for part in Verdict._fields]

        def columns() -> Columns:
            texts, theirs = (responses.values(RESPONSES, "response") for responses in (own, others))
            first = [text for some in texts for text in some]
            second = [some[i % others.num_responses] for some in theirs for i in range(own.num_responses)]
            sources = [prompt.source for prompt in self.prompts for _ in range(own.num_responses)]
            verdicts = judge.compare(sources, first, second)
            return dict(zip(titles, map(list, zip(*verdicts, strict=True)), strict=True))

        # Questions that stayed without an answer are asked again.
        own.fill_at_once(name, columns, settled=lambda part: not any(map(isnan, part[titles[0]])))
        parts = [[value for some in own.values(name, title) for value in some] for title in titles]
        return [Verdict(*verdict) for verdict in zip(*parts, strict=True)]

    def _kl(
        self, policy: LogProbModel, name: str | None, responses: ResponseSet, reference: Reference, ref_name: str | None
    ) -> dict[str, Interval]:
        batch_size = (self.kl_sampling or self.sampling).batch_size
        if self.kl_sampling is not None:
            # Samples of its own: those that are scored may have other settings, or be fewer.
            responses = self._sampled(
                policy, name, "policy for KL", self.prompts[: self.kl_prompts], self.kl_sampling, kl_to=ref_name
            )

        def columns(shard: int) -> Columns:
            ids = [prompt.prompt_ids for prompt in responses.asked(shard)]
            pad = self.vocabulary.pad_token_id
            values = sampled_kl(
                policy, reference, ids, responses.responses(shard), pad_token_id=pad, batch_size=batch_size
            )
            return dict(zip(ESTIMATORS, values.T.tolist(), strict=True))

        responses.fill("kl", columns, "measuring KL")
        intervals = {f"kl/{key}": bootstrap_interval(responses.tensor("kl", key)) for key in ESTIMATORS}
        if self.kl_sampling is not None:
            responses.save()
            intervals["kl/cut_fraction"] = bootstrap_interval(1 - responses.tensor(RESPONSES, "finished"))
        return intervals

    def _samples(self, responses: ResponseSet, columns: dict[str, Tensor]) -> list[SampledText]:
        """The first response to each prompt."""
        texts, finished = (responses.values(RESPONSES, title) for title in ("response", "finished"))
        rewards = columns[self.reward_key][:, 0].tolist() if self.reward is not None else [None] * len(texts)
        return [
            SampledText(prompt.text, text[0], ended[0], reward)
            for prompt, text, ended, reward in zip(self.prompts, texts, finished, rewards, strict=True)
        ]


def _tensor(values: list[list[Any]], measure: Callable[[Any], float]) -> Tensor:
    return torch.tensor([[measure(value) for value in row] for row in values], dtype=torch.float64)
