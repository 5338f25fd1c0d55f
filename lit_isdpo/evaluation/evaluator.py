r"""What a policy is worth: its responses against the reference's and the data's, its KL, with intervals over prompts.

prompts -> responses (policy, reference; the data's chosen ones) -> rewards -> verdicts of a judge -> win rates
       \-> responses at temperature 1 and top-p 1 -> KL to the reference

Every arrow goes through files (:mod:`lit_isdpo.evaluation.responses`), so that it is followed once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lit_isdpo.evaluation import judge as judging
from lit_isdpo.evaluation.fingerprints import digest, weights_fingerprint
from lit_isdpo.evaluation.judge import Judge, Verdict
from lit_isdpo.evaluation.kl import ESTIMATORS, sampled_kl
from lit_isdpo.evaluation.measures import ResponseValues, compare, describe, flatten, repetition, win_rates
from lit_isdpo.evaluation.probe import SampledText
from lit_isdpo.evaluation.responses import RESPONSES, Columns, ResponseSet
from lit_isdpo.evaluation.rewards import LabReward, Reward, score
from lit_isdpo.evaluation.sampling import sample_many
from lit_isdpo.evaluation.statistics import Interval, bootstrap_interval
from lit_isdpo.evaluation.vllm_sampler import VLLMSampler
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference
from lit_isdpo.types import ProbePrompt, Ranks, Response

Engine = Literal["transformers", "vllm"]
NUM_SAMPLES = 8


class Vocabulary(NamedTuple):
    """What the tokenizer knows.

    Attributes:
        decode: token ids to text, special tokens left out.
        eos_token_ids: each ends a response.
        pad_token_id: padding.
    """

    decode: Callable[[list[int]], str]
    eos_token_ids: list[int]
    pad_token_id: int


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn: they are a function of this, the weights and the prompts.

    Attributes:
        num_responses: to each prompt.
        max_new_tokens: longer responses are cut.
        temperature: divides the logits.
        top_p: nucleus.
        batch_size: responses sampled at a time, and written at a time.
        seed: of the policy's responses; the reference's is the next one.
        engine: what samples.
        engine_options: of ``vllm.LLM``; they change no distribution, and are left out of the set's name.
    """

    num_responses: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 128
    seed: int = 0
    engine: Engine = "transformers"
    engine_options: dict[str, Any] = field(default_factory=dict)


class Outcome(NamedTuple):
    """What an evaluation gives.

    Attributes:
        values: by log key, without the stage; what is about the reference's or the chosen responses alone begins with
            ``reference/`` or ``chosen/``.
        settings: what they are a function of, in plain types.
        files: the Parquet files, by whose responses they hold.
        samples: the first responses to the first prompts, by whose they are.
    """

    values: dict[str, float]
    settings: dict[str, Any]
    files: dict[str, str]
    samples: dict[str, list[SampledText]]


