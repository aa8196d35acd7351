"""A run that begins with the weights of another: stage II of HLLM starts from stage I."""

import re
from pathlib import Path

from hllm_torchrec.bases import check_bases
from hllm_torchrec.checkpoint import best_checkpoint, load_checkpoint, verify_checkpoint
from hllm_torchrec.checkpoint_files import MARKER
from hllm_torchrec.checkpoint_reader import SafeReader
from hllm_torchrec.errors import ConfigError
from hllm_torchrec.experiment import Experiment
from hllm_torchrec.ranks import on_rank_zero
from hllm_torchrec.remote.runs import checkpoint_copy, run_copy

MAY_BE_NEW = (
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
"""Parts of the model that the other run need not have; the Item LLM and the user encoder it must."""


def start_from(experiment: Experiment, source: Path) -> None:
    """Load the weights of a run's best checkpoint, or of a checkpoint, into a newly built model. Collective.

    Averaged weights (`optim.ema`) where the other run has them, as it was they that made the checkpoint the best.
    What the checkpoint lacks of the parts MAY_BE_NEW, or has in another shape, keeps its initial values; a warning
    says so. Optimizers begin anew.

    Raises:
        ConfigError: there is no such checkpoint.
        ValueError: its Item LLM or user encoder are others, or its files are damaged.
    """
    checkpoint = _find(source)
    keep = [f"{group}.{part}" for group in ("model", "ema") for part in MAY_BE_NEW]
    extra = load_checkpoint(checkpoint, {"model": experiment.model_state()}, allow_missing=keep)
    check_bases(extra, experiment.bases, experiment.config, checkpoint)
    averaged = on_rank_zero(lambda: [key for key in SafeReader(checkpoint).read_tensors() if key.startswith("ema.")])
    if averaged:
        own = {name: p.detach() for name, p in experiment.hllm.named_parameters() if f"ema.{name}" in set(averaged)}
        load_checkpoint(checkpoint, {"ema": own}, allow_missing=keep)


def _find(source: Path) -> Path:
    if re.search(r"step-\d+$", source.name):
        source = checkpoint_copy(source)
    if (source / MARKER).is_file():
        return verify_checkpoint(source)
    found = best_checkpoint(run_copy(source, "best") / "checkpoints")
    if found is None:
        raise ConfigError(
            [
                f"start_from: {source}: neither a checkpoint nor a run with an evaluated one; train that run first, or "
                "name a checkpoint"
            ]
        )
    return found
