"""The offline evaluation of a run: its model as configured, the weights of a checkpoint, a split scored."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hllm_torchrec.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from hllm_torchrec.config import Config, config_from_file
from hllm_torchrec.evaluate import save_predictions, score_split
from hllm_torchrec.experiment import Experiment, build_experiment
from hllm_torchrec.logs import machine_info
from hllm_torchrec.optim import EmaWeights
from hllm_torchrec.retrieval import measures_retrieval, retrieve


@dataclass(frozen=True)
class RunScores:
    """What scoring a run gave, besides the predictions on disk."""

    predictions: Path | None
    """Their directory; None for a generative-only model, which ranks no exposures."""
    retrieval: dict[str, Any] | None
    """Of `metrics.retrieval`, where the configuration asks for it or there is nothing else."""
    provenance: dict[str, Any]
    """Where the numbers come from."""


def run_config(run: Path) -> Config:
    """The resolved configuration of a run directory.

    Raises:
        ValueError: it is not one.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not a run directory: it has no config.yaml; train into it first")
    return config_from_file(path)


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint "best" (on validation) or "latest" of a run, or the directory that is named. Collective.

    Raises:
        ValueError: there is none.
    """
    if which not in ("best", "latest"):
        if not Path(which).is_dir():
            raise ValueError(f"--checkpoint {which}: neither best nor latest nor a directory")
        return Path(which)
    folder = run / "checkpoints"
    found = latest_checkpoint(folder) if which == "latest" else best_checkpoint(folder)
    if found is None:
        latest = "" if which == "latest" else " that was evaluated; --checkpoint latest needs no evaluation"
        raise ValueError(f"{folder} has no whole checkpoint{latest}; train (on) first")
    return found


def score_run(run: Path, split: str, which: str, device: torch.device) -> RunScores:
    """Score every exposure of a split with a checkpoint's weights; predictions go to the run. Collective.

    Averaged weights (`optim.ema`) are used where the run has them, as in training's own evaluation.

    Raises:
        ValueError: no such run, checkpoint or dataset, or an empty split; a checkpoint of another model.
    """
    config = run_config(run)
    checkpoint = find_checkpoint(run, which)
    experiment = build_experiment(config, device)
    loader = experiment.loader(split, config.evaluation.batch_users)
    show = dist.get_rank() == 0
    hllm, predictions, retrieval = experiment.hllm, None, None
    weights, step = _load(experiment, checkpoint)
    with weights:
        hllm.item_cache = experiment.encode_catalogue()
        if hllm.fusion != "none":
            predictions = run / "predictions" / split
            cold = experiment.cold_items()
            save_predictions(score_split(experiment.model, loader, device, cold=cold, show=show), predictions)
        if measures_retrieval(experiment):
            retrieval = retrieve(experiment, loader, show, run / "retrieval" / split)
    return RunScores(predictions, retrieval, _provenance(experiment, checkpoint, step))


def _load(experiment: Experiment, checkpoint: Path) -> tuple[AbstractContextManager[None], int]:
    """Load weights; the context in which the model has those to evaluate with, and the checkpoint's step."""
    state: dict[str, Any] = {"model": experiment.model.state_dict()}
    weights: AbstractContextManager[None] = nullcontext()
    if experiment.config.optim.ema:
        ema = EmaWeights(experiment.averaged_parameters(), experiment.config.optim.ema)
        state["ema"] = ema.state_dict()
        weights = ema.swapped()
    return weights, int(load_checkpoint(checkpoint, state)["step"])


def _provenance(experiment: Experiment, checkpoint: Path, step: int) -> dict[str, Any]:
    dataset = experiment.dataset
    return {
        "checkpoint": str(checkpoint),
        "step": step,
        "seed": experiment.config.seed,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "world": dist.get_world_size(),
        "machine": machine_info(),
    }
