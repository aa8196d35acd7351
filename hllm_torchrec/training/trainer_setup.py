"""Construction of a `Trainer` from a configuration: all collective work before training, in order."""

from pathlib import Path

import torch

from hllm_torchrec.checkpoint.manager import CheckpointManager
from hllm_torchrec.checkpoint.remote_runs import open_run_storage
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.manifest import chain_base
from hllm_torchrec.data.pins import pin_version
from hllm_torchrec.distributed.coordination import rank
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.parallelize import compute_dtype
from hllm_torchrec.training.resume import checkpoint_to_resume
from hllm_torchrec.training.throughput import global_matmul_peak
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.warm_start import warm_start


def build_trainer(config: Config, device: torch.device) -> Trainer:
    """Build the trainer of a configuration on this rank. Collective.

    Raises:
        ConfigError: the configuration does not fit the dataset, the device, or the existing contents of `output`.
    """
    storage = open_run_storage(config.output)  # if `output` is a URL: downloads the existing files of the run
    resume_from = checkpoint_to_resume(config, storage.folder)  # hashes the newest checkpoint's files
    # Draws random numbers, so it comes before `build_experiment`, which seeds.
    peak_flops = global_matmul_peak(device, compute_dtype(config))
    # Fetches the dataset, tokenizes item texts, builds, shards and initializes the model.
    experiment = build_experiment(config, device)
    _pin_dataset(experiment.dataset, config)
    if config.start_from is not None:
        warm_start(experiment, Path(config.start_from))
    checkpoints = CheckpointManager(config, storage)  # creates a process group if it saves on a thread
    return Trainer(experiment, checkpoints, resume_from, peak_flops)


def _pin_dataset(dataset: Dataset, config: Config) -> None:
    """Note in the dataset that this run reads its version; not in a copy of a URL, nor in one of an earlier release."""
    if rank() == 0 and url_of(config.data.dataset) is None and chain_base(dataset.manifest) is not None:
        pin_version(dataset.root, dataset.version, config.output)
