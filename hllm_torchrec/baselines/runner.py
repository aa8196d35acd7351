"""Runs each baseline into its directory, and reuses existing results of the same data and settings."""

import dataclasses
from pathlib import Path

import torch

import hllm_torchrec
from hllm_torchrec.baselines.bias import run_bias
from hllm_torchrec.baselines.gaussian import run_gaussian
from hllm_torchrec.baselines.settings import BaselinesConfig
from hllm_torchrec.config.loading import to_dict
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.predictions import PredictionColumns
from hllm_torchrec.downstream.dlrm import DLRMTrainer
from hllm_torchrec.evaluation.cached_predictions import SPLITS, run_if_changed

BASELINES = tuple(field.name for field in dataclasses.fields(BaselinesConfig))
RECORD = "baseline.json"


def run_baseline(name: str, config: BaselinesConfig, dataset: Dataset, device: torch.device, directory: Path) -> bool:
    """Fit and score a baseline; writes `predictions/{valid,test}` and `baseline.json` to `directory`. Collective.

    Returns:
        False if the directory already has results of the same dataset, settings and library version; else True.

    Raises:
        ValueError: a split is empty, or the settings do not fit the dataset.
    """
    settings, delay = getattr(config, name), config.feedback_delay
    if name == "dlrm":
        settings = dataclasses.replace(settings, feedback_delay=delay)
    made_of = {
        "baseline": name,
        "config": to_dict(settings),
        "dataset": dataset.fingerprint,
        "hllm_torchrec": hllm_torchrec.__version__,
        **({"feedback_delay": delay} if delay else {}),
    }

    def make() -> tuple[dict[str, PredictionColumns], dict[str, float]]:
        if name == "dlrm":
            trainer = DLRMTrainer(dataset, settings, device)
            fitted = trainer.fit(directory / "checkpoints")
            return {split: trainer.score(split) for split in SPLITS}, fitted
        if name == "gaussian":
            return run_gaussian(dataset, settings, SPLITS, delay), {}
        return run_bias(dataset, settings, SPLITS, delay), {}

    return run_if_changed(directory / RECORD, made_of, make)
