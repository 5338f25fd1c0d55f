"""A checkpoint as it lies on the disk: one file, or a folder to which each rank wrote its part.

Both are pickles, which may be made to run code as they are read. So only tensors and plain values are.
"""

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lit_isdpo.evaluation.store import write_whole
from lit_isdpo.policy.sharding import read_tensors
from lit_isdpo.types import InputError

EXTRAS = "meta.pt"  # Lightning's name, in a folder, for all but tensors of the model and the optimizer
TENSORS = "state_dict."  # before the model's names in a folder
OPTIMIZER = "optimizer_0.state."  # before a parameter's name and that of a tensor of its state, in a folder
INDEX = ".metadata"  # torch's name, in a folder, for what lies where
INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}
PLAIN_ONLY, ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's switches


class StoredCheckpoint:
    """Reads a checkpoint of either kind, without any process beside this one.

    Args:
        path: the file or the folder.

    Attributes:
        path: the file or the folder.
        is_folder: whether each rank wrote its part.
        extras: everything but tensors of the model and the optimizer; for a file these too.

    Raises:
        InputError: there is none, or it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise InputError(f"ckpt_path: no such checkpoint: {str(path)!r}.")
        self.is_folder = path.is_dir()
        try:
            if self.is_folder:
                self._metadata = _read_index(path)
            self.extras: dict[str, Any] = torch.load(
                path / EXTRAS if self.is_folder else path, map_location="cpu", weights_only=True, mmap=True
            )
        except Exception as error:  # torch raises whatever its parts raise
            raise InputError(unreadable(path)) from error

    def check(self, share: int = 0, of: int = 1) -> None:
        """Reads all of it once, and compares with the checksums that PyTorch wrote: it looks at none when it loads.

        Args:
            share: of a folder's parts, those that this rank reads, from 0.
            of: how many ranks share the work.

        Raises:
            InputError: something is not as it was written.
        """
        try:
            if not self.is_folder:
                is_whole = _is_whole(self.path)
            else:
                parts = sorted({(p.relative_path, p.offset, p.length) for p in self._metadata.storage_data.values()})
                is_whole = _is_whole(self.path / EXTRAS) and all(
                    _is_whole(self.path / name, offset, length) for name, offset, length in parts[share::of]
                )
        except (OSError, ValueError, EOFError, NotImplementedError, BadZipFile):
            # A flipped bit in an offset, a name or a compression method is met by whatever of zipfile reads that first.
            is_whole = False
        if not is_whole:
            raise InputError(
                f"ckpt_path: {str(self.path)!r} is damaged: it is not what was written; use another checkpoint."
            )

    @cached_property
    def shapes(self) -> Mapping[str, Tensor]:
        """The model's tensors by name; of a folder without values, on the meta device."""
        if not self.is_folder:
            tensors: dict[str, Tensor] = self.extras.get("state_dict", {})
            return tensors
        return {
            key.removeprefix(TENSORS): torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
            for key, stored in self._metadata.state_dict_metadata.items()
            if key.startswith(TENSORS) and isinstance(stored, TensorStorageMetadata)
        }

    @cached_property
    def optimizer_state(self) -> set[str]:
        """The names of what the optimizer keeps for parameters (``exp_avg``); none, if it keeps nothing."""
        if self.is_folder:
            names = self._metadata.state_dict_metadata
            return {name.rpartition(".")[2] for name in names if name.startswith(OPTIMIZER)}
        states = self.extras.get("optimizer_states", [])
        return {name for state in states for own in state["state"].values() for name in own}

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without that beginning; as ``shapes``."""
        return {name.removeprefix(prefix): t for name, t in self.shapes.items() if name.startswith(prefix)}

    def read(self, prefix: str) -> dict[str, Tensor]:
        """As ``under``, with values: of a file they stay on the disk until they are used."""
        tensors = self.under(prefix)
        if self.is_folder:
            tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
            self.read_into(prefix, tensors)
        return tensors

    def read_into(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Fills tensors on the CPU; their names and shapes are those of ``under``."""
        if not self.is_folder:
            stored = self.under(prefix)
            for name, tensor in tensors.items():
                tensor.copy_(stored[name])
            return
        state: dict[str, Any] = {f"{TENSORS}{prefix}{name}": tensor for name, tensor in tensors.items()}
        read_tensors(state, FileSystemReader(self.path))


def unreadable(path: Path) -> str:
    """The sentence for a checkpoint that cannot be read."""
    return (
        f"ckpt_path: {str(path)!r} cannot be read as a checkpoint; it is cut short, or holds more than tensors and "
        "plain values, which is not loaded, as it could run code."
    )


@contextmanager
def plain_values_only() -> Iterator[None]:
    """Lets ``torch.load`` read nothing else in here, whatever it is told; a sharded checkpoint's reader tells it to."""
    before = {name: os.environ.pop(name, None) for name in (PLAIN_ONLY, ANYTHING)}
    os.environ[PLAIN_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[PLAIN_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


class _IndexReader(pickle.Unpickler):
    """Makes what an index consists of, and nothing else: torch reads it as any pickle."""

    def find_class(self, module: str, name: str) -> Any:
        own = getattr(metadata, name, None) if module == metadata.__name__ else None
        is_known = (module, name) in INDEX_NAMES or (isinstance(own, type) and own.__module__ == module)
        if is_known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_index(folder: Path) -> Metadata:
    """Reads which tensors a folder holds, and in which of its files."""
    with (folder / INDEX).open("rb") as file:
        index = _IndexReader(file).load()
    if not isinstance(index, Metadata):
        raise TypeError(type(index).__name__)
    for stored in (index.storage_data or {}).values():
        if Path(stored.relative_path).name != stored.relative_path:
            raise ValueError(f"{stored.relative_path} is outside the folder")
    return index


class CheckpointFiles(TorchCheckpointIO):
    """Files that are there whole or not at all, and are read only where they are what was written.

    Lightning's own are put together in memory, twice, and then in the folder for temporary files, which may be small
    and keeps what a kill leaves there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes straight to the disk, where the file stays.

        Raises:
            OSError: there is no room, or no permission; what was there before still is.
        """
        write_whole(Path(path), partial(_write, checkpoint))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads what is whole.

        Raises:
            InputError: it cannot be read, or is damaged.
        """
        StoredCheckpoint(Path(path)).check()
        return super().load_checkpoint(path, *args, **kwargs)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch says that its writer failed, not why
            cause = error.__cause__ or error.__context__
            raise cause if isinstance(cause, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())  # before the file takes the name of the one before


def _is_whole(path: Path, offset: int = 0, length: int = -1) -> bool:
    """Whether what ``torch.save`` wrote there has its checksums: it is a zip archive."""
    with path.open("rb") as file:
        file.seek(offset)
        stream = file if length < 0 else BytesIO(file.read(length))
        with ZipFile(stream) as archive:
            return archive.testzip() is None
