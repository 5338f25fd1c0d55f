"""Fully sharded training, by Lightning's strategy for FSDP2.

Lightning's older ``FSDPStrategy`` (FSDP1) is not used: it refuses gradient clipping by its ordinary options, cannot
run on a CPU, where this is tested, and PyTorch develops its successor alone.
"""

import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

from lit_isdpo.evaluation.store import naming
from lit_isdpo.policy.logprob_model import LogProbModel
from lit_isdpo.policy.sharding import Sharding
from lit_isdpo.training.checkpoint_files import StoredCheckpoint, plain_values_only, unreadable
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.models import check_tensors
from lit_isdpo.training.optimization import as_one_group, check_state
from lit_isdpo.types import InputError

NAME = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Each rank holds a shard of weights, gradients and optimizer states, and reads batches of its own.

    Args:
        shard_size: ranks that share one copy of the weights; the copies are averaged as in DDP (HSDP). The ranks of a
            node, say, where the network between nodes is slow. Default: all ranks share one.
        cpu_offload: keep shards, gradients and optimizer states in the memory of the host.
        save_distributed_checkpoint: write checkpoints as folders to which each rank writes its part; else as one file,
            for which rank 0 assembles all.
        timeout_minutes: how long a rank waits for the others before it gives up.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: int = 30,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            # Collectives on shards in the host's memory run there.
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.shard_size = shard_size
        self.writes_folders = save_distributed_checkpoint
        self.cpu_offload = cpu_offload
        self.sharding: Sharding | None = None

    def setup_environment(self) -> None:
        """Joins the ranks, and divides them.

        Raises:
            InputError: ``shard_size`` does not divide their number.
        """
        super().setup_environment()
        self.sharding = Sharding.over(self.world_size, self.shard_size, self.root_device, cpu_offload=self.cpu_offload)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each rank reads batches of its own; Lightning's mesh would mean the same batch for all ranks of a node."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Between the micro-batches of a step, copies of the model (``shard_size``) do not average gradients yet.

        Those of one copy are reduced in each: whole gradients would have to be kept to put that off.
        """
        assert self.model is not None
        roots = [child for child in self.model.children() if isinstance(child, FSDPModule)]
        for root in roots:
            root.set_requires_all_reduce(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_all_reduce(True)

    def model_to_device(self) -> None:
        """Moves what is not sharded: metrics."""
        assert self.model is not None
        for child in self.model.children():
            if not isinstance(child, LogProbModel):
                child.to(self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes each rank's part, and from rank 0 all else, which other ranks then read without its GPU.

        A folder has another name until it is whole.
        """
        extras = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        checkpoint |= move_data_to_device(extras, torch.device("cpu"))
        path = Path(self.broadcast(filepath))
        if not self.writes_folders:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        temporary = path.with_suffix(".saving")
        self._remove(temporary)  # of a save that was cut off
        self.barrier(f"{path.name} begins")
        try:
            with naming(path):
                super().save_checkpoint(checkpoint, temporary, storage_options)
        except BaseException:
            self._remove(temporary)  # it may be what fills the disk
            raise
        self.barrier(f"{path.name} is written")
        self._remove(path)
        if self.is_global_zero:
            temporary.rename(path)

    def _remove(self, folder: Path) -> None:
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer states, resharded where the ranks are others than those that wrote them.

        Raises:
            InputError: the checkpoint cannot be read, or is of another model.
        """
        assert isinstance(self.lightning_module, LanguageModule)
        path = Path(self.broadcast(checkpoint_path))
        has_state = all(self.lightning_module.ranks.on_all(lambda: self._check(path)))
        optimizers = self.optimizers
        if not has_state:  # PyTorch and Lightning would look for some; the optimizer begins with its own
            self.optimizers = []
        # Of a policy with an adapter a checkpoint has only the adapter; the names were compared above.
        self.lightning_module.strict_loading = False
        try:
            with plain_values_only(), ExitStack() as one_group:
                # PyTorch asks a folder for the options of each group, and the checkpoint may have others.
                for optimizer in self.optimizers:
                    one_group.enter_context(as_one_group(optimizer, self._trained))
                return super().load_checkpoint(path, weights_only=True)
        except (CheckpointException, UnpicklingError) as error:
            raise InputError(unreadable(path)) from error
        finally:
            self.optimizers = optimizers

    def _check(self, path: Path) -> bool:
        """Compares a checkpoint with what it is to be loaded into; whether it has any state of an optimizer."""
        stored, module = StoredCheckpoint(path), cast(LanguageModule, self.lightning_module)
        stored.check(self.global_rank, self.world_size)
        check_tensors(module, stored.shapes)
        # A file numbers the parameters of its optimizer: as they are in the whole model where FSDP2 wrote it, else as
        # they are among those that are trained.
        trained = [parameter.requires_grad for parameter in module.parameters()]
        for state in stored.extras.get("optimizer_states", ()):
            numbers = sorted(number for group in state["param_groups"] for number in group["params"])
            if not all(trained) and numbers != [number for number, is_trained in enumerate(trained) if is_trained]:
                raise InputError(
                    f"ckpt_path: {str(path)!r} has the optimizer of an adapter that another strategy trained; go on "
                    "with that one, or export the adapter's policy and begin anew from it."
                )
        if self.optimizers:
            check_state(module.make_optimizer, self._trained, stored.optimizer_state)
        return bool(stored.optimizer_state)

    @property
    def _trained(self) -> list[Parameter]:
        """What the optimizer has, in the order of the model."""
        assert self.lightning_module is not None
        return [parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad]


StrategyRegistry.register(NAME, FSDP2Strategy, description="Fully sharded data parallelism (FSDP2)")
