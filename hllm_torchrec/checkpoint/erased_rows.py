"""Erasure of embedding rows in a checkpoint: their weights, optimizer state and averages are set to 0.

No model is built. The tensors are read and changed one stored chunk at a time, so a table need not fit into memory. The
changed checkpoint is written to a temporary directory, which then replaces the old one: readers see either of the two.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from hllm_torchrec.checkpoint import layout
from hllm_torchrec.checkpoint.growth import TABLE_KEY, saved_table_rows
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import write_synced

_FACTS = ("schema_version", "world_size", "files", "sha256")
"""Fields of a marker that `layout.commit` computes from the files."""


def erase_rows(
    checkpoint: Path, table: str, rows: Ints, extra: Mapping[str, Any] | None = None, *, dry_run: bool = False
) -> int:
    """Set `rows` of a table to 0 in all tensors of a checkpoint, and replace values in its `extra.json`.

    Args:
        rows: rows of the table; those beyond its end are ignored.
        extra: key -> new value; keys that `extra.json` lacks or has as null are ignored.
        dry_run: only count, and change nothing.

    Returns:
        Number of erased rows that were not 0 in the weights, counted once per stored chunk (column shard), plus 1 if
        `extra.json` changes.

    Raises:
        ValueError: the checkpoint is damaged, or torch writes a chunk with another size than the saved chunk has.
    """
    damage = layout.find_damage(checkpoint)
    if damage:
        raise ValueError(f"{checkpoint} {damage}; remove it")
    metadata = SafeReader(checkpoint).read_metadata()
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    size = saved_table_rows(tensors).get(table, 0)
    sizes = {k: v.size for k, v in tensors.items() if (match := TABLE_KEY.fullmatch(k)) and match["table"] == table}
    old = layout.read_checkpoint_json(checkpoint / "extra.json")
    new = old | {key: value for key, value in (extra or {}).items() if old.get(key) not in (None, value)}
    changed: dict[str, dict[int, bytes]] = {}
    found = 0
    for index, info in metadata.storage_data.items():
        wanted = _rows_of(sizes.get(index.fqn), size, rows[rows < size])
        chunk = _changed_chunk(checkpoint / info.relative_path, info.offset, info.length, index, wanted)
        if chunk is not None:
            changed.setdefault(info.relative_path, {})[info.offset] = chunk[0]
            found += chunk[1] if index.fqn.startswith("model.") else 0
    if (changed or new != old) and not dry_run:
        _rewrite(checkpoint, changed, new)
    return found + (new != old)


def _rows_of(size: torch.Size | None, rows: int, wanted: Ints) -> list[int]:
    """Return the rows of a tensor of this size that belong to the rows `wanted` of a table with `rows` rows.

    Row-wise optimizer state has one vector per column shard, one after the other, so a row of the table occurs in each.
    """
    if size is None or not rows or not size or size[0] % rows:
        return []
    return [copy * rows + row for copy in range(size[0] // rows) for row in wanted.tolist()]


def _changed_chunk(
    path: Path, offset: int, length: int, index: MetadataIndex, rows: list[int]
) -> tuple[bytes, int] | None:
    """Read a stored chunk of a tensor and set `rows` of the tensor to 0 in it.

    Returns:
        (serialized chunk of `length` bytes, number of rows that were not 0), or None if the chunk does not change.
    """
    if not rows:
        return None
    with path.open("rb") as file:
        file.seek(offset)
        chunk = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    first = index.offset[0] if index.offset else 0
    local = [row - first for row in rows if 0 <= row - first < len(chunk)]
    found = sum(bool(chunk[row].any()) for row in local)
    if not found:
        return None
    chunk[local] = 0
    stream = io.BytesIO()
    torch.save(chunk, stream)
    if len(stream.getvalue()) != length:
        raise ValueError(f"{path}: was written by another version of torch: erase with the version that wrote it")
    return stream.getvalue(), found


def _rewrite(checkpoint: Path, changed: Mapping[str, Mapping[int, bytes]], extra: Mapping[str, Any]) -> None:
    """Replace a checkpoint by one with changed bytes (file -> offset -> bytes) and a new `extra.json`."""
    marker = layout.read_marker(checkpoint)
    temporary = layout.create_temporary(checkpoint)
    try:
        for name in marker["files"]:
            if name not in changed and name != "extra.json":
                _link(checkpoint / name, temporary / name)
                continue
            shutil.copyfile(checkpoint / name, temporary / name)
        for name, chunks in changed.items():
            with (temporary / name).open("r+b") as file:
                for offset, data in chunks.items():
                    file.seek(offset)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        write_synced(temporary / "extra.json", json.dumps(extra))
        files = [layout.describe_files(temporary, marker["files"]), *({} for _ in range(marker["world_size"] - 1))]
        facts = {name: value for name, value in marker.items() if name not in _FACTS}
        layout.commit(temporary, checkpoint, facts, files)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(old, new)


def checkpoints_of(run: Path) -> Iterator[Path]:
    """Yield the complete checkpoints of a run, in the order of their steps."""
    for path in layout.checkpoints_by_step(run / "checkpoints"):
        if layout.find_damage(path, check_hashes=False) is None:
            yield path
