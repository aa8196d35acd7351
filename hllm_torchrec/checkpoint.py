"""Checkpoints that survive a crash at any moment and load at another world size or sharding plan.

A checkpoint is a directory `step-00000100` in the run's `checkpoints/`:

- `__<rank>_<n>.distcp`, `.metadata`: the tensors, by `torch.distributed.checkpoint` (DCP);
- `extra.json`: what is the same on every rank (loader position, metrics, configuration);
- `extra-rank<rank>.json`: what is each rank's own (its random number generators);
- `COMPLETE`: JSON with the step, the metric, and every file's size and SHA-256.

It is written as `step-00000100.tmp-...`, synced, and renamed by rank 0 when every rank is done, so a
directory of the final name is whole unless its files were damaged later. Nothing in it is loaded as a pickle
without restriction (see `checkpoint_reader`). All machines must see one file system.

Saving, loading and looking for the latest or best are collective when a process group exists: every rank
calls them, and what fails on one rank raises on all.
"""

import base64
import json
import logging
import math
import random
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hllm_torchrec import checkpoint_files as files
from hllm_torchrec import ranks
from hllm_torchrec.checkpoint_reader import SafeReader

_NAMES_SHOWN = 5
_logger = logging.getLogger(__name__)


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

    Returns:
        The directory written.

    Raises:
        ValueError: `state` holds something that is not a tensor, `extra` something that JSON cannot keep, or
            `keep_last` is less than 1; names the key. Nothing is left behind.
        RuntimeError: another rank failed, or the files could not be written.
    """
    directory = Path(directory)
    tensors: dict[str, torch.Tensor] = {}
    own = {f"extra-rank{ranks.rank()}.json": dict(rank_extra or {})}
    if ranks.rank() == 0:
        own["extra.json"] = dict(extra)

    def check() -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
        tensors.update(_flatten(state))
        for name, value in own.items():
            _check_json(name, value)

    ranks.together(check)
    final = directory / f"step-{step:08d}"
    temporary = ranks.on_rank_zero(lambda: files.start(final))
    comparable = metric if metric is not None and math.isfinite(metric) else None
    marker = {"step": step, "metric": comparable, "better": keep_best}
    try:
        _save_tensors(tensors, temporary)
        written = ranks.together(lambda: _write_extras(temporary, own))
        ranks.on_rank_zero(lambda: files.commit(temporary, final, marker, written))
    except BaseException:
        if ranks.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    ranks.on_rank_zero(lambda: files.prune(final, keep_last))
    return final


def load_checkpoint(path: Path, state: Mapping[str, Any], *, allow_missing: Sequence[str] = ()) -> dict[str, Any]:
    """Copy a checkpoint into the tensors of `state`, in place, and return its `extra`. Collective.

    The world size and the sharding plan may differ from those of the save, and dtypes are converted. Row-wise
    optimizer state (one value for each row and column shard) is averaged over the saved shards where the new
    plan has fewer, which is exact for equal shards, and copied to each where it has more. Groups of the
    checkpoint that `state` does not name (say, the optimizers when evaluating) are not read.

    Args:
        path: a checkpoint's directory, as from `latest_checkpoint`.
        state: as in `save_checkpoint`. Optimizer state must exist already: see `optim.materialise_state`.
        allow_missing: prefixes of keys, such as `"dense"`, which keep their present values where the
            checkpoint has none of that key and shape; what was kept is logged.

    Raises:
        ValueError: the checkpoint is damaged, was made by another model (names the keys), or holds a pickle
            that is not allowed. `state` is then as it was.
        RuntimeError: another rank failed.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}

    def prepare() -> dict[str, Any]:
        damage = files.find_damage(path, check_hashes=False)
        if damage:
            raise ValueError(f"{path} {damage}; load the checkpoint before it")
        tensors.update(_flatten(state))
        return _compare(tensors, SafeReader(path).read_tensors())

    kept = _raise_mismatches(path, ranks.together(prepare), list(state), allow_missing)
    for key in kept & tensors.keys():
        del tensors[key]
    _load_tensors(tensors, path)
    extra: dict[str, Any] = json.loads((path / "extra.json").read_text())
    return extra


