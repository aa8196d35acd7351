"""Transitions of a run: the regression of the next item on the history (`data/transitions.py`).

They are fitted when training starts, with the text embeddings of the Item LLM if it is frozen.
"""

from pathlib import Path

import torch
from torch import Tensor

from hllm_torchrec.common.arrays import Floats
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.transitions import FILE, TransitionOptions, Transitions, fit_transitions
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.modules.features.standardize import Whiten
from hllm_torchrec.modules.features.transition_similarity import TransitionSimilarity

TRANSITIONS_KEY = "transitions"
"""Key of the fingerprint of the run's transitions in a checkpoint's `extra.json`."""


def compares_texts(config: Config) -> bool:
    """True if the fit uses text embeddings: with a frozen Item LLM that encodes the items, not with a store."""
    item = config.item_llm
    return bool(config.objective.transitions) and item.enabled and not item.trainable and not takes_stored_items(config)


def open_transitions(
    config: Config, dataset: Dataset, catalogue: Tensor | None, fitted: Transitions | None
) -> Transitions | None:
    """The transitions of a run, fitted by rank 0 if `fitted` is None; None if `objective.transitions` is 0. Collective.

    catalogue: [N, E] text embeddings; None: the fit uses no texts.
    """
    if not config.objective.transitions or fitted is not None:
        return fitted
    options = TransitionOptions(
        part="valid" if config.data.train_part == "train_and_valid" else "train",
        decay=config.objective.text_decay,
        positive_history=config.data.history == "positive",
        positive_targets=config.objective.positive_targets_only,
    )
    return run_on_rank_zero(lambda: fit_transitions(dataset, _whitened(catalogue), options))


def transition_similarity(config: Config, found: Transitions, device: torch.device) -> TransitionSimilarity:
    """Build the similarity module of a run's transitions, with the configured weight."""
    objective = config.objective
    source, target = (torch.from_numpy(rows).to(device) for rows in (found.source, found.target))
    return TransitionSimilarity(objective.transitions, objective.text_decay, source, target)


def run_transitions(config: Config, folder: Path) -> Transitions | None:
    """The transitions of the run in `folder`; None if its configuration has none.

    Raises:
        ValueError: the file is missing or damaged.
    """
    weight = config.objective.transitions
    found = Transitions.load(folder) if weight else None
    if weight and found is None:
        raise ValueError(
            f"{folder / FILE}: no such file, but objective.transitions is {weight}: restore it from a copy of the run"
        )
    return found


def _whitened(catalogue: Tensor | None) -> Floats | None:
    if catalogue is None or len(catalogue) < 3:
        return None
    texts = catalogue.float().cpu()
    whiten = Whiten(texts.shape[1])
    whiten.measure(texts[1:])
    found: Floats = whiten(texts).numpy()
    return found
