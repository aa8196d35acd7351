"""Construction of a `Trainer` from a configuration: all collective work before training, in order."""

import logging
from functools import partial
from pathlib import Path

import torch

from hllm_torchrec.checkpoint.layout import read_checkpoint_json
from hllm_torchrec.checkpoint.manager import CheckpointManager
from hllm_torchrec.checkpoint.remote_runs import open_run_storage
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.evidence import EvidenceModel, run_evidence
from hllm_torchrec.data.item_factors import FACTORS
from hllm_torchrec.data.manifest import chain_base
from hllm_torchrec.data.pins import pin_version
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.distributed.coordination import rank, run_on_each_host
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.parallelize import compute_dtype
from hllm_torchrec.models.run_transitions import run_transitions
from hllm_torchrec.models.run_vocabulary import FACTORS_KEY
from hllm_torchrec.training.resume import checkpoint_to_resume
from hllm_torchrec.training.throughput import global_matmul_peak
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.warm_start import continue_optimizers, describe_start, start_checkpoint, warm_start

_logger = logging.getLogger(__name__)


def build_trainer(config: Config, device: torch.device) -> Trainer:
    """Build the trainer of a configuration on this rank. Collective.

    Raises:
        ConfigError: the configuration does not fit the dataset, the device, or the existing contents of `output`.
    """
    if config.recipe is not None:
        raise ConfigError(f"recipe: {config.recipe}: not completed for a dataset yet: complete it with `hllm init`")
    storage = open_run_storage(config.output)  # if `output` is a URL: downloads the existing files of the run
    resume_from = checkpoint_to_resume(config, storage.folder)  # hashes the newest checkpoint's files
    begin_from = start_checkpoint(config) if resume_from is None else None
    # The measurement draws random numbers, so it must run before `build_experiment`, which sets the seeds.
    peak_flops = global_matmul_peak(device, compute_dtype(config))
    version = version_to_resume(config, resume_from)
    factors = own_factors(config, storage.folder, resume_from, begin_from)
    evidence = evidence_to_continue(config, resume_from, begin_from)
    transitions = None if resume_from is None else run_transitions(config, resume_from.parent.parent)
    # Fetches the dataset, tokenizes item texts, builds, shards and initializes the model.
    experiment = build_experiment(
        config, device, factors=factors, evidence=evidence, transitions=transitions, version=version
    )
    _pin_dataset(experiment.dataset, config)
    if experiment.evidence is not None:
        fitted = experiment.evidence.model
        run_on_each_host(lambda: fitted.save(storage.folder))
    if experiment.transitions is not None:
        run_on_each_host(partial(experiment.transitions.save, storage.folder))
    if begin_from is not None:
        begin_from = warm_start(experiment, begin_from)
    checkpoints = CheckpointManager(config, storage)  # creates a process group if it saves on a thread
    trainer = Trainer(experiment, checkpoints, resume_from, peak_flops)
    trainer.origin = None if begin_from is None else describe_start(experiment, begin_from)
    if begin_from is not None and config.start_from_optimizer:
        trainer.set_earlier_steps(continue_optimizers(experiment, trainer.state(), trainer.ema, begin_from))
    return trainer


def version_to_resume(config: Config, resume_from: Path | None) -> int | None:
    """Version of the dataset with which a resumed run began; None for a new run, or if the checkpoint does not have it.

    Raises:
        ConfigError: `data.version` is another version.
    """
    began = read_checkpoint_json(resume_from / "extra.json").get("dataset") if resume_from is not None else None
    if began is None:
        return None
    version, wanted = int(began["version"]), config.data.version
    if wanted not in (None, version):
        raise ConfigError(f"data.version: {wanted}: the resumed run began with version {version}; leave the field out")
    newest = Dataset.open(config.data.dataset).version
    if newest != version and rank() == 0:
        _logger.warning(
            "%s: continues with version %d of %s, with which it began (the newest is %d)",
            config.output,
            version,
            config.data.dataset,
            newest,
        )
    changed = Dataset.open(config.data.dataset, version).fingerprint != began["fingerprint"]
    if changed and rank() == 0:
        _logger.warning("%s: ids were forgotten in its version of the dataset since it began: results will differ "
                        "from an uninterrupted run; the rest of the epoch is planned again", config.output)  # fmt: skip
    return version


def evidence_to_continue(config: Config, resume_from: Path | None, begin_from: Path | None) -> EvidenceModel | None:
    """Fitted evidence of the run that is resumed, or of the `start_from` run if it has the same `data.evidence`.

    None: evidence must be fitted, if it is configured.

    Raises:
        ValueError: the evidence file of that run is missing or damaged.
    """
    names = config.data.evidence
    if resume_from is not None:
        return run_evidence(names, resume_from.parent.parent)
    if begin_from is None or not names:
        return None
    earlier = read_checkpoint_json(begin_from / "extra.json").get("config", {}).get("data", {}).get("evidence", ())
    return run_evidence(names, begin_from.parent.parent) if list(earlier) == list(names) else None


def own_factors(config: Config, run: Path, resume_from: Path | None, begin_from: Path | None) -> RunFactors | None:
    """Return the item factors of a run from its folder; None if the run uses none, or uses those stored with the
    dataset. Collective.

    A new run fits factors, or copies those of the run that it starts from, and saves them in its folder. Runs of
    earlier versions, and runs that start from them, use the factors stored with the dataset.

    Raises:
        ValueError: the factors of the run to start from are missing or damaged.
    """
    if FACTORS not in config.data.item_vectors:
        return None

    def make() -> None:
        dataset = Dataset.open(config.data.dataset, config.data.version)
        if begin_from is None:
            RunFactors.fit(dataset).save(run)
            return
        extra = read_checkpoint_json(begin_from / "extra.json")
        source = RunFactors.load(begin_from.parent.parent)
        if extra.get(FACTORS_KEY) != (source and source.fingerprint):
            raise ValueError(
                f"start_from: {begin_from} was trained with item factors that are not in {begin_from.parent.parent}: "
                "restore its factors.npz"
            )
        if source is not None:
            source.fold_in(dataset).save(run)
        elif FACTORS not in extra.get("config", {}).get("data", {}).get("item_vectors", ()):
            RunFactors.fit(dataset).save(run)

    if resume_from is None:
        run_on_each_host(make)
    return RunFactors.load(run)


def _pin_dataset(dataset: Dataset, config: Config) -> None:
    """Pin the dataset's version for this run. Datasets at a URL, and those of an earlier release, cannot be pinned."""
    if rank() == 0 and url_of(config.data.dataset) is None and chain_base(dataset.manifest) is not None:
        pin_version(dataset.root, dataset.version, config.output)
