"""Runs baselines into a directory each, and reuses what is there from the same data and settings."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hllm_torchrec
from hllm_torchrec import ranks
from hllm_torchrec.baselines.bias import run_bias
from hllm_torchrec.baselines.config import BaselinesConfig
from hllm_torchrec.baselines.dlrm import run_dlrm
from hllm_torchrec.baselines.gaussian import run_gaussian
from hllm_torchrec.config_files import to_dict
from hllm_torchrec.data.atomic import replace_file
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.evaluate import Columns, save_predictions

SPLITS = ("valid", "test")
BASELINES = tuple(field.name for field in dataclasses.fields(BaselinesConfig))
RECORD = "baseline.json"


def run_baseline(name: str, config: BaselinesConfig, dataset: Dataset, device: torch.device, directory: Path) -> bool:
    """Fit and score a baseline; `predictions/{valid,test}` and `baseline.json` go to `directory`. Collective.

    Returns:
        False if the directory has them already, from the same dataset, settings and version.

    Raises:
        ValueError: a split is empty, or the settings do not fit the dataset.
    """
    settings = getattr(config, name)
    made_of = {
        "baseline": name,
        "config": to_dict(settings),
        "dataset": dataset.fingerprint,
        "hllm_torchrec": hllm_torchrec.__version__,
    }

    def make() -> tuple[dict[str, Columns], dict[str, float]]:
        if name == "dlrm":
            return run_dlrm(dataset, settings, device, directory, SPLITS)
        if name == "gaussian":
            return run_gaussian(dataset, settings, SPLITS), {}
        return run_bias(dataset, settings, SPLITS), {}

    return make_once(directory / RECORD, made_of, make)


def make_once(
    record: Path, made_of: dict[str, Any], make: Callable[[], tuple[dict[str, Columns], dict[str, float]]]
) -> bool:
    """Write predictions of SPLITS beside `record`, and into it, last, what they were made of. Collective.

    make: gives this rank's predictions of each split, and what the record says of the fit.

    Returns:
        False if they are there already, made of the same.
    """
    if ranks.on_rank_zero(lambda: _is_there(record, made_of)):
        return False
    ranks.on_rank_zero(lambda: record.unlink(missing_ok=True))
    columns, fitted = make()
    for split in SPLITS:
        save_predictions(columns[split], record.parent / "predictions" / split)
    ranks.on_rank_zero(lambda: replace_file(record, json.dumps(made_of | {"fitted": fitted}, indent=1)))
    return True


def _is_there(record: Path, made_of: dict[str, Any]) -> bool:
    if not record.is_file() or not all((record.parent / "predictions" / split).is_dir() for split in SPLITS):
        return False
    try:
        found = json.loads(record.read_text())
    except ValueError:  # cut short: it is made again
        return False
    return isinstance(found, dict) and {key: found.get(key) for key in made_of} == json.loads(json.dumps(made_of))
