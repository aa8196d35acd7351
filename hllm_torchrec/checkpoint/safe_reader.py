"""Reads the `.metadata` of a distributed checkpoint, a pickle, without executing code from it.

`torch.distributed.checkpoint` (DCP) unpickles that file unrestricted, and loads non-tensor ("byte") entries
with `weights_only=False`. Here only classes that describe tensors are allowed, and byte entries are refused.
"""

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from hllm_torchrec.common.machine_errors import is_machine_error

#: module -> names that the pickle may refer to. All are constructors of plain records; none executes anything else.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",  # an empty record; allowed so that the error can name the entry
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # looks up a name in a fixed table
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module in Python 3.13
}


class SafeReader(FileSystemReader):
    """DCP's file reader, restricted to metadata of tensors in this directory."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked contents of `<path>/.metadata`; the arguments are DCP's own and are not used.

        Raises:
            ValueError: the file is missing, is not metadata, names a class that is not allowed, or describes
                an entry that is not a tensor or is stored outside the checkpoint's directory.
        """
        metadata = _unpickle(Path(self.path) / ".metadata")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(
                    f"{self.path}: entry {key!r} is not a tensor and would have to be unpickled; {_REMEDY}"
                )
        for index, info in metadata.storage_data.items():
            name = info.relative_path
            if not isinstance(name, str) or Path(name).name != name or (Path(self.path) / name).is_symlink():
                raise ValueError(
                    f"{self.path}: entry {index.fqn!r} is kept outside the checkpoint, in {name!r}; {_REMEDY}"
                )
            if not (isinstance(info.offset, int) and isinstance(info.length, int) and info.offset >= 0 < info.length):
                raise ValueError(f"{self.path}: entry {index.fqn!r} has no place in {name!r}; {_REMEDY}")
        return metadata

    def read_tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return the checkpoint's tensors: dotted key -> size, dtype, chunks; raises as `read_metadata`."""
        return cast(dict[str, TensorStorageMetadata], self.read_metadata().state_dict_metadata)


_REMEDY = "hllm_torchrec never writes that: do not load this checkpoint"


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves the names in `_ALLOWED` only."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a class of tensor metadata")
        return super().find_class(module, name)


def _unpickle(path: Path) -> Metadata:
    """Unpickle one `.metadata` file; every problem becomes a ValueError that names the file."""
    try:
        with path.open("rb") as stream:
            metadata = _RestrictedUnpickler(stream).load()
    except Exception as error:  # a damaged pickle raises almost anything
        if is_machine_error(error):
            raise
        raise ValueError(f"{path} cannot be read: {error}; {_REMEDY}") from error
    if not isinstance(metadata, Metadata) or not _is_whole(metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint; {_REMEDY}")
    return metadata


def _is_whole(metadata: Metadata) -> bool:
    """Return whether all records have the right types: a damaged pickle may have any object anywhere."""
    storage, entries = getattr(metadata, "storage_data", None), getattr(metadata, "state_dict_metadata", None)
    if not isinstance(storage, dict) or not isinstance(entries, dict):
        return False
    places = all(isinstance(key, MetadataIndex) and hasattr(key, "fqn") for key in storage)
    infos = all(hasattr(info, name) for info in storage.values() for name in ("relative_path", "offset", "length"))
    return places and infos and all(isinstance(key, str) and _is_entry(entry) for key, entry in entries.items())


def _is_entry(entry: Any) -> bool:
    """Return whether an entry has what a tensor needs; entries that are not tensors pass, and are refused later."""
    if not isinstance(entry, TensorStorageMetadata):
        return True
    size, chunks = getattr(entry, "size", None), getattr(entry, "chunks", None)
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    return (
        isinstance(size, torch.Size)
        and isinstance(dtype, torch.dtype)
        and isinstance(chunks, list)
        and all(isinstance(getattr(c, n, None), torch.Size) for c in chunks for n in ("offsets", "sizes"))
    )
