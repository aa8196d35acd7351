"""Warm start: initializes a run with the weights of another run, as stage II of HLLM starts from stage I.

The nightly job starts from the previous night's run in the same way. Tables may have grown since, and the state of the
optimizers may be loaded, too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hllm_torchrec.checkpoint.growth import MODEL, saved_table_rows
from hllm_torchrec.checkpoint.layout import MARKER
from hllm_torchrec.checkpoint.load import load_checkpoint, verify_checkpoint
from hllm_torchrec.checkpoint.remote_runs import local_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.checkpoint.selection import read_checkpoint, run_checkpoint
from hllm_torchrec.checkpoint.state import flatten, is_under
from hllm_torchrec.common.errors import ConfigError, did_you_mean
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.models.ema import EmaWeights
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.lora_base import check_base_weights
from hllm_torchrec.models.new_rows import fill_new_rows
from hllm_torchrec.models.run_vocabulary import check_vocabulary

OPTIONAL_PARTS = (
    "adapter",
    "context_scales",
    "creative",
    "creative_head",
    "features",
    "head",
    "liked_texts",
    "logit_scale",
    "position_bias",
    "project_item",
    "project_next",
    "project_vectors",
    "standardise",
    "task_log_variances",
    "task_scales",
    "user_token",
    "value_head",
)
"""Parts of the model that the checkpoint may lack; the Item LLM and the user encoder must be in it."""

OPTIMIZER_GROUPS = ("dense", "tables", "ema")
"""Groups of a checkpoint other than the weights."""
_REMEDY = "Choose another run, or parts that keep their initial values (start_from_skip: [PART, ...])"


def start_checkpoint(config: Config) -> Path | None:
    """Return the checkpoint that `start_from` names, or the best checkpoint of the run that it names. Collective.

    None: `start_from` is not set.

    Raises:
        ConfigError: there is no such checkpoint.
        ValueError: the checkpoint's files are damaged.
    """
    if config.start_from is None:
        return None
    source = Path(config.start_from)
    if re.search(r"step-\d+$", source.name):
        source = local_checkpoint(source)
    if (source / MARKER).is_file():
        return verify_checkpoint(source)
    best = run_checkpoint(source, "best")
    if best is None:
        raise ConfigError(
            [
                f"start_from: {source}: neither a checkpoint nor a run with an evaluated checkpoint; train that run "
                "first, or name a checkpoint"
            ]
        )
    return best


def warm_start(experiment: Experiment, checkpoint: Path) -> Path:
    """Load the weights of another run's checkpoint into a newly built model; return the checkpoint. Collective.

    Averaged weights (`optim.ema`) are used if the other run has them, because they were the ones evaluated to select
    the best checkpoint. Tables may have grown: see `checkpoint.growth`. Weights of `start_from_skip` keep their initial
    values, and so do weights of OPTIONAL_PARTS that the checkpoint lacks, with a warning. If the other run has pruned
    the checkpoint since it was selected, a checkpoint is selected again.

    Raises:
        ValueError: the checkpoint's ids are not those of the dataset; its Item LLM or user encoder differ, or a part
            has another shape; its files are damaged.
    """
    given = iter([checkpoint])  # used for the first attempt only

    def find() -> Path:
        selected = next(given, None) or start_checkpoint(experiment.config)
        assert selected is not None, "start_from names a run"
        return selected

    return read_checkpoint(find, lambda path: _load_weights(experiment, path))


def _load_weights(experiment: Experiment, checkpoint: Path) -> Path:
    skip = experiment.config.start_from_skip
    check_vocabulary(experiment.config, experiment.dataset, checkpoint, skip)
    state = {MODEL: experiment.model_state()}
    _check_parts(skip, state[MODEL])
    extra = _load(checkpoint, state, skip)
    check_base_weights(extra, experiment.base_fingerprints, experiment.config, checkpoint)
    averaged = _averaged(checkpoint)
    if averaged:
        # Only some weights have averages. They overwrite, in place, the weights loaded above.
        weights = {name: p.detach() for name, p in experiment.hllm.named_parameters() if f"ema.{name}" in averaged}
        _load(checkpoint, {"ema": weights}, skip)
    fill_new_rows(experiment, checkpoint, skip)
    return checkpoint


def describe_start(experiment: Experiment, checkpoint: Path) -> dict[str, Any]:
    """Facts for the run's log: the checkpoint that the run starts from, and the numbers of known and new ids of each
    table that has grown."""
    saved = saved_table_rows(SafeReader(checkpoint).read_tensors())
    present = experiment.batch_spec.tables(experiment.dataset).items()
    grown = {name: [saved[name] - 1, rows - saved[name]] for name, rows in present if saved.get(name, rows) < rows}
    return {"checkpoint": str(checkpoint), "known_and_new_ids": grown}


def continue_optimizers(
    experiment: Experiment, state: Mapping[str, Any], ema: EmaWeights | None, checkpoint: Path
) -> int:
    """Load a checkpoint's weights (not averaged), averages and optimizer state: `start_from_optimizer`. Collective.

    Args:
        state: state of the trainer, as it is saved in checkpoints.
        ema: averages of the trainer; they start from the loaded weights if the checkpoint has none.

    Returns:
        Number of optimizer steps before this run: those of the checkpoint's run and of the runs before it.
    """
    skip = experiment.config.start_from_skip
    averaged = bool(_averaged(checkpoint))
    extra = _load(checkpoint, {name: group for name, group in state.items() if name != "ema" or averaged}, skip)
    fill_new_rows(experiment, checkpoint, skip, state.get("ema"))
    if ema is not None and not averaged:
        ema.restart()
    return int(extra["step"]) + int(extra.get("earlier_steps", 0))


def _averaged(checkpoint: Path) -> set[str]:
    """Keys of the averaged weights in a checkpoint. Collective."""
    return run_on_rank_zero(lambda: {key for key in SafeReader(checkpoint).read_tensors() if key.startswith("ema.")})


def _load(checkpoint: Path, state: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    """Load all parts of `state` except those of `skip`; return the checkpoint's extra.json.

    Optional parts may be missing in the checkpoint, or in the model.
    """
    # A part may be frozen now and have been trained before, or the reverse. So the state of optimizers may be missing,
    # but the weights must exist.
    optional = [*OPTIMIZER_GROUPS, *(f"{MODEL}.{part}" for part in (*OPTIONAL_PARTS, *skip))]
    left_out = [f"{group}.{part}" for group in state for part in skip]
    wanted: dict[str, dict[str, Any]] = {group: {} for group in state}
    for key, tensor in flatten(state).items():
        if not is_under(key, left_out):
            group, _, name = key.partition(".")
            wanted[group][name] = tensor
    return load_checkpoint(checkpoint, wanted, allow_missing=optional, remedy=_REMEDY)


def _check_parts(skip: tuple[str, ...], weights: Mapping[str, Any]) -> None:
    """Raise ConfigError for an entry of `start_from_skip` that is not a part of the model."""
    parts = sorted({name.split(".")[0] for name in weights})
    for part in skip:
        if not any(is_under(name, [part]) for name in weights):
            raise ConfigError(
                f"start_from_skip: {part!r}: no part of the model{did_you_mean(part, parts)}; it has {', '.join(parts)}"
            )
