"""Writes checkpoints, on the calling thread or in the background: into a temporary directory, renamed when complete."""

import json
import math
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
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
from hllm_torchrec.common.machine_errors import is_disk_full, is_machine_error, path_in_errors
from hllm_torchrec.distributed import coordination
from hllm_torchrec.embedding.tables import local_shards

OVERHEAD_BYTES = 2048
"""Upper bound of the overhead in bytes of each stored tensor, for the estimate of a checkpoint's size."""


NO_ROOM = 1 << 20
"""If fewer bytes than this are free after a failed write, the failure is reported as a full disk."""


class BackgroundWriter:
    """Writes checkpoints on a thread, one at a time; its collectives use a separate gloo process group.

    The constructor is collective. `finish` raises the error of the thread, on every rank.
    """

    def __init__(self, timeout: float) -> None:
        """Create the group; timeout: seconds that the thread of a rank waits for the threads of other ranks."""
        # All ranks must issue the collectives of a group in the same order. This thread runs concurrently with the
        # training loop, so the two need separate groups.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[dist.ProcessGroup], None]) -> None:
        """Run `work(group)` on the thread, where `group` is the writer's process group."""
        assert self._thread is None, "another checkpoint is in flight; finish it first"
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(work, device), name="hllm-checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[dist.ProcessGroup], None], device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread starts with device 0
            work(self._group)
        except BaseException as error:  # raised by `finish`
            self._error = error

    @property
    def failed(self) -> bool:
        """Return whether the pending write has failed on this rank; `finish` must still be called."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the pending write, if there is one, and raise its error."""
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
    """Write `<directory>/step-<step>` and delete checkpoints beyond the limits. Collective.

    Args:
        directory: the run's `checkpoints/`, on a file system that all machines share (unless `url`); created if
            missing.
        step: number of optimizer steps done; an existing checkpoint of this step is replaced.
        state: nested mappings and lists of tensors (Tensor, DTensor, ShardedTensor), by group, such as
            `{"model": model.state_dict(), "dense": ..., "tables": ...}`. Replicated tensors are written once.
        extra: JSON values, the same on every rank; rank 0 writes them.
        rank_extra: JSON values of this rank, such as `rng_state()`.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_best: also keep the checkpoint with the largest ("max") or smallest ("min") `metric`.
        metric: validation metric of this checkpoint; a checkpoint with None, NaN or infinity is never the best.
        background: an idle writer, which writes the checkpoint on its thread. The function then returns as soon as
            this rank's share is copied to host memory, and `background.finish` raises DiskFull and RuntimeError.
        url: destination of the checkpoints: each rank writes its files into a folder below `directory`, uploads them
            and removes the folder.

    Returns:
        The path of the checkpoint, `<directory>/step-<step>`; with `url`, there is no directory at this path.

    Raises:
        ValueError: `state` contains a value that is not a tensor, `extra` or `rank_extra` a value that JSON cannot
            represent, or `keep_last` is less than 1; the message contains the key. No files are written.
        DiskFull: there is not enough space. The partial directory is removed; older checkpoints are kept.
        RuntimeError: another rank failed, or the files could not be written.
        OSError: an error of the machine (`is_machine_error`).
    """
    final = Path(directory) / f"step-{step:08d}"
    json_files = {f"extra-rank{coordination.rank()}.json": dict(rank_extra or {})}
    if coordination.rank() == 0:
        json_files["extra.json"] = dict(extra)
    # All ranks check first: if one rank failed later, the others would wait for it in a collective.
    sizes = coordination.run_on_all_ranks(lambda: _checked_sizes(state, json_files, keep_last))
    tensors = _rank_share(flatten(state), [replicated for replicated, _ in sizes])
    # JSON has no NaN and no infinity, and NaN cannot be sorted.
    comparable = metric if metric is not None and math.isfinite(metric) else None
    draft = _PendingCheckpoint(
        final,
        tensors,
        DefaultSavePlanner() if background is None else _Snapshot(tensors),
        json_files,
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
    """A checkpoint to be written. rank_extras: name -> contents of this rank's JSON files; needed: size in bytes."""

    final: Path
    tensors: dict[str, Tensor]
    planner: DefaultSavePlanner
    rank_extras: dict[str, dict[str, Any]]
    marker: dict[str, Any]
    keep_last: int
    needed: int
    url: str | None = None

    def write(self, group: dist.ProcessGroup | None = None) -> None:
        """Write and publish the checkpoint, and delete old ones. Collective in `group`.

        Raises as `save_checkpoint`; the partial directory is removed.
        """
        temporary = coordination.run_on_rank_zero(lambda: files.create_temporary(self.final, self.needed), group)
        if self.url is not None:
            self._write_and_publish(self.final.with_name(temporary.name), self.url, group)
            return
        try:
            written = self._save_files(temporary, group)
            # Rank 0 now knows the hashes of all ranks' files. It writes them to the marker and renames the directory.
            commit = partial(files.commit, temporary, self.final, self.marker, written)
            coordination.run_on_rank_zero(lambda: self._translate_disk_full(commit), group)
        except BaseException:
            if coordination.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        # Old checkpoints are deleted only after the new one has its final name.
        coordination.run_on_rank_zero(lambda: files.prune_checkpoints(self.final, self.keep_last), group)

    def _write_and_publish(self, draft: Path, url: str, group: dist.ProcessGroup | None) -> None:
        """Write this rank's files to `draft`, upload the files of all ranks to `url`, and remove the local files."""
        try:
            coordination.run_on_all_ranks(lambda: draft.mkdir(parents=True, exist_ok=True), group)
            written = self._save_files(draft, group)
            publish_checkpoint(draft, url, self.marker, written, self.keep_last, group)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _save_files(self, path: Path, group: dist.ProcessGroup | None) -> list[dict[str, tuple[int, str]]]:
        """Write this rank's tensors and JSON files; return name -> (bytes, SHA-256) of the files of each rank."""
        self._save_tensors(path, group)
        write = partial(_write_extras, path, self.rank_extras)
        return coordination.run_on_all_ranks(lambda: self._translate_disk_full(write), group)

    def _save_tensors(self, path: Path, group: dist.ProcessGroup | None) -> None:
        """Write this rank's part of the tensors; rank 0 also writes `.metadata`. DCP syncs each file."""
        try:
            with warnings.catch_warnings():
                # A single process without a process group is intended, so the warning is suppressed. Warning filters
                # are global, and a background thread, which always has a group, must not change them.
                if not dist.is_initialized():
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")
                writer = dcp.FileSystemWriter(path)
                dcp.save(self.tensors, storage_writer=writer, planner=self.planner, process_group=group)
        except CheckpointException as error:  # a BaseException, which `except Exception` would not catch
            no_room = any(is_disk_full(failure) for failure, _ in error.failures.values())
            # torch.save may hide the system's error behind its own, so the free space is checked as well.
            if no_room or coordination.run_on_rank_zero(lambda: shutil.disk_usage(path).free < NO_ROOM, group):
                raise files.DiskFull(self.final, self.needed) from error
            raise_machine_error(error, path)
            raise RuntimeError(f"{path} could not be written: {first_error(error)}") from error

    def _translate_disk_full(self, work: Callable[[], Any]) -> Any:
        """Run `work`; raise `DiskFull` if it fails because the disk is full."""
        try:
            return work()
        except OSError as error:
            if is_disk_full(error):
                raise files.DiskFull(self.final, self.needed) from error
            raise


class _Snapshot(DefaultSavePlanner):
    """Save planner that copies the tensors to host memory at construction, so that training can continue."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.set_up_planner(tensors)
        items = self.create_local_plan().items
        # Only the items of this rank's plan are copied: its shards, and its share of the replicated tensors.
        # copy=True, because on the CPU `to` would return the tensor itself, which training changes.
        values = ((item.index, super(_Snapshot, self).resolve_data(item)) for item in items)
        self._values = {i: v.detach().to("cpu", copy=True) for i, v in values if isinstance(v, Tensor)}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the copied values of an item."""
        return self._values[write_item.index]


def _checked_sizes(state: Mapping[str, Any], extras: Mapping[str, Any], keep_last: int) -> tuple[dict[str, int], int]:
    """Check the arguments; return key -> bytes of replicated tensors, and the bytes of this rank's shards and extras.

    extras: name -> contents of this rank's JSON files.

    Raises:
        ValueError: as `save_checkpoint`.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
    tensors = flatten(state)
    for name, value in extras.items():
        check_json(name, value)
    replicated = {key: t.numel() * t.element_size() + OVERHEAD_BYTES for key, t in tensors.items() if _is_replicated(t)}
    sharded = [_local_bytes(t) + OVERHEAD_BYTES for key, t in tensors.items() if key not in replicated]
    return replicated, sum(sharded) + sum(len(json.dumps(value)) for value in extras.values())


def _needed(sizes: Sequence[tuple[dict[str, int], int]]) -> int:
    """Sum the sizes of all ranks (from `_checked_sizes`); each replicated tensor is counted once."""
    replicated = {key: size for of_rank, _ in sizes for key, size in of_rank.items()}
    return sum(replicated.values()) + sum(local for _, local in sizes)


def _is_replicated(tensor: Tensor) -> bool:
    """Return whether every rank has the complete tensor."""
    return not isinstance(tensor, ShardedTensor | DTensor)


def _local_bytes(tensor: Tensor) -> int:
    """Return the number of bytes of this rank's part of a sharded tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().nbytes
    return sum(values.nbytes for values, _, _ in local_shards(tensor))


def _rank_share(tensors: Mapping[str, Tensor], replicated: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: its shards, and its share of the replicated tensors.

    replicated: for each rank, key -> bytes of its replicated tensors.
    """
    assigned, local = _share_out(replicated)[coordination.rank()], replicated[coordination.rank()]
    return {key: tensor for key, tensor in tensors.items() if key in assigned or key not in local}


def _share_out(sizes: Sequence[Mapping[str, int]]) -> list[set[str]]:
    """Assign each key to one of the ranks that have it, with about equal loads; sizes: for each rank, key -> bytes."""
    loads, shares = [0] * len(sizes), [set[str]() for _ in sizes]
    all_sizes = {key: size for of_rank in sizes for key, size in of_rank.items()}
    # Largest first, each to the least loaded rank; ties by key, so that all ranks compute the same assignment.
    for key, size in sorted(all_sizes.items(), key=lambda entry: (-entry[1], entry[0])):
        rank = min((r for r, of_rank in enumerate(sizes) if key in of_rank), key=lambda r: loads[r])
        loads[rank] += size
        shares[rank].add(key)
    return shares


def first_error(error: CheckpointException) -> str:
    """Return the error of the first failed rank, in one line."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(failure).__name__}: {failure}"


def raise_machine_error(error: CheckpointException, path: Path) -> None:
    """Raise KeyboardInterrupt if a rank was interrupted (Ctrl-C), or the error of its machine; otherwise return.

    DCP catches every exception, so that an interruption would otherwise be reported as a failure of the checkpoint.
    """
    failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if isinstance(failure, KeyboardInterrupt):
            raise KeyboardInterrupt from error
    for failure in failures:
        if is_machine_error(failure):
            with path_in_errors(path):
                raise failure


def _write_extras(path: Path, extras: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Write this rank's JSON files; return name -> (bytes, SHA-256) for all files of this rank, also its tensors."""
    for name, value in extras.items():
        write_synced(path / name, json.dumps(value))
    names = [*extras, *(file.name for file in path.glob(f"__{coordination.rank()}_*"))]
    return files.describe_files(path, names + ([".metadata"] if coordination.rank() == 0 else []))
