"""Writes checkpoints: into a temporary directory that is renamed when complete, in the caller or on a thread."""

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
from hllm_torchrec.common.machine_errors import is_disk_full, is_machine_error, path_in_errors
from hllm_torchrec.distributed import coordination
from hllm_torchrec.embedding.tables import local_shards

OVERHEAD_BYTES = 2048
"""Bytes added for each tensor of a checkpoint when its size is estimated (an upper bound of the overhead)."""


NO_ROOM = 1 << 20
"""If fewer bytes are free after a failed write, the failure is taken for a full disk."""


class BackgroundWriter:
    """Writes checkpoints on a thread, one at a time; its collectives use a separate gloo process group.

    The constructor is collective. An error on the thread is raised by `finish`, on every rank.
    """

    def __init__(self, timeout: float) -> None:
        """Create the group; timeout: seconds that a rank's thread waits for those of other ranks."""
        # Collectives of one group must be issued in the same order on all ranks; a thread cannot promise that next to
        # the training loop, so it gets a group of its own.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[dist.ProcessGroup], None]) -> None:
        """Run `work` on the thread; its argument is the group."""
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
        directory: the run's `checkpoints/`, on a file system that all machines share; created if missing.
        step: optimizer steps done; a checkpoint of the same step is replaced.
        state: nested mappings and lists of tensors (Tensor, DTensor, ShardedTensor), by group, such as
            `{"model": model.state_dict(), "dense": ..., "tables": ...}`. Replicated tensors are written once.
        extra: JSON values, the same on every rank; rank 0's is written.
        rank_extra: JSON values of each rank, such as `rng_state()`.
        keep_last: number of the newest checkpoints to keep, at least 1.
        keep_best: whether to keep the checkpoint of the largest or smallest `metric` as well.
        metric: this checkpoint's validation metric; None or NaN: never the best.
        background: return once this rank's share is copied to host memory; this writer, which must be idle, then
            writes it, and its `finish` raises DiskFull and RuntimeError.
        url: destination of the checkpoints; each rank then uploads its files from a temporary `directory`.

    Returns:
        The directory that was written, or will be.

    Raises:
        ValueError: `state` contains something that is not a tensor, `extra` something that JSON cannot represent,
            or `keep_last` is less than 1; names the key. No files are left behind.
        DiskFull: not enough space. The partial directory is removed, older checkpoints stay.
        RuntimeError: another rank failed, or the files could not be written.
    """
    final = Path(directory) / f"step-{step:08d}"
    own = {f"extra-rank{coordination.rank()}.json": dict(rank_extra or {})}
    if coordination.rank() == 0:
        own["extra.json"] = dict(extra)
    # Checks first, on all ranks: a rank that fails later would leave the others waiting in a collective.
    sizes = coordination.run_on_all_ranks(lambda: _checked_sizes(state, own, keep_last))
    tensors = _rank_share(flatten(state), [replicated for replicated, _ in sizes])
    # JSON has no NaN, and NaN would not sort.
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
    """A checkpoint to be written. rank_extras: name -> contents of this rank's JSON files; needed: all ranks' bytes."""

    final: Path
    tensors: dict[str, Tensor]
    planner: DefaultSavePlanner
    rank_extras: dict[str, dict[str, Any]]
    marker: dict[str, Any]
    keep_last: int
    needed: int
    url: str | None = None

    def write(self, group: dist.ProcessGroup | None = None) -> None:
        """Write, rename, prune. Collective in `group`; raises as `save_checkpoint`, without leaving files behind."""
        temporary = coordination.run_on_rank_zero(lambda: files.create_temporary(self.final, self.needed), group)
        if self.url is not None:
            self._write_and_publish(self.final.with_name(temporary.name), self.url, group)
            return
        try:
            self._save_tensors(temporary, group)
            written = coordination.run_on_all_ranks(
                lambda: self._translate_disk_full(lambda: _write_extras(temporary, self.rank_extras)), group
            )
            # The hashes of all ranks are known only now. Rank 0 writes them to the marker and renames.
            commit = files.commit
            coordination.run_on_rank_zero(
                lambda: self._translate_disk_full(lambda: commit(temporary, self.final, self.marker, written)), group
            )
        except BaseException:
            if coordination.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        # Old checkpoints are deleted only after the new one has its name.
        coordination.run_on_rank_zero(lambda: files.prune_checkpoints(self.final, self.keep_last), group)

    def _write_and_publish(self, draft: Path, url: str, group: dist.ProcessGroup | None) -> None:
        """Write this rank's files, publish those of all ranks, and remove the local ones."""
        try:
            coordination.run_on_all_ranks(lambda: draft.mkdir(parents=True, exist_ok=True), group)
            self._save_tensors(draft, group)
            written = coordination.run_on_all_ranks(
                lambda: self._translate_disk_full(lambda: _write_extras(draft, self.rank_extras)), group
            )
            publish_checkpoint(draft, url, self.marker, written, self.keep_last, group)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _save_tensors(self, path: Path, group: dist.ProcessGroup | None) -> None:
        """Write this rank's part of the tensors; rank 0 also writes `.metadata`. DCP syncs each file."""
        try:
            with warnings.catch_warnings():
                # A single process without a group is intended. Filters are global: a thread must not change them.
                if not dist.is_initialized():
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")
                writer = dcp.FileSystemWriter(path)
                dcp.save(self.tensors, storage_writer=writer, planner=self.planner, process_group=group)
        except CheckpointException as error:  # a BaseException: no ordinary handler would catch it
            no_room = any(is_disk_full(failure) for failure, _ in error.failures.values())
            # torch.save may replace the system's error, so the free space is checked as well.
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
    """Save planner that writes a copy in host memory, taken at construction, so that training may go on meanwhile."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.set_up_planner(tensors)
        items = self.create_local_plan().items
        # copy=True: on the CPU `to` would return the same tensor, which training goes on to change.
        # (Only the items of this rank's plan are copied: its shards, and its share of replicated tensors.)
        values = ((item.index, super(_Snapshot, self).resolve_data(item)) for item in items)
        self._values = {i: v.detach().to("cpu", copy=True) for i, v in values if isinstance(v, Tensor)}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the copied values of an item."""
        return self._values[write_item.index]


