"""How fast a fit is, and how near to what the machine could do."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_isdpo.policy.loading import DTYPES
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.reward_model import ScoreModel
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.types import PreferenceBatch, SFTBatch

GIB = 2**30
COUNTS = ("rows", "unique tokens", "tokens", "positions", "completion tokens", "attended pairs of tokens")


class Throughput(Callback):
    """Logs ``perf/{pairs,tokens}_per_second``, ``padding_fraction``, ``mfu`` and ``peak_memory_gib``.

    The rates are means over the time since the last log, rank 0's times the number of ranks; validation is left out,
    the loading of data is not. A pair of a preference run is a demonstration of a supervised one. Tokens are
    unique ones: a pair's prompt counts once, however often it is computed, and padding does not. ``mfu`` is the share
    of the device's matrix-product rate, measured at the start, that goes into useful work: the policy's forward and
    backward and a live reference's forward on those tokens, attention included, recomputation not. The padding
    fraction is that of the positions that are computed. The peak memory is the largest since the last log, validations
    between included: allocated on a GPU, resident of the process on a CPU. If the policy samples in training, a pair is
    a prompt, and the other rates are not logged: most of the time goes into tokens that no batch holds.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._resumed: float | None = None  # when the clock was last set going

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the device."""
        assert isinstance(pl_module, LanguageModule)
        self._peak_flops = matmul_rate(pl_module.device, DTYPES[pl_module.source.compute_dtype])
        reset_peak_memory(pl_module.device)  # the measurement's own products are forgotten
        self._counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the clock going where it stands still."""
        if self._resumed is None:
            self._resumed = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock until the next training batch."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the micro-batch, and logs where Lightning logs."""
        assert isinstance(pl_module, LanguageModule)
        self._counts += count_work(batch)
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if at_step and every > 0 and trainer.global_step % every == 0:
            self._stop(pl_module)
            rates = self._counts.cpu() / self._seconds
            # A backward pass costs two forwards, and one where the weights are frozen under an adapter.
            is_live = pl_module.reference is not None and pl_module.reference.is_live
            num_forwards = 3 + is_live - (pl_module.network.adapter is not None)
            flops = num_forwards * forward_flops(pl_module.network, rates)
            values = {
                "perf/pairs_per_second": trainer.world_size * rates[0],
                "perf/tokens_per_second": trainer.world_size * rates[1],
                "perf/padding_fraction": 1 - rates[2] / rates[3],
                "perf/mfu": flops / self._peak_flops,
                "perf/peak_memory_gib": torch.tensor(peak_memory_gib(pl_module.device)),
            }
            if pl_module.samples:
                values = {key: values[key] for key in ("perf/pairs_per_second", "perf/peak_memory_gib")}
            pl_module.log_dict({key: value.float() for key, value in values.items()})
            reset_peak_memory(pl_module.device)
            self._counts.zero_()
            self._seconds = 0.0

    def _stop(self, pl_module: LightningModule) -> None:
        if self._resumed is not None:
            self._seconds += _now(pl_module.device) - self._resumed
            self._resumed = None


def count_work(batch: PreferenceBatch | SFTBatch) -> Tensor:
    """``COUNTS`` of a micro-batch in any layout, float64, on its device: nothing waits for it here."""
    tokens, device = batch.tokens, batch.tokens.input_ids.device
    first_positions = tokens.position_ids.flatten()[tokens.logit_positions[:, 0]]
    prompts = (first_positions + 1).double()  # (S,) lengths
    completions = tokens.completion_mask.sum(dim=1).double()  # (S,) lengths
    distinct = prompts[: batch.row_ids.numel()]  # the two responses of a pair have the same prompt
    values = [
        torch.full((), batch.row_ids.numel(), device=device),  # torch.tensor would copy it from the host, and wait
        distinct.sum() + completions.sum(),
        tokens.attention_mask.sum(),
        torch.full((), tokens.attention_mask.numel(), device=device),
        completions.sum(),
        distinct.square().sum() / 2 + (completions * prompts + completions.square() / 2).sum(),
    ]
    return torch.stack([value.double() for value in values])


def forward_flops(model: LogProbModel | ScoreModel, counts: Tensor) -> Tensor:
    """Floating-point operations of one forward over ``COUNTS``: 2 a weight and token, 4 H a layer and attended pair."""
    config = model.model.config.get_text_config()
    table = cast(Tensor, model.model.get_input_embeddings().weight)
    embeddings = {id(table): table.numel()}
    head_weights = 0  # a reward model's, one column, are counted with the decoder's
    if isinstance(model, LogProbModel):
        head = cast(Tensor, model.model.get_output_embeddings().weight)
        embeddings[id(head)] = head_weights = head.numel()
    decoder_weights = sum(p.numel() for p in model.parameters()) - sum(embeddings.values())
    _, tokens, _, _, completion_tokens, attended = counts
    attention = 4 * config.num_hidden_layers * config.hidden_size * attended
    flops: Tensor = 2 * decoder_weights * tokens + 2 * head_weights * completion_tokens + attention
    return flops


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the best of a few."""
    is_gpu = device.type == "cuda"
    size, repeats = (8192, 10) if is_gpu else (512, 1)  # bf16 products are slow on many CPUs
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    best = 0.0
    for _ in range(4):  # the first one warms up
        start = _now(device)
        for _ in range(repeats):
            torch.mm(a, a, out=product)
        best = max(best, repeats * 2 * size**3 / (_now(device) - start))
    if is_gpu:
        del a, product
        torch.cuda.empty_cache()  # half a GiB that training would find cut to the wrong sizes
    return best


def _now(device: torch.device) -> float:
    """The time in seconds, once a GPU is done with what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Lets the peak begin anew. On a CPU only Linux can; elsewhere the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no such file, or a container that does not allow it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory since ``reset_peak_memory``: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with suppress(OSError, IndexError):  # no such file, or a sandbox whose file has no such line
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
