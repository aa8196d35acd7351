"""Warm start: initializes a run with the weights of another, as stage II of HLLM starts from stage I."""

import re
from pathlib import Path

from hllm_torchrec.checkpoint.layout import MARKER
from hllm_torchrec.checkpoint.load import load_checkpoint, verify_checkpoint
from hllm_torchrec.checkpoint.remote_runs import local_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.checkpoint.selection import read_checkpoint, run_checkpoint
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.models.assembly import Experiment
from hllm_torchrec.models.lora_base import check_base_weights

OPTIONAL_PARTS = (
    "adapter",
    "features",
    "head",
    "logit_scale",
    "project_item",
    "project_next",
    "project_vectors",
    "standardise",
    "user_token",
    "value_head",
)
"""Parts of the model that the other run may lack; it must have the Item LLM and the user encoder."""


def warm_start(experiment: Experiment, source: Path) -> None:
    """Load the weights of a run's best checkpoint, or of a checkpoint, into a newly built model. Collective.

    Averaged weights (`optim.ema`) are used if the other run has them, because they were the ones evaluated to select
    the best checkpoint. Weights of OPTIONAL_PARTS that the checkpoint lacks, or has in another shape, keep their
    initial values, with a warning. Optimizer state is not loaded.

    Raises:
        ConfigError: the checkpoint does not exist.
        ValueError: its Item LLM or user encoder differ, or its files are damaged.
    """
    read_checkpoint(lambda: _find(source), lambda checkpoint: _load(experiment, checkpoint))


def _load(experiment: Experiment, checkpoint: Path) -> None:
    keep = [f"{group}.{part}" for group in ("model", "ema") for part in OPTIONAL_PARTS]
    extra = load_checkpoint(checkpoint, {"model": experiment.model_state()}, allow_missing=keep)
    check_base_weights(extra, experiment.base_fingerprints, experiment.config, checkpoint)
    averaged = run_on_rank_zero(
        lambda: [key for key in SafeReader(checkpoint).read_tensors() if key.startswith("ema.")]
    )
    if averaged:
        # Averages exist for a part of the weights only; they overwrite, in place, the weights loaded above.
        weights = {name: p.detach() for name, p in experiment.hllm.named_parameters() if f"ema.{name}" in set(averaged)}
        load_checkpoint(checkpoint, {"ema": weights}, allow_missing=keep)


def _find(source: Path) -> Path:
    if re.search(r"step-\d+$", source.name):
        source = local_checkpoint(source)
    if (source / MARKER).is_file():
        return verify_checkpoint(source)
    best = run_checkpoint(source, "best")
    if best is None:
        raise ConfigError(
            [
                f"start_from: {source}: neither a checkpoint nor a run with an evaluated one; train that run first, or "
                "name a checkpoint"
            ]
        )
    return best
