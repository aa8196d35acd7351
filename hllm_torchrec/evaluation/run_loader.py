"""Loading of a run's model with the weights of a checkpoint, and scoring of a split with it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hllm_torchrec.checkpoint.layout import read_marker
from hllm_torchrec.checkpoint.load import load_checkpoint, verify_checkpoint
from hllm_torchrec.checkpoint.remote_runs import CHECKPOINTS, local_checkpoint, local_run
from hllm_torchrec.checkpoint.selection import read_checkpoint, run_checkpoint
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.common.machine import machine_info
from hllm_torchrec.common.terminal import say
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.config.paths import DATASET, missing_paths, set_value, with_found_paths
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.evidence import run_evidence
from hllm_torchrec.data.predictions import save_predictions
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.distributed import coordination
from hllm_torchrec.evaluation.calibration import FILE, RunCalibration
from hllm_torchrec.evaluation.catalogue_retrieval import evaluate_retrieval, measures_retrieval
from hllm_torchrec.evaluation.prediction_files import RowReader, find_files
from hllm_torchrec.evaluation.sanity_checks import READ_ROWS, Overlap, count_overlap, own_rows
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.ema import EmaWeights
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.new_rows import fill_new_rows
from hllm_torchrec.models.run_transitions import run_transitions
from hllm_torchrec.models.stored_items import use_stored_items

OVERLAP_MEMORY = 1 << 30
"""Memory in bytes for the search for exposures that are also in the training part."""


@dataclass(frozen=True)
class RunScores:
    """Result of `score_run`."""

    predictions: Path | None
    """Directory of the predictions; None for a generative-only model, which does not rank exposures."""
    retrieval: dict[str, Any] | None
    """Result of `evaluate_retrieval`; None if `measures_retrieval` is False."""
    provenance: dict[str, Any]
    """Checkpoint, weights, dataset and machine that the scores come from."""
    dataset: Dataset
    """Dataset of the scored exposures."""
    trained_on: Dataset
    """Version of the dataset that the run was trained on; `dataset` if that version is unknown or removed, is not a
    version of `dataset`, or would have to be fetched from a URL."""


def run_config(run: Path, dataset: Path | None = None) -> Config:
    """The resolved configuration of a run directory, with paths changed to existing ones (`with_found_paths`).

    Args:
        dataset: dataset to read instead, in its newest version; None: the run's dataset.

    Raises:
        ValueError: `run` is not a run directory, or a directory in its configuration does not exist.
    """
    run = local_run(run)
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not a run directory: it has no config.yaml; train into it first")
    config = with_found_paths(config_from_file(path), run)
    if dataset is not None:
        if url_of(dataset) is None and not dataset.is_dir():
            raise ValueError(f"--dataset {dataset}: no such directory; name one that `hllm prepare` wrote")
        config = set_value(set_value(config, DATASET, str(dataset)), "data.version", None)
    problems = missing_paths(config, path)
    if problems:
        raise ConfigError(problems)
    return config


def find_checkpoint(run: Path, which: str) -> Path:
    """Path of the "best" (on validation) or "latest" checkpoint of a run, or of the directory `which`. Collective.

    Raises:
        ValueError: there is no such checkpoint, or the directory is damaged.
    """
    if which not in ("best", "latest"):
        named = local_checkpoint(which)
        if not named.is_dir():
            raise ValueError(f"--checkpoint {which}: neither best nor latest nor a directory")
        return verify_checkpoint(named)
    found = run_checkpoint(run, which)
    if found is None:
        latest = "" if which == "latest" else " that was evaluated; --checkpoint latest needs no evaluation"
        raise ValueError(f"{local_run(run) / CHECKPOINTS} has no complete checkpoint{latest}; train first, or longer")
    return found


@dataclass(frozen=True)
class LoadedRun:
    """A run's model with the weights of a checkpoint.

    weights: context manager in which the model has its evaluation weights (with `optim.ema`, the averages). began:
    version and fingerprint of the dataset that the run was trained on; None: unknown. fingerprint:
    `weights_fingerprint` of the checkpoint, stored because the run may remove the checkpoint.
    """

    experiment: Experiment
    checkpoint: Path
    weights: AbstractContextManager[None]
    step: int
    began: dict[str, Any] | None
    fingerprint: str


def load_run(
    run: Path,
    which: str,
    device: torch.device,
    config: Config | None = None,
    *,
    dataset: Path | None = None,
    use_items: bool = True,
    encode: bool = True,
) -> LoadedRun:
    """Load the model of a run at a checkpoint (see `find_checkpoint`). Collective.

    Args:
        config: configuration; None: the run's. It may differ from the run's configuration in the parallelization.
        dataset: dataset to read instead of the run's; its ids must be the run's ids, possibly followed by new ones.
        use_items: for a run with stored item embeddings: fill the table of items. If False, the model can only embed
            items.
        encode: see `build_experiment`.

    Raises:
        ValueError: the run, checkpoint or dataset does not exist, the checkpoint is of a different model or its ids do
            not fit the dataset, or the item store does not have all items.
    """
    config = config or run_config(run, dataset)
    checkpoint = find_checkpoint(run, which)
    folder = checkpoint.parent.parent
    factors, evidence = RunFactors.load(folder), run_evidence(config.data.evidence, folder)
    transitions = run_transitions(config, folder)
    fitted: Any = {"factors": factors, "evidence": evidence, "transitions": transitions}
    experiment = build_experiment(config, device, **fitted, encode=encode)

    def load(path: Path) -> LoadedRun:
        return LoadedRun(experiment, path, *_load(experiment, path), weights_fingerprint(path))

    # Building the model takes long, and the run may have pruned the checkpoint meanwhile; then select one again.
    still_there = iter([checkpoint])
    loaded = read_checkpoint(lambda: next(still_there, None) or find_checkpoint(run, which), load)
    if use_items and takes_stored_items(config):
        use_stored_items(experiment)
    return loaded


def score_run(run: Path, split: str, which: str, device: torch.device, dataset: Path | None = None) -> RunScores:
    """Score a split with a checkpoint's weights; writes predictions and target ranks to the run. Collective.

    Averaged weights (`optim.ema`) are used if the run has them, as in the evaluation during training.

    Args:
        dataset: dataset whose split is scored; None: the dataset of the run's configuration.

    Raises:
        ValueError: see `load_run`; or the split is empty.
    """
    loaded, run = load_run(run, which, device, dataset=dataset), local_run(run)
    experiment, hllm, predictions, retrieval = loaded.experiment, loaded.experiment.hllm, None, None
    loader = experiment.loader(split, experiment.config.evaluation.batch_users)
    show = dist.get_rank() == 0
    with loaded.weights, experiment.evaluation_items():
        if hllm.fusion.has_queries:
            predictions = run / "predictions" / split
            columns = score_split(experiment, loader, show=show)
            calibration = RunCalibration.load(loaded.checkpoint.parent.parent)
            if calibration is not None and calibration.weights == loaded.fingerprint:
                columns = calibration.applied(columns)
            elif calibration is not None and show:
                say(f"caution: {run / FILE} belongs to other weights: run `hllm calibrate` again to apply it")
            save_predictions(columns, predictions)
        if measures_retrieval(experiment):
            retrieval = evaluate_retrieval(experiment, loader, show, run / "retrieval" / split)
    return RunScores(predictions, retrieval, _provenance(loaded), experiment.dataset, _trained_on(loaded, dataset))


def _trained_on(loaded: LoadedRun, given: Path | None) -> Dataset:
    """Value of `RunScores.trained_on`. given: the dataset that is read instead of the run's, or None."""
    scored, began = loaded.experiment.dataset, loaded.began
    if began is None or began == {"version": scored.version, "fingerprint": scored.fingerprint}:
        return scored
    if url_of(loaded.experiment.config.data.dataset) is not None:  # another version would have to be fetched completely
        return scored
    try:
        found = Dataset.open(scored.root, int(began["version"]))
    except ValueError:
        return scored
    # Forgetting changes fingerprints, so for the run's own dataset only the version number is compared.
    return found if given is None or found.fingerprint == began["fingerprint"] else scored


