"""The state of a sharded run on disk: every rank writes its part, and any number of ranks reads what it needs.

The files are those of `torch.distributed.checkpoint`: for each rank a `__N_0.distcp` with its pieces, and `.metadata`,
which says where each piece of each tensor is. A run that goes on with another number of ranks, or with one, asks for
other pieces and gets them from whatever files they are in.

`.metadata` is a pickle, and a pickle may run code. So only the plain classes that it consists of are accepted here:
a checkpoint is data.

`torch.distributed.checkpoint` takes half as long to import as all of torch, so this file is imported only when a run is
sharded.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from minift.distributed.sharding import METADATA
from minift.errors import InputError

# What a `.metadata` consists of, by module and name.
_PLAIN = {
    *((metadata.__name__, name) for name in vars(metadata) if name[0].isupper() or name == "_MEM_FORMAT_ENCODING"),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
# The name of the folder is in it, too, as a path; the module is that of Python 3.13.
_PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "WindowsPath")}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this rank's part of some tensors into a folder that is there. Every rank must ask."""
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=not dist.is_initialized())


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill some tensors, sharded or whole, with what a folder has under their names. Every rank must ask.

    Raises:
        InputError: for a damaged file, a tensor that is not there, or one of another shape.
    """
    reader = _Reader(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about one process, which is meant
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(reader.fault or error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{folder}: not the state of such a run: {reason[-1].strip()}") from None


class _Reader(dcp.FileSystemReader):
    fault: Exception | None = None  # of the metadata; PyTorch 2.11 only says that there is none

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        try:
            return self._metadata()
        except Exception as error:
            self.fault = error
            raise

    def _metadata(self) -> metadata.Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise ValueError(f"{METADATA} is damaged")
        for place in (found.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{METADATA} leads out of its folder: {place.relative_path}")
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return Path
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"{METADATA} asks for {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)
