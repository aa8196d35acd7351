"""Writing a checkpoint: checked, then written beside and renamed, at once or on a thread of its own."""

import errno
import json
import math
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.remote_runs import publish_checkpoint
from hllm_torchrec.checkpoint.state import check_json, flatten
from hllm_torchrec.common.atomic_files import write_synced
from hllm_torchrec.distributed import coordination

OVERHEAD_BYTES = 2048
"""What a tensor takes in a checkpoint besides its values, generously."""


NO_ROOM = 1 << 20
"""A write that fails where fewer bytes are free has failed for want of room."""


class BackgroundWriter:
    """Writes checkpoints on a thread, one at a time; its ranks talk in a process group of their own (gloo).

    Making one is collective. What fails on the thread is raised by `finish`, on every rank.
    """

    def __init__(self, timeout: float) -> None:
        """timeout: seconds that a rank's thread waits for the others'."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[dist.ProcessGroup], None]) -> None:
        """Run `work` on the thread, with the group."""
        assert self._thread is None, "another checkpoint is in flight; finish it first"
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(work, device), name="hllm-checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[dist.ProcessGroup], None], device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins with the first
            work(self._group)
        except BaseException as error:  # raised by `finish`
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether the write in flight has failed on this rank; it is still to be finished."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the checkpoint in flight, if there is one, and raise what it raised."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def save_checkpoint(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    *,
    rank_extra: Mapping[str, Any] | None = None,
    keep_last: int = 3,
    keep_best: Literal["max", "min"] | None = None,
    metric: float | None = None,
    background: BackgroundWriter | None = None,
    url: str | None = None,
) -> Path:
    """Write `<directory>/step-<step>` and delete what need not be kept any longer. Collective.

    Args:
        directory: the run's `checkpoints/`, on a file system that all machines share; made if missing.
        step: optimizer steps done; a checkpoint of the same step is replaced.
        state: nested mappings and lists of tensors (Tensor, DTensor, ShardedTensor), by group, such as
            `{"model": model.state_dict(), "dense": ..., "tables": ...}`. Replicated tensors are written once.
        extra: JSON-able, the same on every rank; rank 0's is written.
        rank_extra: JSON-able, each rank's own, such as `rng_state()`.
        keep_last: how many of the newest checkpoints to keep, at least 1.
        keep_best: whether to keep the checkpoint of the largest or smallest `metric` as well.
        metric: this checkpoint's validation metric; None or NaN: never the best.
        background: return once this rank's share is copied to the host's memory; this writer, which must be idle,
            writes it, and its `finish` raises the last two errors.
        url: where the checkpoints belong instead: each rank uploads what it has drafted in its own `directory`.

    Returns:
        The directory written, or to be.

    Raises:
        ValueError: `state` holds something that is not a tensor, `extra` something that JSON cannot keep, or
            `keep_last` is less than 1; names the key. Nothing is left behind.
        DiskFull: the file system has not enough room. The partial directory is removed, older checkpoints stay.
        RuntimeError: another rank failed, or the files could not be written.
    """
    final = Path(directory) / f"step-{step:08d}"
    own = {f"extra-rank{coordination.rank()}.json": dict(rank_extra or {})}
    if coordination.rank() == 0:
        own["extra.json"] = dict(extra)
    sizes = coordination.run_on_all_ranks(lambda: _checked_sizes(state, own, keep_last))
    tensors = _rank_share(flatten(state), [replicated for replicated, _ in sizes])
    comparable = metric if metric is not None and math.isfinite(metric) else None
    draft = _PendingCheckpoint(
        final,
        tensors,
        DefaultSavePlanner() if background is None else _Snapshot(tensors),
        own,
        {"step": step, "metric": comparable, "better": keep_best},
        keep_last,
        _needed(sizes),
        None if url is None else f"{url}/{final.name}",
    )
    if background is None:
        draft.write()
    else:
        background.start(draft.write)
    return final


@dataclass
class _PendingCheckpoint:
    """A checkpoint to be written: this rank's tensors and JSON files, and the bytes of all ranks together."""

    final: Path
    tensors: dict[str, Tensor]
    planner: DefaultSavePlanner
    rank_sizes: dict[str, dict[str, Any]]
    marker: dict[str, Any]
    keep_last: int
    needed: int
    url: str | None = None

    def write(self, group: dist.ProcessGroup | None = None) -> None:
        """Write, rename, prune. Collective in `group`; raises as `save_checkpoint`, and leaves nothing then."""
        temporary = coordination.run_on_rank_zero(lambda: files.create_temporary(self.final, self.needed), group)
        if self.url is not None:
            self._write_and_publish(self.final.with_name(temporary.name), self.url, group)
            return
        try:
            self._save_tensors(temporary, group)
            written = coordination.run_on_all_ranks(
                lambda: self._translate_disk_full(lambda: _write_extras(temporary, self.rank_sizes)), group
            )
            commit = files.commit
            coordination.run_on_rank_zero(
                lambda: self._translate_disk_full(lambda: commit(temporary, self.final, self.marker, written)), group
            )
        except BaseException:
            if coordination.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        coordination.run_on_rank_zero(lambda: files.prune_checkpoints(self.final, self.keep_last), group)

    def _write_and_publish(self, draft: Path, url: str, group: dist.ProcessGroup | None) -> None:
        """Write this rank's files, publish those of all ranks, and leave nothing here."""
        try:
            coordination.run_on_all_ranks(lambda: draft.mkdir(parents=True, exist_ok=True), group)
            self._save_tensors(draft, group)
            written = coordination.run_on_all_ranks(
                lambda: self._translate_disk_full(lambda: _write_extras(draft, self.rank_sizes)), group
            )
            publish_checkpoint(draft, url, self.marker, written, self.keep_last, group)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _save_tensors(self, path: Path, group: dist.ProcessGroup | None) -> None:
        """Write this rank's part of the tensors; rank 0 writes `.metadata`. DCP syncs each file."""
        try:
            with warnings.catch_warnings():
                if not dist.is_initialized():  # one process is fine; a thread must leave the filters alone
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")
                writer = dcp.FileSystemWriter(path)
                dcp.save(self.tensors, storage_writer=writer, planner=self.planner, process_group=group)
        except CheckpointException as error:  # not an Exception: it would pass every ordinary handler
            no_room = any(_is_disk_full(failure) for failure, _ in error.failures.values())
            # torch.save makes something else of the system's error
            if no_room or coordination.run_on_rank_zero(lambda: shutil.disk_usage(path).free < NO_ROOM, group):
                raise files.DiskFull(self.final, self.needed) from error
            raise RuntimeError(f"{path} could not be written: {first_error(error)}") from error

    def _translate_disk_full(self, work: Callable[[], Any]) -> Any:
        """Run `work`; where the disk is full, say so as `DiskFull`."""
        try:
            return work()
        except OSError as error:
            if _is_disk_full(error):
                raise files.DiskFull(self.final, self.needed) from error
            raise


