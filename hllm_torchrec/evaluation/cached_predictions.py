"""Predictions that are made once, and made again only when what they depend on has changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.data.predictions import PredictionColumns, save_predictions
from hllm_torchrec.distributed import coordination

SPLITS = ("valid", "test")


def run_if_changed(
    record: Path, inputs: dict[str, Any], fit: Callable[[], tuple[dict[str, PredictionColumns], dict[str, float]]]
) -> bool:
    """Write predictions of SPLITS beside `record`, and into it, last, what they were made of. Collective.

    fit: gives this rank's predictions of each split, and what the record says of the fit.

    Returns:
        False if they are there already, made of the same.
    """
    if coordination.run_on_rank_zero(lambda: _is_there(record, inputs)):
        return False
    coordination.run_on_rank_zero(lambda: record.unlink(missing_ok=True))
    columns, fitted = fit()
    for split in SPLITS:
        save_predictions(columns[split], record.parent / "predictions" / split)
    coordination.run_on_rank_zero(lambda: replace_file(record, json.dumps(inputs | {"fitted": fitted}, indent=1)))
    return True


def _is_there(record: Path, inputs: dict[str, Any]) -> bool:
    if not record.is_file() or not all((record.parent / "predictions" / split).is_dir() for split in SPLITS):
        return False
    try:
        found = json.loads(record.read_text())
    except ValueError:  # cut short: it is made again
        return False
    return isinstance(found, dict) and {key: found.get(key) for key in inputs} == json.loads(json.dumps(inputs))
