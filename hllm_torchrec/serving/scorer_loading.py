"""What a scorer needs of a run: checks of the model, the calibration, and a configuration for one process."""

from dataclasses import replace

import torch.distributed as dist

from hllm_torchrec.config.schema import Config
from hllm_torchrec.evaluation.calibration import FILE, RunCalibration
from hllm_torchrec.evaluation.run_loader import LoadedRun
from hllm_torchrec.models.assembly import Experiment


def check_servable(experiment: Experiment) -> None:
    """Check that a model can score candidates here.

    Raises:
        ValueError: the model has no ranking head, there are several processes, or the weights are sharded by FSDP.
    """
    if not experiment.batch_spec.fusion.has_queries:
        raise ValueError("objective.fusion: 'none': the model has no head to score candidates; train early or late")
    if dist.get_world_size() > 1 or experiment.config.parallel.dense == "fsdp":
        raise ValueError(
            f"{dist.get_world_size()} processes, parallel.dense {experiment.config.parallel.dense!r}: a scorer "
            "has all weights in one process: build it in one, with parallel.dense ddp"
        )


def calibration_of(loaded: LoadedRun) -> RunCalibration | None:
    """The calibration of a run, or None. Raises ValueError if it was fitted for other weights."""
    run = loaded.checkpoint.parent.parent
    found = RunCalibration.load(run)
    if found is not None and found.weights != loaded.fingerprint:
        raise ValueError(f"{run}/{FILE} belongs to other weights: run `hllm calibrate` again, or remove it")
    return found


def in_one_process(config: Config) -> Config:
    """The configuration without FSDP, `torch.compile` and activation checkpointing; the weights are the same."""
    parallel = replace(config.parallel, dense="ddp", compile=False, activation_checkpointing=False)
    return replace(config, parallel=parallel)
