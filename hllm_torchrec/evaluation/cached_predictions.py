"""Caching of predictions: predictions are computed again only if their inputs have changed."""

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
    """Write predictions of SPLITS into the folder of `record`, then their inputs into `record`. Collective.

    Args:
        record: JSON file with the inputs of the predictions.
        inputs: all inputs that the predictions depend on, as JSON values.
        fit: returns this rank's predictions of each split, and numbers on the fit for the record.

    Returns:
        False if predictions with equal inputs exist, so that nothing was computed.
    """
    if coordination.run_on_rank_zero(lambda: _is_there(record, inputs)):
        return False
    # The record is removed first and written last, so that an interrupted run leaves no record of incomplete results.
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
    except ValueError:  # incomplete file: compute again
        return False
    # The round trip through JSON turns tuples into lists, as in the record.
    return isinstance(found, dict) and {key: found.get(key) for key in inputs} == json.loads(json.dumps(inputs))