class Evaluator:
    """An evaluation of policies on P prompts.

    Args:
        prompts: the same on every rank.
        vocabulary: of the policy's tokenizer.
        settings: of the responses that are scored.
        kl_prompts: how many of the prompts the KL is measured on; 0 does not.
        kl_settings: of the responses that the KL is measured on: temperature and top-p are 1.
        folder: of all files.
        reward: scores the responses.
        judge: compares the responses, and counts each of them once against one of the reference's, and the chosen one.
        ranks: who shares the work.
        show: wraps what is about to be computed, with a word for it, to show progress.
    """

    def __init__(
        self,
        prompts: Sequence[ProbePrompt],
        vocabulary: Vocabulary,
        *,
        settings: SamplingSettings,
        kl_prompts: int,
        kl_settings: SamplingSettings,
        folder: Path,
        reward: Reward | None = None,
        judge: Judge | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 - immutable
        show: Callable[[Iterable[int], str], Iterable[int]] = lambda shards, _: shards,
    ) -> None:
        assert kl_settings.temperature == kl_settings.top_p == 1
        self.prompts = prompts
        self.vocabulary = vocabulary
        self.settings = settings
        self.kl_prompts = prompts[:kl_prompts]
        # Samples of its own: a KL on the responses that are scored would share their settings, or only seem not to.
        self.kl_settings = replace(kl_settings, seed=kl_settings.seed + 2)
        self.folder = folder
        self.reward = reward
        self.judge = judge
        self.reward_key = "gold_reward" if isinstance(reward, LabReward) else "reward"
        self._ranks = ranks
        self._show = show

    def __call__(self, policy: LogProbModel, reference: Reference | None) -> Outcome:
        """Evaluates a policy; without a reference, what needs one is left out."""
        name = weights_fingerprint(policy)
        sets = {"policy": self._sampled(policy, name, self.prompts, self.settings, "policy")}
        values: dict[str, Interval] = {}
        ref_name = None
        if reference is not None:
            with reference.scoring() as model:
                ref_name = weights_fingerprint(model, with_adapter=False)
                seed = self.settings.seed + 1  # a win rate compares independent responses
                settings = replace(self.settings, seed=seed)
                sets["reference"] = self._sampled(
                    model, ref_name, self.prompts, settings, "reference", with_adapter=False
                )
            if self.kl_prompts:
                values |= self._kl(policy, name, reference, ref_name)
        sets["chosen"] = self._chosen()
        measured = {owner: self._measure(responses) for owner, responses in sets.items()}
        for owner, those in measured.items():
            prefix = "" if owner == "policy" else f"{owner}/"
            values |= {f"{prefix}{key}": value for key, value in describe(those, self.reward_key).items()}
        suffixes = {"reference": "", "chosen": "_vs_chosen"}
        verdicts: list[Verdict] = []
        for owner, suffix in suffixes.items():
            if owner not in sets:
                continue
            rates = compare(measured["policy"], measured[owner])
            if self.judge is not None:
                judged = self._judge(self.judge, sets["policy"], sets[owner])
                verdicts += judged
                scores = sets["policy"].by_prompt([verdict.score for verdict in judged])
                difference = measured["policy"].num_characters - measured[owner].num_characters
                rates |= {f"judge/{key}": value for key, value in win_rates(scores, difference).items()}
            # win_rate_vs_chosen, win_rate_vs_chosen_lc
            values |= {key.replace("win_rate", f"win_rate{suffix}"): value for key, value in rates.items()}
        for responses in sets.values():
            responses.save([prompt.text for prompt in self.prompts], [prompt.row_id for prompt in self.prompts])
        return Outcome(
            flatten(values) | (judging.summarize(verdicts) if verdicts else {}),
            {
                "policy": name,
                "reference": ref_name,
                "num_prompts": len(self.prompts),
                "sampling": asdict(self.settings),
                "kl_prompts": len(self.kl_prompts),
                "kl_sampling": asdict(self.kl_settings),
                "reward": None if self.reward is None else self.reward.identity,
                "judge": None if self.judge is None else self.judge.identity,
            },
            {owner: str(responses.file) for owner, responses in sets.items()},
            {owner: self._samples(responses, measured[owner]) for owner, responses in sets.items()},
        )

    def _sampled(
        self,
        model: LogProbModel,
        name: str,
        prompts: Sequence[ProbePrompt],
        settings: SamplingSettings,
        owner: str,
        *,
        with_adapter: bool = True,
        **about: Any,
    ) -> ResponseSet:
        """The model's responses, from their files or drawn now."""
        ids = [prompt.prompt_ids for prompt in prompts]
        known = {key: value for key, value in asdict(settings).items() if key != "engine_options"}
        if model.num_tokens not in (None, model.vocabulary_size):  # without this padding would be sampled
            known["num_tokens"] = model.num_tokens
        responses = self._new_set(
            {
                "weights": name,
                # The source too, which rewards read: a prompt that was cut may be that of several.
                "prompts": digest([[prompt.prompt_ids, prompt.source] for prompt in prompts]),
                "eos_token_ids": self.vocabulary.eos_token_ids,
                **known,
                **about,
            },
            ids,
            settings,
        )
        with self._sampler(model, settings, with_adapter) as sampler:

            def draw(rows: list[int], shard: int) -> list[list[Response]]:
                return sampler(
                    [ids[row] for row in rows],
                    num_responses=settings.num_responses,
                    max_new_tokens=settings.max_new_tokens,
                    eos_token_ids=self.vocabulary.eos_token_ids,
                    seed=_seed(settings.seed, shard),
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                )

            responses.fill_responses(draw, self.vocabulary.decode, f"sampling, {owner}")
        return responses

    @contextmanager
    def _sampler(
        self, model: LogProbModel, settings: SamplingSettings, with_adapter: bool
    ) -> Iterator[Callable[..., list[list[Response]]]]:
        if settings.engine == "transformers":
            pad = self.vocabulary.pad_token_id
            yield partial(sample_many, model, pad_token_id=pad, batch_size=settings.batch_size)
            return
        sampler = VLLMSampler(model, with_adapter=with_adapter, options=settings.engine_options)
        try:
            yield sampler
        finally:
            sampler.close()

    def _chosen(self) -> ResponseSet:
        """The data's own responses, one a prompt; they count as finished."""
        pairs = [[prompt.source, prompt.response] for prompt in self.prompts]
        settings = replace(self.settings, num_responses=1)
        ids = [prompt.prompt_ids for prompt in self.prompts]
        about = {"responses": "of the data", "pairs": digest(pairs), "prompts": digest(ids)}
        responses = self._new_set(about, ids, settings)

        def columns(shard: int) -> Columns:
            texts = [self.prompts[row].response for row in responses.shards[shard]]
            return {"token_ids": [[]] * len(texts), "finished": [True] * len(texts), "response": texts}

        responses.fill(RESPONSES, columns, "reading, chosen")
        return responses

    def _new_set(self, about: dict[str, Any], ids: Sequence[Sequence[int]], settings: SamplingSettings) -> ResponseSet:
        return ResponseSet(
            self.folder,
            about | {"batch_size": settings.batch_size},  # another one has other shards
            ids,
            num_responses=settings.num_responses,
            shard_size=settings.batch_size,
            ranks=self._ranks,
            show=self._show,
        )

    def _measure(self, responses: ResponseSet) -> ResponseValues:
        texts = responses.values(RESPONSES, "response")
        token_ids = responses.values(RESPONSES, "token_ids")
        sampled = any(token_ids)  # the data's responses are text alone
        ends = set(self.vocabulary.eos_token_ids)
        repeated = [repetition([token for token in ids if token not in ends]) for ids in token_ids]
        return ResponseValues(
            num_characters=responses.by_prompt([len(text) for text in texts]),
            num_tokens=responses.by_prompt([len(ids) for ids in token_ids]) if sampled else None,
            finished=responses.tensor(RESPONSES, "finished") if sampled else None,
            repetition=responses.by_prompt(repeated) if sampled else None,
            rewards=None if self.reward is None else self._rewards(self.reward, responses),
        )

    def _rewards(self, reward: Reward, responses: ResponseSet) -> Tensor:
        column = f"reward/{reward.identity}"

        def columns(shard: int) -> Columns:
            rows, drawn, texts = responses.of_shard(shard)
            sources = [self.prompts[row].source for row in rows]
            finished = [response.finished for response in drawn]
            return {column: score(reward, sources, texts, finished, option="evaluation.reward")}

        responses.fill(f"reward-{digest(reward.identity)}", columns, "scoring")
        return responses.tensor(f"reward-{digest(reward.identity)}", column)

    def _judge(self, judge: Judge, own: ResponseSet, others: ResponseSet) -> list[Verdict]:
        """Each response against the other's of the same number, in the order of ``own``'s shards."""
        name = f"judge-{digest([judge.identity, others.key])}"
        titles = [f"judge/{judge.identity}/{others.key}/{part}" for part in Verdict._fields]
        texts = own.by_number(own.values(RESPONSES, "response"))
        theirs = others.by_number(others.values(RESPONSES, "response"))
        rows = own.rows()

        def columns() -> Columns:
            first = [texts[row][i % own.num_responses] for i, row in enumerate(rows)]
            second = [theirs[row][i % own.num_responses % others.num_responses] for i, row in enumerate(rows)]
            verdicts = judge.compare([self.prompts[row].source for row in rows], first, second)
            return dict(zip(titles, map(list, zip(*verdicts, strict=True)), strict=True))

        # Questions that stayed without an answer are asked again.
        own.fill_at_once(name, columns, settled=lambda table: not any(map(isnan, table.column(titles[0]).to_pylist())))
        return [Verdict(*parts) for parts in zip(*(own.values(name, title) for title in titles), strict=True)]

    def _kl(self, policy: LogProbModel, name: str, reference: Reference, ref_name: str) -> dict[str, Interval]:
        responses = self._sampled(policy, name, self.kl_prompts, self.kl_settings, "policy for KL", kl_to=ref_name)

        def columns(shard: int) -> Columns:
            rows, drawn, _ = responses.of_shard(shard)
            ids = [self.kl_prompts[row].prompt_ids for row in rows]
            values = sampled_kl(policy, reference, ids, drawn, pad_token_id=self.vocabulary.pad_token_id)
            return dict(zip(ESTIMATORS, values.T.tolist(), strict=True))

        responses.fill("kl", columns, "measuring KL")
        responses.save([prompt.text for prompt in self.kl_prompts], [prompt.row_id for prompt in self.kl_prompts])
        intervals = {f"kl/{key}": bootstrap_interval(responses.tensor("kl", key)) for key in ESTIMATORS}
        finished = responses.tensor(RESPONSES, "finished")
        return intervals | {"kl/cut_fraction": bootstrap_interval(1 - finished)}

    def _samples(self, responses: ResponseSet, values: ResponseValues) -> list[SampledText]:
        """The first responses to the first prompts."""
        texts = responses.by_number(responses.values(RESPONSES, "response"))
        finished = responses.by_number(responses.values(RESPONSES, "finished"))
        rewards = [None] * len(texts) if values.rewards is None else values.rewards[:, 0].tolist()
        return [
            SampledText(prompt.text, texts[row][0], finished[row][0], rewards[row])
            for row, prompt in enumerate(self.prompts[:NUM_SAMPLES])
        ]


def _seed(seed: int, shard: int) -> int:
    """31 bits: streams of random numbers that no two shards share."""
    return int.from_bytes(blake2b(f"{seed}/{shard}".encode(), digest_size=4).digest()) >> 1
