"""Responses that the policy samples while it is trained, and their log-probs.

They are drawn at temperature 1 and top-p 1 from the policy of this very step, and used for one update: so a gradient
needs no importance ratio of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_isdpo.data.collation import batch_prompts, collate_completions
from lit_isdpo.objective.on_policy import Rollouts
from lit_isdpo.policy.generation import Sampling, sample
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reference import Reference, ReferenceConfig
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import InputError, PreferenceBatch, Response


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Sampling):
    """How responses are sampled in training: at temperature 1 and top-p 1, by the run's seed.

    Args:
        num_responses: K to each row's prompt, at least 2; rows with the same prompt get their own.
        max_new_tokens: longer responses are cut.
        batch_size: responses sampled at a time on one rank.
    """

    option: ClassVar[str] = "model.rollout"
    least_responses: ClassVar[int] = 2

    num_responses: int = 2
    temperature: float = field(default=1.0, init=False)
    top_p: float = field(default=1.0, init=False)
    seed: int = field(default=0, init=False)


@dataclass(frozen=True, kw_only=True)
class OnPolicyKL(RolloutConfig):
    """A KL term on responses that the policy samples: ``loss + weight KL(policy || reference)``.

    A preference loss sees the data's responses alone, whatever the policy says beside them; this term sees what the
    policy says (HyPO, arXiv 2406.01462). Beside DPO's loss it is worth what beta makes of it; beside chi-PO's it was
    the best of all that was tried here (``configs/model/chi_hypo.yaml``), on seeds and a task that it was not chosen
    by: ``notebooks/figures/remedies_final/report.md``.

    Args:
        weight: of a nat, above 0, in units of the loss. The term that DPO implies at second order weighs some
            ``beta^2 / 2`` a nat: 5e-5 at beta 0.01.
        num_responses: K to each row's prompt, at least 2.
        max_new_tokens: longer responses are cut.
        batch_size: responses sampled at a time on one rank.
    """

    option: ClassVar[str] = "model.on_policy_kl"

    weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < float("inf"):
            raise InputError(f"{self.option}.weight must be a finite number above 0, not {self.weight}.")


class SampledResponses(NamedTuple):
    """K responses to each of P prompts.

    Attributes:
        prompts: token ids of each of the P K prompts, each K times in a row.
        responses: P K responses.
        num_responses: K.
    """

    prompts: list[list[int]]
    responses: list[Response]
    num_responses: int

    @property
    def finished(self) -> Tensor:
        """``(P, K)`` bool, false where the token limit cut a response."""
        flat = torch.tensor([response.finished for response in self.responses])
        shaped: Tensor = flat.unflatten(0, (-1, self.num_responses))
        return shaped


def check_rollouts(reference: ReferenceConfig | None, option: str) -> None:
    """Raises for a reference that cannot score what is sampled in training.

    Raises:
        InputError: there is none, or only a cache of it.
    """
    if reference is None:
        raise InputError(f"{option}: sampled responses are held to a reference, so model.reference cannot be null.")
    if reference.cache:
        raise InputError(
            f"{option}: responses that are sampled in training have no cached log-probs; leave model.reference.cache "
            "out."
        )


def sample_rollouts(
    module: LanguageModule, batch: PreferenceBatch, batch_idx: int, config: RolloutConfig
) -> SampledResponses:
    """Samples responses to the prompts of a training micro-batch; the batch's own responses are not looked at.

    They are a function of the run's seed, the optimizer step, the micro-batch, the rank and the weights: a resumed fit
    draws what an unbroken one would.

    Args:
        module: in a fit.
        batch: B rows.
        batch_idx: its number in the epoch.
        config: how many, and how long.
    """
    trainer = module.trainer
    prompts = [prompt for _, prompt in batch_prompts(batch)]
    place = ("rollouts", module.data.seed, trainer.global_step, batch_idx, trainer.global_rank)
    drawn = sample(module.policy, prompts, config, module.vocabulary, *place, apart=True)
    return SampledResponses(
        [prompt for prompt in prompts for _ in range(config.num_responses)],
        [response for responses in drawn for response in responses],
        config.num_responses,
    )


def score_rollouts(
    policy: LogProbModel,
    reference: Reference,
    sampled: SampledResponses,
    pad_token_id: int,
    rewards: Sequence[float] | None = None,
) -> Rollouts:
    """Log-probs of sampled responses under both models, the policy's with its gradient.

    Args:
        policy: the model that is trained.
        reference: the frozen one.
        sampled: P K responses.
        pad_token_id: padding.
        rewards: of each response; 0 where there are none.
    """
    tokens = collate_completions(
        sampled.prompts, [response.token_ids for response in sampled.responses], pad_token_id=pad_token_id
    ).to(policy.device)
    per_token = policy(tokens).per_token_logps  # (P K, C)
    with torch.no_grad(), reference.scoring() as model:
        ref_per_token = model(tokens).per_token_logps
    shape = (-1, sampled.num_responses)
    values = torch.zeros(len(sampled.responses)) if rewards is None else torch.tensor(rewards, dtype=torch.float32)
    return Rollouts(
        per_token_logps=per_token.unflatten(0, shape),
        ref_per_token_logps=ref_per_token.unflatten(0, shape),
        mask=tokens.completion_mask.unflatten(0, shape),
        rewards=values.to(policy.device).unflatten(0, shape),
    )


def imitate_rollouts(
    policy: LogProbModel, reference: Reference, batch: PreferenceBatch, config: RolloutConfig
) -> Rollouts:
    """Rollouts for a plan of memory and time: values of no meaning, K to a prompt, each as long as it may be.

    Args:
        policy: the model that is trained.
        reference: the frozen one.
        batch: B rows without values; their length says how long the longest prompt is.
        config: how many, and how long.
    """
    given, width = batch.tokens, config.max_new_tokens
    beside_prompt = given.completion_ids.shape[1] * (1 if given.segment_ids is None else 2)
    longest = max(1, given.num_prompt_positions, given.input_ids.shape[1] - beside_prompt)
    rows = len(batch.row_ids) * config.num_responses
    sampled = SampledResponses([[0] * longest] * rows, [Response([0] * width, False)] * rows, config.num_responses)
    return score_rollouts(policy, reference, sampled, 0)
