"""Loading of checkpoints, at any world size and sharding plan; also describes their format.

A checkpoint is a directory `step-00000100` in the run's `checkpoints/`:

- `__<rank>_<n>.distcp`, `.metadata`: the tensors, by `torch.distributed.checkpoint` (DCP);
- `extra.json`: values that are the same on every rank (step, best metric, configuration, marks of the id maps);
- `extra-rank<rank>.json`: values of each rank (states of its random number generators);
- `COMPLETE`: the marker, JSON with the step, the metric, the size and SHA-256 of every file, and its own SHA-256.

The directory is written as `step-00000100.tmp-...` and synced; rank 0 renames it when all ranks have finished. So after
a crash at any moment, either a complete directory has the final name or none has it. No pickle in it is loaded without
restrictions (see `safe_reader`). Unless checkpoints are at a URL, all machines must share one file system.

If a process group exists, saving, loading and finding the latest or best checkpoint are collective: every rank calls
them, and if one rank fails, all ranks raise.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from hllm_torchrec.checkpoint import growth
from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.checkpoint.save import BackgroundWriter, first_error, raise_machine_error, save_checkpoint
from hllm_torchrec.checkpoint.selection import best_checkpoint, latest_checkpoint, unchanged, verify_checkpoint
from hllm_torchrec.checkpoint.state import flatten, is_under, rng_state, set_rng_state
from hllm_torchrec.distributed import coordination

__all__ = [
    "BackgroundWriter",
    "best_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_rank_extra",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "verify_checkpoint",
]

_NAMES_SHOWN = 5
_REMEDY = (
    "Build the model from the configuration saved with the checkpoint, or choose another checkpoint (allow_missing "
    "keeps the present values under given prefixes)"
)
_logger = logging.getLogger(__name__)


def load_checkpoint(
    path: Path, state: Mapping[str, Any], *, allow_missing: Sequence[str] = (), remedy: str = _REMEDY
) -> dict[str, Any]:
    """Copy a checkpoint into the tensors of `state`, in place, and return its `extra`. Collective.

    The world size and the sharding plan may differ from those at saving, and dtypes are converted. Embedding tables may
    have more rows than in the checkpoint: the additional rows keep their current values, and one line is logged for
    each such table (see `growth`). Groups of the checkpoint that `state` does not contain (for example the optimizers
    in an evaluation) are not read.

    Args:
        path: a checkpoint's directory, as from `latest_checkpoint`.
        state: as in `save_checkpoint`. Optimizer state must exist already: see `optim.materialize_state`.
        allow_missing: prefixes of keys, such as `"dense"`. A tensor below them that the checkpoint lacks keeps its
            current value (this is logged); one that only the checkpoint has is ignored.
        remedy: remedy in the error message for a checkpoint of another model.

    Raises:
        ValueError: the checkpoint is damaged, is of another model (the message contains the keys), or contains a pickle
            that is not allowed. `state` is unchanged, except if damage is found only while tensors are read.
        CheckpointGone: the checkpoint was removed or replaced meanwhile; `state` may have changed.
        RuntimeError: another rank failed.
        OSError: the machine could not read a file, which does not mean that it is damaged.
    """
    path = Path(path)
    with unchanged(path):
        # All ranks compare keys and shapes before any rank reads: if they differ, no tensor has been changed.
        reports = coordination.run_on_all_ranks(lambda: _compare(path, state))
        kept = _raise_mismatches(path, reports, list(state), allow_missing, remedy)
        _load_tensors({key: tensor for key, tensor in flatten(state).items() if key not in kept}, path)
        if coordination.rank() == 0:
            for rows in _grown(reports).values():
                _logger.warning("%s: %s", path, rows)
        return files.read_checkpoint_json(path / "extra.json")


def load_rank_extra(path: Path) -> dict[str, Any] | None:
    """Return this rank's saved `rank_extra`, or None if the checkpoint was saved at another world size."""
    path = Path(path)
    if files.read_marker(path)["world_size"] != coordination.world_size():
        return None
    return files.read_checkpoint_json(path / f"extra-rank{coordination.rank()}.json")


