"""Erasing of ids from a run: records of bad batches, rows of item tables with their optimizer state, and rows of fitted
statistics.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hllm_torchrec.checkpoint.erased_rows import checkpoints_of, erase_rows
from hllm_torchrec.checkpoint.remote_runs import run_lock
from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.evidence import EvidenceModel
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.data.transitions import Transitions
from hllm_torchrec.evaluation.calibration import RunCalibration
from hllm_torchrec.evaluation.run_loader import weights_fingerprint
from hllm_torchrec.lifecycle.traces import RUN, Place, Target, Trace
from hllm_torchrec.models.run_evidence import EVIDENCE_KEY
from hllm_torchrec.models.run_transitions import TRANSITIONS_KEY
from hllm_torchrec.models.run_vocabulary import FACTORS_KEY

_TABLES = ("item_id", "frozen_items")
BAD_BATCHES = "bad_batches"


def forget_in_run(place: Place, target: Target) -> Trace:
    """Remove records of bad batches that contain the ids; with `erase`, also the items' rows of tables and statistics.

    A row of a table becomes 0; a row of fitted factors, evidence or transitions becomes that of the unknown item. Other
    rows do not change.

    Raises:
        ValueError: with `erase`, a process is training into the run, or a checkpoint is damaged.
    """
    if not place.fits:
        return Trace(place.path, f"{RUN} on another dataset", 0)
    found = sum(_remove_record(path, target) for path in sorted((place.path / BAD_BATCHES).glob("*.json")))
    if not target.erase or not target.items.size:
        return Trace(place.path, RUN, found)
    with run_lock(str(place.path)):
        fingerprints = {}
        for key, load, reset in _STATISTICS:
            model = load(place.path)
            if model is None:
                continue
            new, rows = reset(model, target.items)
            found += rows
            if rows and not target.dry_run:
                new.save(place.path)
            fingerprints[key] = new.fingerprint
        calibration = RunCalibration.load(place.path)
        for checkpoint in checkpoints_of(place.path):
            before = weights_fingerprint(checkpoint)
            for table in _TABLES:
                found += erase_rows(checkpoint, table, target.items, fingerprints, dry_run=target.dry_run)
            after = weights_fingerprint(checkpoint)
            if calibration is not None and calibration.weights == before != after:
                # A calibration is a function of the logit, fitted over all items, so it stays valid without these
                # items: store it with the new fingerprint.
                calibration = replace(calibration, weights=after)
                calibration.save(place.path)
    return Trace(place.path, RUN, found)


def _remove_record(path: Path, target: Target) -> bool:
    """Remove a record of bad batches (`training.step_guard`) if it contains an id; returns True if it contains one."""
    batches = json.loads(path.read_text(encoding="utf-8")).get("batches", [])
    users = [user for batch in batches for user in batch["user_ids"]]
    items = [item for batch in batches for name in ("unique_items", "target_items") for item in batch[name]]
    named = bool(np.isin(users, target.users).any() or np.isin(items, target.items).any())
    if named and not target.dry_run:
        path.unlink()
    return named


def _reset_factors(factors: RunFactors, items: Ints) -> tuple[RunFactors, int]:
    loadings, bias, rows = _reset(factors.model.loadings[None], factors.model.bias[None], items)
    return replace(factors, model=replace(factors.model, loadings=loadings[0], bias=bias[0])), rows


def _reset_evidence(model: EvidenceModel, items: Ints) -> tuple[EvidenceModel, int]:
    loadings, bias, rows = _reset(model.loadings, model.bias, items)
    return replace(model, loadings=loadings, bias=bias), rows


def _reset(loadings: np.ndarray, bias: np.ndarray, items: Ints) -> tuple[np.ndarray, np.ndarray, int]:
    """Replace the rows of `items` in loadings [k, N, J] and bias [k, N] by row 0; also returns how many changed."""
    items = items[items < bias.shape[1]]
    rows = int(((loadings[:, items] != loadings[:, :1]).any((0, 2)) | (bias[:, items] != bias[:, :1]).any(0)).sum())
    loadings, bias = loadings.copy(), bias.copy()
    loadings[:, items], bias[:, items] = loadings[:, :1], bias[:, :1]
    return loadings, bias, rows


def _reset_transitions(model: Transitions, items: Ints) -> tuple[Transitions, int]:
    items = items[items < len(model.source)]
    new = model.without(items)
    changed = (new.source != model.source).any(1) | (new.target != model.target).any(1)
    return new, int(changed.sum())


_STATISTICS: tuple[tuple[str, Callable[[Path], Any], Callable[[Any, Ints], tuple[Any, int]]], ...] = (
    (FACTORS_KEY, RunFactors.load, _reset_factors),
    (EVIDENCE_KEY, EvidenceModel.load, _reset_evidence),
    (TRANSITIONS_KEY, Transitions.load, _reset_transitions),
)
