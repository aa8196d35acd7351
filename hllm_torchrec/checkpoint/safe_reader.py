"""Reads the `.metadata` of a distributed checkpoint, a pickle, without executing code from it.

`torch.distributed.checkpoint` (DCP) unpickles that file unrestricted, and loads non-tensor ("byte") entries
with `weights_only=False`. Here each class that the pickle names is replaced by a record without behavior, to which
nothing can be attached; DCP's objects are then built from the checked contents of these records, and byte entries are
refused.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hllm_torchrec.common.machine_errors import is_machine_error

T = TypeVar("T")


class _Sealed(type):
    """Metaclass of records: the pickle can set no attribute on a class."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name!r} on a class")


class _Record(metaclass=_Sealed):
    """Record of an object in the pickle: the arguments it was made with and its state."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


#: module -> names that the pickle may refer to; each stands for a record.
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
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module in Python 3.13
}
_RECORDS = {name: _Sealed(name, (_Record,), {"__slots__": ()}) for names in _ALLOWED.values() for name in names}


class SafeReader(FileSystemReader):
    """DCP's file reader, restricted to metadata of tensors in this directory."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked contents of `<path>/.metadata`; the arguments are DCP's own and are not used.

        Raises:
            ValueError: the file is missing, is not metadata, names a class that is not allowed, or describes
                an entry that is not a tensor or is stored outside the checkpoint's directory.
            OSError: it cannot be read for another reason.
        """
        metadata = _unpickle(Path(self.path) / ".metadata")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(
                    f"{self.path}: entry {key!r} is not a tensor and would have to be unpickled; {_REMEDY}"
                )
        for index, info in metadata.storage_data.items():
            name = info.relative_path
            if Path(name).name != name or (Path(self.path) / name).is_symlink():
                raise ValueError(
                    f"{self.path}: entry {index.fqn!r} is kept outside the checkpoint, in {name!r}; {_REMEDY}"
                )
            if not info.offset >= 0 < info.length:
                raise ValueError(f"{self.path}: entry {index.fqn!r} has no place in {name!r}; {_REMEDY}")
        return metadata

    def read_tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return the checkpoint's tensors: dotted key -> size, dtype, chunks; raises as `read_metadata`."""
        return cast(dict[str, TensorStorageMetadata], self.read_metadata().state_dict_metadata)


_REMEDY = "hllm_torchrec never writes that: do not load this checkpoint"


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves the names in `_ALLOWED` only, and to records."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a class of tensor metadata")
        return _RECORDS[name]


def _unpickle(path: Path) -> Metadata:
    """Unpickle one `.metadata` file; every problem of its contents becomes a ValueError that names the file."""
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{path} cannot be read: there is no such file, or it is not a plain one; {_REMEDY}")
    contents = path.read_bytes()
    try:
        found = _RestrictedUnpickler(io.BytesIO(contents)).load()
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        if is_machine_error(error):
            raise
        raise ValueError(f"{path} cannot be read: {error}; {_REMEDY}") from error
    try:
        return _metadata(found)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}, not the metadata of a checkpoint; {_REMEDY}") from error


def _metadata(record: Any) -> Metadata:
    """Build DCP's metadata; what loading does not read (of planners, of storage) is left out."""
    fields = _fields(record, "Metadata")
    entries = _mapping(fields.get("state_dict_metadata"), lambda key: _of(str, key), _entry)
    return Metadata(
        state_dict_metadata=entries,
        storage_data=_mapping(fields.get("storage_data"), _index, _place),
        version=None if fields.get("version") is None else _of(str, fields["version"]),
    )


def _entry(record: Any) -> STORAGE_TYPES:
    if isinstance(record, _RECORDS["BytesStorageMetadata"]):
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _of(list, fields.get("chunks"))]
    return TensorStorageMetadata(
        # Of the properties DCP reads the dtype alone; the others are deprecated.
        properties=TensorProperties(dtype=_dtype(fields.get("properties"))),
        size=_size(fields.get("size")),
        chunks=[ChunkStorageMetadata(_size(chunk.get("offsets")), _size(chunk.get("sizes"))) for chunk in chunks],
    )


def _dtype(properties: Any) -> torch.dtype:
    """Return the dtype, the first value of the properties' state."""
    state = properties.state if isinstance(properties, _RECORDS["TensorProperties"]) else None
    name = state[0].__name__ if isinstance(state, tuple) and state and isinstance(state[0], _Sealed) else ""
    return _of(torch.dtype, getattr(torch, name, None))


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _of(str, fields.get("fqn")),
        None if offset is None else _size(offset),
        None if index is None else _of(int, index),
    )


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError("compressed tensors")
    return _StorageInfo(*(_of(kind, fields.get(name)) for name, kind in _PLACE.items()))


_PLACE = {"relative_path": str, "offset": int, "length": int}


def _fields(record: Any, name: str) -> dict[str, Any]:
    """State of a record of the class `name`."""
    if not isinstance(record, _RECORDS[name]):
        raise ValueError(f"a {type(record).__name__}")
    return _of(dict, record.state)


def _size(record: Any) -> torch.Size:
    numbers = record.args[0] if isinstance(record, _RECORDS["Size"]) and len(record.args) == 1 else None
    sizes = [_of(int, number) for number in _of(tuple, numbers)]
    if not all(0 <= number < 2**63 for number in sizes):
        raise ValueError("a size out of range")
    return torch.Size(sizes)


def _mapping(found: Any, key: Callable[[Any], Any], value: Callable[[Any], T]) -> dict[Any, T]:
    return {key(name): value(content) for name, content in _of(dict, found).items()}


def _of(kind: type[T], value: Any) -> T:
    """`value`, which must be of exactly this type."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} for a {kind.__name__}")
    return value