def _compare(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Compare this rank's tensors, which lack the tables of other ranks, with those of the checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or contains a pickle that is not allowed.
    """
    damage = files.find_damage(path, check_hashes=False)
    if damage:
        raise ValueError(f"{path} {damage}; load the checkpoint before it")
    tensors, saved = flatten(state), SafeReader(path).read_tensors()
    rows = {key: growth.table_rows(key, tensors, saved) for key in tensors}
    reshaped = {
        key: f"{key} (checkpoint {list(saved[key].size)}, model {list(growth.global_size(tensor))})"
        for key, tensor in tensors.items()
        if key in saved and not growth.fits(tensor, saved[key].size, rows[key])
    }
    missing = [key for key in tensors if key not in saved]
    grown = {table.table: table for table in rows.values() if table is not None and table.has_grown}
    return {"keys": list(tensors), "saved": list(saved), "missing": missing, "reshaped": reshaped, "grown": grown}


def _grown(reports: list[dict[str, Any]]) -> dict[str, growth.TableRows]:
    """Return table -> rows for the tables that have grown, from all ranks' `_compare`."""
    return {name: rows for report in reports for name, rows in sorted(report["grown"].items())}


def _raise_mismatches(
    path: Path, reports: list[dict[str, Any]], groups: Sequence[str], allow_missing: Sequence[str], remedy: str
) -> set[str]:
    """Raise one error for the mismatches of all ranks; return the missing keys that may keep their current values."""
    # Each rank has only its shards of tables, so a key is unexpected only if no rank has it.
    wanted = {key for report in reports for key in report["keys"]}
    missing = {key for report in reports for key in report["missing"]}
    reshaped: dict[str, str] = {key: text for report in reports for key, text in report["reshaped"].items()}
    # Groups that `state` leaves out (such as the optimizers) are skipped on purpose: their keys are not unexpected.
    unexpected = {key for key in reports[0]["saved"] if is_under(key, groups) and key not in wanted}
    grown = _grown(reports)
    # Keys of optimizer state and averages that may start from their initial values: see `starts_anew`.
    moved = {key for key in missing | unexpected if growth.starts_anew(key, grown)}
    kept = {key for key in missing if key in moved or is_under(key, allow_missing)}
    unexpected = {key for key in unexpected - moved if not is_under(key, allow_missing)}
    parts = [
        _name_some("missing from the checkpoint", missing - kept),
        _name_some("in the checkpoint only", unexpected),
        _name_some("of another shape", set(reshaped.values())),
    ]
    if any(parts):
        raise ValueError(f"{path} is not of this model: {'; '.join(part for part in parts if part)}. {remedy}")
    if kept and coordination.rank() == 0:
        _logger.warning("%s: %s; they keep their present values", path, _name_some("not loaded", kept))
    return kept


def _name_some(what: str, names: set[str]) -> str:
    """Return "2 keys <what>: a, b" with the first few names, or an empty string."""
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
    return f"{len(names)} key{'s' if len(names) > 1 else ''} {what}: {shown}"


def _load_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Read a checkpoint into the tensors in place."""
    saved = SafeReader(path).read_tensors()
    # DCP reads slices of the saved tensor by offset. Row-wise state has other offsets under another sharding plan, so
    # it is read completely into a temporary tensor and then copied by `spread_rowwise`.
    wanted: dict[str, torch.Tensor] = {}
    spread: dict[str, growth.TableRows] = {}
    for key, tensor in tensors.items():
        rows = growth.table_rows(key, tensors, saved)
        view: torch.Tensor | None = tensor
        if rows is not None and growth.is_spread(tensor, saved[key].size, rows):
            spread[key], view = rows, torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
        elif growth.global_size(tensor) != saved[key].size:
            view = growth.first_rows(tensor, saved[key].size[0])
        if view is not None:
            wanted[key] = view
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(wanted, storage_reader=SafeReader(path))
    except CheckpointException as error:
        raise_machine_error(error, path)
        reason = f"{path} could not be read: {first_error(error)}; load the checkpoint before it"
        raise ValueError(reason) from error
    for key, rows in spread.items():
        growth.spread_rowwise(wanted[key], tensors[key], rows)
