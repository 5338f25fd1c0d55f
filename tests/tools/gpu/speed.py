"""Measures pairs per second beside TRL: the same weights, the same rows in the same order, ten seconds each."""

import importlib.util
import logging
import tempfile
import warnings
from statistics import median
from typing import Any, NamedTuple

from tests.tools.benchmarks.contenders import run_ours, run_trl
from tests.tools.benchmarks.workload import SHAPES, ModelSize, Shape, Workload, flops_per_pair, make_workload
from tests.tools.gpu.processes import apart
from tests.tools.gpu.shapes import MODELS, TINY
from tests.tools.gpu.sheet import Sheet

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
COMPILED = {"model.policy.compile": "true"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours, live": {"side": "ours", "cache": False},
    "TRL, live": {"side": "trl", "cache": False},
    "ours, cached": {"side": "ours", "cache": True},
    "TRL, cached": {"side": "trl", "cache": True},
    "ours, live, compiled": {"side": "ours", "cache": False, "options": COMPILED},
}
ROUNDS = (["ours, live", "TRL, live"], ["ours, cached", "TRL, cached"], ["ours, live, compiled"])
"""A round measures all shapes. The first round is the most valuable, in case the check is cut off."""


class Setting(NamedTuple):
    """What both sides train, with master weights of the same dtype. On a GPU they compute in bfloat16.

    Attributes:
        size: size of the model.
        shapes: shapes of the rows.
        micro_batch_size: pairs per micro-batch.
        checkpointing: whether gradient checkpointing is on.
        weights: dtype of the master weights.
        peft: options of an adapter, or none.
        seconds: time per contender, from its first step on.
    """

    size: ModelSize
    shapes: dict[str, Shape]
    micro_batch_size: int
    checkpointing: bool = False
    weights: str = "float32"
    peft: dict[str, Any] | None = None
    seconds: float = 10


SETTINGS = {
    "1b": Setting(MODELS["1b"], SHAPES, micro_batch_size=8),
    "3b": Setting(MODELS["3b"], SHAPES, micro_batch_size=4, checkpointing=True),
    "8b_lora": Setting(
        MODELS["8b"],
        {**SHAPES, "2,048 tokens": Shape(1280, 384)},
        micro_batch_size=1,
        checkpointing=True,
        weights="bfloat16",
        peft=LORA,
    ),
}
ON_CPU = Setting(TINY, {"hh": SHAPES["hh"]}, micro_batch_size=2, seconds=1)
BATCH = 32  # pairs of an optimizer step; on a CPU 4
ENOUGH = 180.0  # seconds: with more time left, each contender gets all of its own
LEARNING_RATE = 1e-6


def run(sheet: Sheet) -> None:
    """Measures all contenders, each in a new process."""
    race = Race(sheet)
    for contenders in ROUNDS:
        for shape in race.setting.shapes:
            for who in contenders:
                race.measure(shape, who)


class Race:
    """Measures contenders, and compares their losses with those of the first one on the same rows.

    Args:
        sheet: takes down the results.
    """

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.setting = SETTINGS[sheet.model] if sheet.is_gpu else ON_CPU
        self.batch = BATCH if sheet.is_gpu else 4
        self.losses: dict[str, list[float]] = {}  # by shape: of its first contender
        self.pairs: dict[tuple[str, str], float] = {}  # per second, by shape and contender
        self.beyond: dict[tuple[str, str], float] = {}  # MiB beyond weights and optimizer
        self.has_trl = importlib.util.find_spec("trl") is not None
        if not self.has_trl:
            sheet.skip("TRL", "it is not installed")

    def measure(self, shape: str, who: str) -> None:
        """Measures one contender on one shape of rows."""
        contender = CONTENDERS[who]
        if contender["side"] == "trl" and not self.has_trl:
            return
        setting = self.setting
        workload = self._workload(shape)
        try:
            result = apart(_contender, self._job(workload, contender))
        except RuntimeError as error:
            self.sheet.row("Pairs per second", rows=shape, contender=who, failed=str(error)[:200])
            self.sheet.check(f"{who}, {shape}: runs", float("nan"), 0)
            return
        seconds = result["seconds"][1:] or result["seconds"]  # the second step may still compile
        pairs = self.pairs[shape, who] = self.batch / median(seconds)
        self.beyond[shape, who] = result["beyond_mib"]
        num_forwards = 3 + (not contender["cache"]) - (setting.peft is not None)
        flops = apart(flops_per_pair, workload, num_forwards)
        first = self.losses.setdefault(shape, result["losses"][:3])
        off = max(abs(a - b) for a, b in zip(first, result["losses"], strict=False))
        self.sheet.row(
            "Pairs per second",
            rows=shape,
            contender=who,
            **{
                "pairs/s": pairs,
                "MFU on unique tokens": pairs * flops / self.sheet.rate,
                "peak GiB": result["peak_mib"] / 1024,
                "beyond weights and optimizer, GiB": result["beyond_mib"] / 1024,
                "steps": len(result["losses"]),
                "losses off by": off,
            },
        )
        if setting.peft is None:  # of adapters the two sides draw different weights
            self.sheet.check(f"{who}, {shape}: first three losses", off, 0.01 if self.sheet.is_gpu else 1e-3)
        own = shape, who.replace("TRL", "ours")
        if contender["side"] == "trl" and own in self.pairs:
            self.sheet.row(
                "Ours over TRL",
                rows=shape,
                reference=who.removeprefix("TRL, "),
                **{
                    "pairs/s": self.pairs[own] / pairs,
                    "memory beyond weights and optimizer": self.beyond[own] / self.beyond[shape, who],
                },
            )

    def _workload(self, shape: str) -> Workload:
        return make_workload(
            self.sheet.folder / self.sheet.model / shape.replace(" ", "_"),
            self.setting.shapes[shape],
            self.setting.size,
            num_pairs=4 * self.batch,
            batch_size=self.batch,
            with_weights=False,
        )

    def _job(self, workload: Workload, contender: dict[str, Any]) -> dict[str, Any]:
        setting = self.setting
        return {
            "sharing": True,
            "workload": workload._asdict(),
            "device": self.sheet.device,
            "weights": setting.weights,
            "batch_size": self.batch,
            "micro_batch_size": setting.micro_batch_size,
            "steps": 10_000,
            # Half of it if other steps need their share of the check's time.
            "seconds": setting.seconds if self.sheet.left > ENOUGH else setting.seconds / 2,
            "learning_rate": LEARNING_RATE,
            "gradient_checkpointing": setting.checkpointing,
            "trl_attention": "sdpa",
            "in_memory": True,
            "peft": setting.peft,
            **contender,
            "options": {"trainer.max_epochs": -1, **contender.get("options", {})},
        }


def _contender(job: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # what trainers write goes with it
        return {"trl": run_trl, "ours": run_ours}[job["side"]](job)
