"""Writers of metrics: `metrics.json`, TensorBoard, and the TorchX tracker of the job, if configured."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.machine_errors import path_in_errors
from hllm_torchrec.common.tensorboard_file import ScalarFile


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file atomically; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=1, allow_nan=False))


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a `metrics.json` by name: `model/auc`, `model/slices/item_cold/auc`, `paired/other/difference`.

    The numbers are those of the models on the first label, of the paired differences, and of retrieval.
    """
    parts = {name: metrics.get(name) or {} for name in ("models", "paired", "retrieval")}
    flat = dict(_flatten(parts["models"], "")) | dict(_flatten(parts["paired"], "paired/"))
    return flat | dict(_flatten(parts["retrieval"], "retrieval/"))


def write_tensorboard(metrics: Mapping[str, Any], folder: Path, step: int) -> None:
    """Write the numbers as `evaluate-<split>/<name>` at the step of the checkpoint."""
    with path_in_errors(folder), closing(ScalarFile(folder)) as file:
        file.write(step, {f"evaluate-{metrics['split']}/{name}": value for name, value in scalars(metrics).items()})


def track_metrics(metrics: Mapping[str, Any], artifacts: Mapping[str, Path]) -> bool:
    """Record the evaluation with the trackers that TorchX configured for this job (environment TORCHX_TRACKERS).

    Metadata: split, rows, and the numbers except those of slices. Artifacts: the given files. Sources (the lineage):
    `weights:`, `data:` and `predictions:` with their fingerprints.

    Returns:
        True if a tracker is configured.
    """
    if not os.environ.get("TORCHX_TRACKERS"):
        return False
    from torchx.tracker.api import AppRun

    run = AppRun.run_from_env()
    numbers = {name: value for name, value in scalars(metrics).items() if "/slices/" not in name}
    run.add_metadata(split=metrics["split"], rows=metrics.get("rows"), **numbers)
    for name, path in artifacts.items():
        run.add_artifact(name, str(path))
    for kind, value in lineage(metrics.get("provenance") or {}):
        run.add_source(f"{kind}:{value}", artifact_name=kind)
    return bool(run.backends)


def lineage(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Inputs of an evaluation as (kind, fingerprint); fingerprints do not depend on the location of files."""
    found = []
    if "weights" in provenance:
        found.append(("weights", str(provenance["weights"]["fingerprint"])))
    if "dataset" in provenance:
        found.append(("data", str(provenance["dataset"]["fingerprint"])[:32]))
    return found + [("predictions", str(one["fingerprint"])) for one in (provenance.get("files") or {}).values()]


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", value