def load_rank_extra(path: Path) -> dict[str, Any] | None:
    """Return what this rank gave as `rank_extra`, or None if the save was made at another world size."""
    path = Path(path)
    if files.read_marker(path)["world_size"] != ranks.world_size():
        return None
    extra: dict[str, Any] = json.loads((path / f"extra-rank{ranks.rank()}.json").read_text())
    return extra


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint, or None. Collective: rank 0 looks, every rank gets its answer.

    All files are hashed. A torn, truncated or altered one is passed over with a warning.
    """
    return ranks.on_rank_zero(lambda: next(files.undamaged(reversed(files.by_step(Path(directory)))), None))


def best_checkpoint(directory: Path) -> Path | None:
    """Return the whole checkpoint of the best metric (the earliest of equals), or None. Collective.

    What is better is what `keep_best` said when the newest of them was saved. All files are hashed; a damaged
    checkpoint is passed over with a warning.
    """
    return ranks.on_rank_zero(lambda: next(files.undamaged(files.by_metric(Path(directory))), None))


def rng_state() -> dict[str, Any]:
    """Return this process's random number states (torch CPU and CUDA device, numpy, Python) for JSON."""
    numpy_state: Any = np.random.get_state(legacy=False)
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": None if cuda is None else _encode(cuda),
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()},
        },
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the random number generators to what `rng_state` returned.

    Raises:
        ValueError: `state` is not of that form; some generators may have been set.
    """
    try:
        torch.set_rng_state(_decode(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decode(state["cuda"]))
        np.random.set_state(state["numpy"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the saved random number state cannot be used ({type(error).__name__}: {error}); "
            "resume with the versions of torch, numpy and Python that wrote it, or seed anew"
        ) from error


def _encode(state: torch.Tensor) -> str:
    """Return a uint8 tensor as base64 text."""
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> torch.Tensor:
    """Return the uint8 tensor of base64 text."""
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def _flatten(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Turn nested mappings and lists of tensors into one dictionary with dotted keys.

    Raises:
        ValueError: a value that is not a tensor, is on the meta device, or two values of one key.
    """
    flat: dict[str, torch.Tensor] = {}
    for key, value in _leaves("", state):
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"state {key!r} is a {type(value).__name__}; a checkpoint's state holds tensors only: "
                "put what JSON can hold into extra"
            )
        if not isinstance(value, ShardedTensor) and value.is_meta:  # ShardedTensor cannot always say
            raise ValueError(f"state {key!r} is on the meta device; materialise the model first")
        if key in flat:
            raise ValueError(f"state {key!r} occurs twice; rename one of its parts")
        flat[key] = value
    return flat


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for what is neither a mapping nor a sequence."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for key, child in items:
        yield from _leaves(f"{prefix}.{key}" if prefix else str(key), child)


def _size(tensor: torch.Tensor) -> torch.Size:
    """Return the global size (ShardedTensor's own `size()` warns at each call)."""
    return torch.Size(tensor.metadata().size) if isinstance(tensor, ShardedTensor) else tensor.size()


def _is_replanned(tensor: torch.Tensor, saved: torch.Size) -> bool:
    """Whether these are the row-wise states [rows x column shards] of one table under two plans."""
    if not isinstance(tensor, ShardedTensor) or len(_size(tensor)) != 1 or len(saved) != 1:
        return False
    large, small = max(saved[0], _size(tensor)[0]), min(saved[0], _size(tensor)[0])
    return large != small and small > 0 and large % small == 0


def _compare(tensors: Mapping[str, torch.Tensor], saved: Mapping[str, TensorStorageMetadata]) -> dict[str, Any]:
    """Compare this rank's tensors, which do not include other ranks' tables, with the checkpoint's."""
    reshaped = {
        key: f"{key} (checkpoint {list(saved[key].size)}, model {list(_size(tensor))})"
        for key, tensor in tensors.items()
        if key in saved and saved[key].size != _size(tensor) and not _is_replanned(tensor, saved[key].size)
    }
    missing = [key for key in tensors if key not in saved]
    return {"keys": list(tensors), "saved": list(saved), "missing": missing, "reshaped": reshaped}