def training_overlap(predictions: Path, dataset: Dataset) -> Overlap:
    """Overlap of predictions with the dataset's training events, by (user, item, second). Collective."""
    columns, folder = ["user_id", "item_id", "timestamp"], Path()  # Parquet files are not rewritten
    test = RowReader(find_files([predictions]), columns, folder)
    train = dataset.row_groups("train")[coordination.rank() :: coordination.world_size()]

    def exposures() -> Iterator[np.ndarray]:
        for table in test.batches(*own_rows(test.rows), READ_ROWS):
            yield hash_columns(*(table[name].to_numpy().astype(np.int64) for name in columns))

    def events() -> Iterator[np.ndarray]:
        for group in train:
            rows = dataset.sequences([group], ["user_id", "item_ids", "timestamps"])
            yield hash_columns(np.repeat(rows.user_ids, rows.lengths), rows.item_ids, rows.timestamps)

    return count_overlap(exposures(), events(), test.rows, OVERLAP_MEMORY, "user, item, time")


def _load(experiment: Experiment, checkpoint: Path) -> tuple[AbstractContextManager[None], int, dict[str, Any] | None]:
    """Load the weights; returns (context manager with the evaluation weights, the checkpoint's step, its dataset)."""
    state: dict[str, Any] = {"model": experiment.model_state()}
    weights: AbstractContextManager[None] = nullcontext()
    if experiment.config.optim.ema:
        ema = EmaWeights(experiment.averaged_parameters(), experiment.config.optim.ema)
        state["ema"] = ema.state_dict()
        weights = ema.swapped()
    experiment.check_origin(checkpoint)
    extra = load_checkpoint(checkpoint, state)
    fill_new_rows(experiment, checkpoint, averages=state.get("ema"))
    return weights, int(extra["step"]), extra.get("dataset")


def _provenance(loaded: LoadedRun) -> dict[str, Any]:
    dataset, checkpoint = loaded.experiment.dataset, loaded.checkpoint
    return {
        "checkpoint": str(checkpoint),
        "weights": {"fingerprint": loaded.fingerprint},
        "step": loaded.step,
        "seed": loaded.experiment.config.seed,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "path": str(dataset.root),
            "version": dataset.version,
        },
        "world": dist.get_world_size(),
        "machine": machine_info(),
    }


def weights_fingerprint(checkpoint: Path) -> str:
    """Hash of the contents of the checkpoint's files, from the hashes in its marker: sixteen hexadecimal digits."""
    files = json.dumps(read_marker(checkpoint)["files"], sort_keys=True)
    return hashlib.blake2b(files.encode(), digest_size=8).hexdigest()