class _Snapshot(DefaultSavePlanner):
    """Plans as ever, and writes the values that the tensors had when this was made, from copies on the host."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.set_up_planner(tensors)
        items = self.create_local_plan().items
        values = ((item.index, super(_Snapshot, self).resolve_data(item)) for item in items)
        self._values = {i: v.detach().to("cpu", copy=True) for i, v in values if isinstance(v, Tensor)}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The copy, in place of the tensor as it is now."""
        return self._values[write_item.index]


def _checked_sizes(state: Mapping[str, Any], own: Mapping[str, Any], keep_last: int) -> tuple[dict[str, int], int]:
    """Bytes of each replicated tensor, by key; and of all that this rank alone can write: its shards and JSON files.

    Raises:
        ValueError: as `save_checkpoint`.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
    tensors = flatten(state)
    for name, value in own.items():
        check_json(name, value)
    replicated = {key: t.numel() * t.element_size() + OVERHEAD_BYTES for key, t in tensors.items() if _is_replicated(t)}
    sharded = [_local_bytes(t) + OVERHEAD_BYTES for key, t in tensors.items() if key not in replicated]
    return replicated, sum(sharded) + sum(len(json.dumps(value)) for value in own.values())


def _needed(sizes: Sequence[tuple[dict[str, int], int]]) -> int:
    """Bytes of all ranks' `_checked_sizes` together, replicated tensors counted once."""
    replicated = {key: size for of_rank, _ in sizes for key, size in of_rank.items()}
    return sum(replicated.values()) + sum(alone for _, alone in sizes)


def _is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because there is no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_replicated(tensor: Tensor) -> bool:
    """Whether every rank has all of it."""
    return not isinstance(tensor, ShardedTensor | DTensor)


def _local_bytes(tensor: Tensor) -> int:
    """Bytes of this rank's part of a sharded tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().nbytes
    assert isinstance(tensor, ShardedTensor)
    return sum(shard.tensor.nbytes for shard in tensor.local_shards())


def _rank_share(tensors: Mapping[str, Tensor], replicated: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """The tensors that this rank writes: its shards, and its part of what is replicated (key -> bytes, by rank)."""
    mine, everywhere = _share_out(replicated)[coordination.rank()], replicated[coordination.rank()]
    return {key: tensor for key, tensor in tensors.items() if key in mine or key not in everywhere}


def _share_out(sizes: Sequence[Mapping[str, int]]) -> list[set[str]]:
    """For every rank the keys to write of those that it has (key -> bytes), each key once, loads about equal."""
    loads, shares = [0] * len(sizes), [set[str]() for _ in sizes]
    all_sizes = {key: size for of_rank in sizes for key, size in of_rank.items()}
    for key, size in sorted(all_sizes.items(), key=lambda entry: (-entry[1], entry[0])):
        rank = min((r for r, of_rank in enumerate(sizes) if key in of_rank), key=lambda r: loads[r])
        loads[rank] += size
        shares[rank].add(key)
    return shares


def first_error(error: CheckpointException) -> str:
    """Return the first failing rank's error, in one line."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(failure).__name__}: {failure}"


def _write_extras(path: Path, extras: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Write this rank's JSON files; return name -> (bytes, SHA-256) of all files this rank wrote."""
    for name, value in extras.items():
        write_synced(path / name, json.dumps(value))
    names = [*extras, *(file.name for file in path.glob(f"__{coordination.rank()}_*"))]
    return files.describe_files(path, names + ([".metadata"] if coordination.rank() == 0 else []))
