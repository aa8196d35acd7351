"""Runs baselines into a directory each, and reuses what is there from the same data and settings."""

import dataclasses
import json
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
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.evaluate import save_predictions

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
    if ranks.on_rank_zero(lambda: _is_there(directory, made_of)):
        return False
    ranks.on_rank_zero(lambda: (directory / RECORD).unlink(missing_ok=True))
    fitted: dict[str, float] = {}
    if name == "dlrm":
        columns, fitted = run_dlrm(dataset, settings, device, directory, SPLITS)
    elif name == "gaussian":
        columns = run_gaussian(dataset, settings, SPLITS)
    else:
        columns = run_bias(dataset, settings, SPLITS)
    for split in SPLITS:
        save_predictions(columns[split], directory / "predictions" / split)
    ranks.on_rank_zero(lambda: _write(directory / RECORD, made_of | {"fitted": fitted}))
    return True


def _is_there(directory: Path, made_of: dict[str, Any]) -> bool:
    """Whether the record says the same; it is written last, after the predictions."""
    path = directory / RECORD
    if not path.is_file() or not all((directory / "predictions" / split).is_dir() for split in SPLITS):
        return False
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(record, dict) and {key: record.get(key) for key in made_of} == made_of


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