def _raise_mismatches(
    path: Path, reports: list[dict[str, Any]], groups: Sequence[str], allow_missing: Sequence[str]
) -> set[str]:
    """Raise one error for all ranks' mismatches; return the keys that may keep their values."""

    def under(key: str, prefixes: Sequence[str]) -> bool:
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)

    wanted = {key for report in reports for key in report["keys"]}
    missing = {key for report in reports for key in report["missing"]}
    reshaped: dict[str, str] = {key: text for report in reports for key, text in report["reshaped"].items()}
    unexpected = {key for key in reports[0]["saved"] if under(key, groups) and key not in wanted}
    kept = {key for key in missing | reshaped.keys() if under(key, allow_missing)}
    parts = [
        _name_some("missing from the checkpoint", missing - kept),
        _name_some("in the checkpoint only", {key for key in unexpected if not under(key, allow_missing)}),
        _name_some("of another shape", {text for key, text in reshaped.items() if key not in kept}),
    ]
    if any(parts):
        raise ValueError(
            f"{path} is not of this model: {'; '.join(part for part in parts if part)}. Build the model from "
            "the configuration saved with the checkpoint, or choose another checkpoint (allow_missing keeps "
            "the present values under given prefixes)"
        )
    if kept and ranks.rank() == 0:
        _logger.warning("%s: %s; they keep their present values", path, _name_some("not loaded", kept))
    return kept


def _name_some(what: str, names: set[str]) -> str:
    """Return "2 keys <what>: a, b", naming the first few, or an empty string."""
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
    return f"{len(names)} key{'s' if len(names) > 1 else ''} {what}: {shown}"


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write this rank's part of the tensors; rank 0 writes `.metadata`. DCP syncs each file."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is fine
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path))
    except CheckpointException as error:  # not an Exception: it would pass every ordinary handler
        raise RuntimeError(f"{path} could not be written: {_first_failure(error)}") from error


def _load_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Read into the tensors in place; row-wise optimizer state of another plan by way of a whole copy."""
    saved = SafeReader(path).read_tensors()
    replanned = {key: t for key, t in tensors.items() if _is_replanned(t, saved[key].size)}
    whole = {key: torch.empty(saved[key].size, dtype=saved[key].properties.dtype) for key in replanned}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({**tensors, **whole}, storage_reader=SafeReader(path))
    except CheckpointException as error:
        raise RuntimeError(f"{path} could not be read: {_first_failure(error)}") from error
    for key, target in replanned.items():
        _spread_rowwise(whole[key], target)


def _spread_rowwise(values: torch.Tensor, target: torch.Tensor) -> None:
    """Copy row-wise state [rows x a] into shards of [rows x b]: the mean over a's shards, or b copies."""
    assert isinstance(target, ShardedTensor)
    size = _size(target)[0]
    if len(values) > size:
        values = values.view(-1, size).mean(0)
    values = values.repeat(size // len(values))
    with torch.no_grad():
        for shard in target.local_shards():
            start = shard.metadata.shard_offsets[0]
            shard.tensor.copy_(values[start : start + shard.metadata.shard_sizes[0]])


def _first_failure(error: CheckpointException) -> str:
    """Return the first failing rank's error, in one line."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(failure).__name__}: {failure}"


def _write_extras(path: Path, extras: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Write this rank's JSON files; return name -> (bytes, SHA-256) of all files this rank wrote."""
    for name, value in extras.items():
        files.write_synced(path / name, json.dumps(value))
    names = [*extras, *(file.name for file in path.glob(f"__{ranks.rank()}_*"))]
    return files.describe_files(path, names + ([".metadata"] if ranks.rank() == 0 else []))


def _check_json(name: str, value: Any) -> None:
    """Refuse what JSON would not give back as it was.

    Raises:
        ValueError: a value of another type than JSON has, or a key that is not a string; names where.
    """
    if isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: key {key!r} is not a string, which JSON needs")
            _check_json(f"{name}: {key}", child)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _check_json(f"{name}[{index}]", child)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{name} is a {type(value).__name__}; JSON holds text, numbers, lists and dictionaries only")
