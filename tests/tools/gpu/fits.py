"""Twenty steps of a small fit and of a larger one: first step, bit-exact resume, export."""

import math
from pathlib import Path

from safetensors.torch import load_file

from lit_isdpo import cli
from tests.kept import KEPT, KeptCheckpoint
from tests.runs import read_metrics
from tests.tools.gpu.sheet import Sheet
from tests.tools.gpu.training import difference, distance, fit, options, small_workload, weights

HALF, STEPS = 10, 20
PREFIX = "policy.model."
CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def run(sheet: Sheet) -> None:
    """Runs each fit three times: unbroken, unbroken again, and resumed from the middle."""
    device = "gpu" if sheet.is_gpu else "cpu"
    quick = [f"--config={CONFIG}", f"--trainer.accelerator={device}", "--trainer.enable_progress_bar=false"]
    quick += ["--trainer.max_epochs=-1", "--trainer.limit_val_batches=0", "--probe.num_prompts=0"]
    quick += ["--checkpoint.monitor=null"]
    larger = options(sheet, small_workload(sheet, "135m", num_pairs=256), f"--trainer.max_steps={STEPS}")
    _fit(sheet, "quickstart", quick, tolerance=1e-3)
    _fit(sheet, "135M in bf16" if sheet.is_gpu else "tiny in bf16", larger, tolerance=0.02)


def _fit(sheet: Sheet, name: str, arguments: list[str], tolerance: float) -> None:
    root = sheet.folder / name.replace(" ", "_")
    given = [*arguments, f"--trainer.max_steps={STEPS}", f"--last.every_n_steps={HALF}"]
    whole = fit(given, root, KeptCheckpoint(HALF))
    logged = read_metrics(whole)
    first = min(logged["train/loss"])
    sheet.row(
        "Fits",
        fit=name,
        steps=len(logged["train/loss"]),
        **{
            "loss of the first step": logged["train/loss"][first],
            "of the last": logged["train/loss"][max(logged["train/loss"])],
            "pairs/s, last step": logged["perf/pairs_per_second"][max(logged["perf/pairs_per_second"])],
            "peak GiB, last step": logged["perf/peak_memory_gib"][max(logged["perf/peak_memory_gib"])],
        },
    )
    # The fit would have stopped if the log-ratios of its first step were not 0 within the noise.
    sheet.check(f"{name}: loss of the first step less ln 2", abs(logged["train/loss"][first] - math.log(2)), tolerance)
    last = whole / "checkpoints" / "last.ckpt"
    exported = root / "exported"
    cli.main(["export", f"--ckpt_path={last}", f"--output_dir={exported}"])
    own = {key.removeprefix(PREFIX): value for key, value in weights(last).items()}
    read = load_file(exported / "model.safetensors")
    missing = [key for key in read if key not in own]
    off = distance({key: own[key] for key in read if key in own}, {key: read[key] for key in read if key in own})
    sheet.check(f"{name}: exported weights", math.inf if missing else off, 0.0)
    again = fit(given, root)
    resumed = fit([*given, f"--ckpt_path={whole / 'checkpoints' / KEPT}"], root)
    keys = ("train/loss", "train/grad_norm", "train/weights/mean")
    apart = [weights(run / "checkpoints" / "last.ckpt") for run in (whole, again, resumed)]
    noise, of_resume = distance(apart[0], apart[1]), distance(apart[0], apart[2])
    sheet.row(
        "Weights after the last step, largest difference to an unbroken fit",
        fit=name,
        **{"of the same fit again": noise, "of the resumed fit": of_resume},
    )
    sheet.check(f"{name}: resume, weights beyond the noise of the kernels", of_resume, 2 * noise)
    logged_noise = difference(logged, read_metrics(again), keys, first=HALF)
    of_log = difference(read_metrics(resumed), logged, keys, first=HALF + 1)
    sheet.check(f"{name}: resume, what is logged", of_log, 2 * logged_noise)
