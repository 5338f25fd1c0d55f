"""Turns what ``predict`` samples into preference pairs, labelled by a reward."""

import json
from collections import Counter
from dataclasses import asdict
from functools import partial
from itertools import groupby
from random import Random
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_isdpo.data.examples import Pairing, choose_pairs
from lit_isdpo.evaluation.store import write_text
from lit_isdpo.lab.labelling import Labeller, PairRow, SampledRow, sampled_pairs
from lit_isdpo.policy.generation import Sampling
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.models import Prediction
from lit_isdpo.training.run_folder import run_dir
from lit_isdpo.types import InputError, Response, Reward

FILE = "pairs.jsonl"


class PreferenceLabels(Callback):
    """Writes ``pairs.jsonl`` into the run's folder: pairs that ``--data.train`` takes, of all ranks in one file.

    Each row of ``data.predict_split`` gets ``model.sampling.num_responses`` responses, which ``reward`` scores. The
    pairs hold the log-probs of the distribution that was sampled, temperature and nucleus included; train on them with
    ``--model.mu data``. What is left out is counted and printed.

    Args:
        reward: scores the responses; without one nothing is labelled.
        pairing: which responses to a prompt become pairs: best_worst, best_random (the best with a worse one that a
            hash of the texts picks), or all pairs; responses with the same score make none.
        noise_temperature: the response with the higher score is the chosen one with probability
            ``sigmoid(difference / noise_temperature)``, as in Bradley-Terry; 0 makes it that always.
        seed: of that noise.

    Raises:
        InputError: an argument is out of range, or has no effect without a reward.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        pairing: Pairing = "best_worst",
        noise_temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= noise_temperature < float("inf"):
            raise InputError(f"labels.noise_temperature must be a number of at least 0, not {noise_temperature}.")
        if reward is None and (pairing, noise_temperature, seed) != ("best_worst", 0.0, 0):
            raise InputError("labels: without labels.reward nothing is labelled; name one, or leave the others out.")
        if seed and noise_temperature == 0:
            raise InputError("labels.seed is that of the noise, and labels.noise_temperature 0 makes none.")
        self.reward = reward
        self.pairing = pairing
        self.noise_temperature = noise_temperature
        self.seed = seed
        self._labeller: Labeller | None = None
        self._pairs: list[tuple[int, PairRow]] = []
        self._counts: Counter[str] = Counter()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes ready.

        Raises:
            InputError: the prompts of some sources are text and those of others conversations.
        """
        if self.reward is None:
            return
        assert isinstance(pl_module, LanguageModule)
        datamodule = pl_module.data
        split = datamodule.split_to_predict
        kinds = {type(datamodule.splits.prompt(split, row_id)) for row_id in datamodule.splits.first_rows(split)}
        if len(kinds) > 1:
            raise InputError(
                f"data.{split} mixes sources whose prompts are text with others whose prompts are conversations, which "
                "one file of pairs cannot hold; label them one after the other."
            )
        self._pairs, self._counts = [], Counter()
        self._labeller = Labeller(
            reward=self.reward,
            encoder=datamodule.encoder,
            choose=partial(choose_pairs, pairing=self.pairing),
            noise_temperature=self.noise_temperature,
            noise=lambda row_id: Random(f"labels/{self.seed}/{row_id}"),
            max_length=datamodule.max_length,
        )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Labels the responses to the prompts of a batch."""
        if self._labeller is None:
            return
        assert isinstance(pl_module, LanguageModule)
        datamodule = pl_module.data
        rows = []
        for row_id, predictions in groupby(outputs, key=lambda prediction: prediction.row_id):
            of_row = list(predictions)
            responses = [Response(prediction.token_ids, prediction.finished) for prediction in of_row]
            prompt = datamodule.splits.prompt(datamodule.split_to_predict, row_id)
            rows.append(SampledRow(row_id, prompt, of_row[0].prompt_ids, responses))
        preferences, left_out = self._labeller(rows)
        size = datamodule.eval_batch_size or datamodule.rows_per_forward
        sampling = Sampling(**asdict(pl_module.sampling) | {"batch_size": size})
        pairs = sampled_pairs(pl_module.policy, preferences, sampling, pad_token_id=pl_module.vocabulary.pad_token_id)
        self._pairs += zip([pair.row.row_id for pair in preferences], pairs, strict=True)
        self._counts += left_out
        self._counts.update(rows=len(rows), responses=len(outputs))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the pairs of all ranks in the order of the rows, and says what was left out.

        Raises:
            InputError: no pair came out.
        """
        if self._labeller is None:
            return
        assert isinstance(pl_module, LanguageModule)
        parts = pl_module.ranks.gather((self._pairs, self._counts))
        # Sorting keeps the order of a row's own pairs.
        pairs = [pair for _, pair in sorted((pair for part, _ in parts for pair in part), key=lambda pair: pair[0])]
        counts: Counter[str] = sum((count for _, count in parts), Counter())
        num_rows, num_responses = counts.pop("rows", 0), counts.pop("responses", 0)
        why = "".join(f", {number:,} {reason}" for reason, number in counts.most_common())
        made = f"{num_responses:,} responses to {num_rows:,} rows{why}"
        if not pairs:
            raise InputError(f"labels: no pair came out of {made}.")
        file = run_dir(trainer) / FILE
        if trainer.is_global_zero:
            write_text(file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        rank_zero_info(f"Wrote {len(pairs):,} pairs to {file}, labelled by {self._labeller.reward.identity}: {made}")
