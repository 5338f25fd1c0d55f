"""The private parts of libraries that the package stands on: why each is used, and what it must go on doing.

A part that a library moves or changes is found here, and not in a run that is silently wrong.
"""

import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_isdpo.cli import main
from lit_isdpo.commands.plan import ACTIVATIONS, GATHERED, CostRecorder
from lit_isdpo.policy.attention import IN_PARTS, kernel_of, set_kernel, why_not_shared
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.sharding import _computed_buffers
from lit_isdpo.training.strategy import FSDP2Strategy
from tests.runs import newest_run, read_metrics
from tests.tools.house import structure

PARTS = {
    # torch 2.13
    "torch._subclasses.fake_tensor": "FakeTensorMode: tensors with storages and no memory, which `plan` runs a step on;"
    " the only public way to it is an exporter's",
    "torch.utils._python_dispatch": "TorchDispatchMode: sees each operation, as PyTorch's own counters do",
    # transformers 5.24
    "_attn_implementation": "the only name of the attention that a model has; the public setter warns about models that"
    " a trial decides on",
    "_init_weights": "computes the buffers that no file has of one module; the public function draws all weights anew",
    # datasets 5.2
    "_fingerprint": "names the rows of a table, for the caches of what is made of them, without reading them",
    # Lightning 2.6
    "_logger_connector": "logs the step that an interrupt ends the fit after",
    "_version": "tells a version that was given from one that is looked up when it is asked for",
}
"""Why each is used. The versions are those that the tests below were last looked at with."""

LLAMA = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="sdpa")).eval()


def test_the_table_is_what_the_package_uses() -> None:
    package = Path(structure.lit_isdpo.__file__).parent
    found = {*structure.overridden(structure.classes()), *structure.used(package)}
    assert {line.rpartition(" ")[2] for line in found} == PARTS.keys()


def test_a_fingerprint_names_the_rows_of_a_table() -> None:
    table = datasets.Dataset.from_dict({"a": [1, 2, 3]})
    others = [table.select([0, 1]), table.select([0, 2]), datasets.Dataset.from_dict({"a": [1, 2, 4]})]
    assert len({table._fingerprint, *(other._fingerprint for other in others)}) == 4
    assert table.select([0, 1])._fingerprint == others[0]._fingerprint


def test_a_recorder_sees_operations_without_values() -> None:
    """FakeTensorMode and TorchDispatchMode."""
    recorder = CostRecorder()
    a, picked = recorder.without_values((torch.ones(30, 40), torch.ones(30, dtype=torch.bool)))
    with recorder:
        product = a @ a.T
        assert recorder.flops == 2 * 30 * 40 * 30
        assert recorder.peak[ACTIVATIONS] == 4 * (30 * 30 + 30 * 40), (
            "the product, and the tensor that it was seen with"
        )
        del product
        assert a.sum().item() == 1.0, "a number"
        assert not picked.any().item(), "a truth"
        assert a[picked].shape == (30, 40), "all that a mask may pick"
        attended = torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 5, 8)] * 3)
        assert attended.shape == (1, 2, 5, 8)
    assert recorder.flops == 2 * 30 * 40 * 30 + 2 * 2 * 5 * 5 * (8 + 8)


def test_a_recorder_sees_storages_that_are_emptied_and_filled_again() -> None:
    """FSDP does so by ``UntypedStorage.resize_``, which is public and no operation: it is patched."""
    before, recorder = torch.UntypedStorage.resize_, CostRecorder()
    with recorder:
        storage = torch.empty(1000).untyped_storage()
        storage.resize_(0)
        recorder.reset_peak()
        storage.resize_(4000)
        assert (recorder.peak[GATHERED], recorder.peak.total()) == (4000, 4000)
    assert torch.UntypedStorage.resize_ is before


def test_packed_rows_are_looked_for_under_the_name_that_plan_patches() -> None:
    """``find_packed_sequence_indices`` reads values, of which a plan has none."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", asked.append)
        llama()(input_ids=torch.arange(4)[None], position_ids=torch.arange(4)[None], use_cache=False)
    assert asked


def test_layers_look_up_their_attention_at_each_call_and_other_models_keep_theirs() -> None:
    """``_attn_implementation``."""
    model, other = LogProbModel(llama()), llama()
    calls: list[nn.Module] = []

    def spy(module: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(module)
        return sdpa_attention_forward(module, *args, **options)

    assert why_not_shared(model) is None
    assert model.model.config._attn_implementation == IN_PARTS
    assert kernel_of(model.model.config) == kernel_of(other.config) == "sdpa", "to users it is sdpa"
    assert "_attn_implementation" not in str(model.model.config.to_dict()), "no file names it"
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward, "what other models use is untouched"
    AttentionInterface.register("spy", spy)
    set_kernel(model.model.config, "spy")
    ids = torch.arange(4)[None]
    assert torch.equal(model.model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert len(calls) == LLAMA["num_hidden_layers"]


def test_a_module_computes_the_buffers_that_no_file_has() -> None:
    """``_init_weights``."""
    computed = _computed_buffers(llama("meta"))
    assert computed
    expected = dict(llama().named_buffers())
    assert computed.keys() == expected.keys()
    for name, value in computed.items():
        assert torch.equal(value, expected[name]), name


class InterruptAt(Callback):
    """Presses Ctrl-C in an optimizer step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_step_is_logged_once(tiny: list[str], tmp_path: Path) -> None:
    """``_logger_connector``."""
    options = [f"--trainer.callbacks+={__name__}.InterruptAt", "--trainer.max_steps=5", "--probe.num_prompts=0"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *tiny, *options, f"--trainer.default_root_dir={tmp_path}"])
    assert end.value.code == 130
    assert set(read_metrics(newest_run(tmp_path))["train/loss"]) == {0, 1}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_logger_knows_whether_its_version_was_given(kind: Any, tmp_path: Path) -> None:
    """``_version``."""
    assert kind(tmp_path, version=7)._version == 7
    logger = kind(tmp_path, name="")
    assert logger._version is None
    logger._version = 3
    assert Path(logger.log_dir) == tmp_path / "version_3"


def test_each_rank_reads_batches_of_its_own() -> None:
    """Public, but Lightning's own would be one batch for all ranks of a node."""

    class Ranks:
        def world_size(self) -> int:
            return 4

        def global_rank(self) -> int:
            return 3

    strategy = FSDP2Strategy()
    strategy.cluster_environment = Ranks()  # type: ignore[assignment]
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 3}