def _checked_sizes(state: Mapping[str, Any], own: Mapping[str, Any], keep_last: int) -> tuple[dict[str, int], int]:
    """Return key -> bytes of each replicated tensor, and the bytes of this rank's own shards and JSON files.

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
    """Sum the bytes of all ranks' `_checked_sizes`, with replicated tensors counted once."""
    replicated = {key: size for of_rank, _ in sizes for key, size in of_rank.items()}
    return sum(replicated.values()) + sum(alone for _, alone in sizes)


def _is_replicated(tensor: Tensor) -> bool:
    """Return whether every rank has the complete tensor."""
    return not isinstance(tensor, ShardedTensor | DTensor)


def _local_bytes(tensor: Tensor) -> int:
    """Number of bytes of this rank's part of a sharded tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().nbytes
    return sum(values.nbytes for values, _, _ in local_shards(tensor))


def _rank_share(tensors: Mapping[str, Tensor], replicated: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """Select this rank's tensors to write: its shards and a share of the replicated ones (key -> bytes, by rank)."""
    mine, everywhere = _share_out(replicated)[coordination.rank()], replicated[coordination.rank()]
    return {key: tensor for key, tensor in tensors.items() if key in mine or key not in everywhere}


def _share_out(sizes: Sequence[Mapping[str, int]]) -> list[set[str]]:
    """Assign each key (key -> bytes, by rank) to one of the ranks that have it, with about equal loads."""
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
    """Raise the error of a rank that was interrupted (Ctrl-C), or whose machine failed; return for any other one.

    DCP catches every exception; without this, an interruption would be taken for a failure of the checkpoint.
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
    """Write this rank's JSON files; return name -> (bytes, SHA-256) of all files that this rank wrote."""
    for name, value in extras.items():
        write_synced(path / name, json.dumps(value))
    names = [*extras, *(file.name for file in path.glob(f"__{coordination.rank()}_*"))]
    return files.describe_files(path, names + ([".metadata"] if coordination.rank() == 0 else []))
