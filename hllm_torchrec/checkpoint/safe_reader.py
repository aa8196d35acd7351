"""Reads the `.metadata` of a distributed checkpoint, which is a pickle, without executing code from it.

`torch.distributed.checkpoint` (DCP) unpickles that file without restrictions, and loads non-tensor ("byte") entries
with `weights_only=False`. Here the unpickler replaces each class in the pickle by a record class, which has no methods
and accepts no attributes. DCP's objects are then built from the checked contents of the records, and byte entries are
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
    """Metaclass of records; it prevents the pickle from setting attributes of the class."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name!r} on a class")


class _Record(metaclass=_Sealed):
    """Replacement of an object in the pickle: stores the arguments of its constructor and its state."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


#: module -> names that the pickle may refer to; each is replaced by a record class.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",  # refused later than other names, by an error that contains the key of the entry
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
    """DCP's file reader, restricted to metadata of tensors in the checkpoint's directory."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked contents of `<path>/.metadata`. DCP's arguments are ignored.

        Raises:
            ValueError: the file is missing, is not metadata, names a class that is not allowed, or describes an entry
                that is not a tensor or is stored outside the checkpoint's directory.
            OSError: the machine could not read the file.
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
                    f"{self.path}: entry {index.fqn!r} is stored outside the checkpoint, in {name!r}; {_REMEDY}"
                )
            if not info.offset >= 0 < info.length:
                raise ValueError(
                    f"{self.path}: entry {index.fqn!r} has a negative offset or no bytes in {name!r}; {_REMEDY}"
                )
        return metadata

    def read_tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return dotted key -> metadata (size, dtype, chunks) of each tensor; raises as `read_metadata`."""
        return cast(dict[str, TensorStorageMetadata], self.read_metadata().state_dict_metadata)


_REMEDY = "hllm_torchrec never writes that: do not load this checkpoint"


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves only the names in `_ALLOWED`, each to its record class."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a class of tensor metadata")
        return _RECORDS[name]


def _unpickle(path: Path) -> Metadata:
    """Unpickle a `.metadata` file; any problem of its contents is raised as a ValueError with the path."""
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
    """Build DCP's metadata from its record, without fields of planners and storage that loading does not read."""
    fields = _fields(record, "Metadata")
    entries = _mapping(fields.get("state_dict_metadata"), lambda key: _of(str, key), _entry)
    return Metadata(
        state_dict_metadata=entries,
        storage_data=_mapping(fields.get("storage_data"), _index, _storage_info),
        version=None if fields.get("version") is None else _of(str, fields["version"]),
    )


def _entry(record: Any) -> STORAGE_TYPES:
    if isinstance(record, _RECORDS["BytesStorageMetadata"]):
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _of(list, fields.get("chunks"))]
    return TensorStorageMetadata(
        # DCP reads only the dtype; the other properties are deprecated.
        properties=TensorProperties(dtype=_dtype(fields.get("properties"))),
        size=_size(fields.get("size")),
        chunks=[ChunkStorageMetadata(_size(chunk.get("offsets")), _size(chunk.get("sizes"))) for chunk in chunks],
    )


def _dtype(properties: Any) -> torch.dtype:
    """Return the dtype, which is the first value of the state of a TensorProperties record."""
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


def _storage_info(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError("compressed tensors")
    return _StorageInfo(*(_of(kind, fields.get(name)) for name, kind in _STORAGE_FIELDS.items()))


_STORAGE_FIELDS = {"relative_path": str, "offset": int, "length": int}


def _fields(record: Any, name: str) -> dict[str, Any]:
    """Return the state of a record that replaces an object of class `name`; raise ValueError for another record."""
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
    """Return `value`; raise ValueError if it is not of exactly this type."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} is expected")
    return value
