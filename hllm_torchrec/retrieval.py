"""Full-catalogue retrieval of an experiment: what a run's training, its evaluation job and its results share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.evaluate import metrics_of_ranks, rank_targets, save_predictions
from hllm_torchrec.exchange import all_gather_variable
from hllm_torchrec.experiment import Experiment

ITEMS_AT_ONCE = 8192
"""Catalogue items whose features one rank looks up at a time."""


def measures_retrieval(experiment: Experiment) -> bool:
    """Whether the configuration asks for it, or the model can do nothing else."""
    return experiment.config.evaluation.retrieval or experiment.hllm.fusion == "none"


def retrieve(
    experiment: Experiment, loader: Loader, show: bool = False, ranks_to: Path | None = None
) -> dict[str, Any]:
    """Metrics of `score_retrieval` over a split with what they were measured under. Collective.

    ranks_to: directory that gets every target with its rank (`metrics.retrieval_table` reads it), or None.

    Besides the numbers: `protocol` (or None), `filter_seen`, `targets` ("all" or "positive") and `candidates`,
    the size of the catalogue. In a model with an Item LLM its `item_cache` is used where it is filled.
    """
    config = experiment.config
    positive = config.objective.positive_targets_only
    columns, skipped = rank_targets(
        experiment.model,
        loader,
        catalogue_vectors(experiment),
        experiment.device,
        show,
        filter_seen=config.evaluation.filter_seen,
        positive_only=positive,
    )
    if ranks_to is not None:
        save_predictions(columns, ranks_to)
    return metrics_of_ranks(columns, skipped, config.evaluation.ks) | {
        "protocol": config.evaluation.protocol,
        "filter_seen": config.evaluation.filter_seen,
        "targets": "positive" if positive else "all",
        "candidates": experiment.dataset.num_items - 1,
    }


@torch.no_grad()
def catalogue_vectors(experiment: Experiment) -> Tensor:
    """[N, V] what the user's output is compared with, row 0 the unknown item: E, or P(E) + ID + ... Collective."""
    hllm = experiment.hllm
    if not hllm.compares_features:
        items = experiment.encode_catalogue() if hllm.item_cache is None else hllm.item_cache
        assert items is not None, "without an Item LLM items are compared by their features"
        return items
    was_training = hllm.training
    hllm.eval()
    collator = Collator(experiment.dataset, experiment.recipe, item_vectors=experiment.item_vectors)
    world, rank = dist.get_world_size(), dist.get_rank()
    blocks = np.array_split(np.arange(experiment.dataset.num_items), -(-experiment.dataset.num_items // ITEMS_AT_ONCE))
    rows = []
    for block in blocks:
        mine = np.array_split(block, world)[rank]  # ranks share each block, in order
        vectors = None if experiment.item_vectors is None else torch.from_numpy(experiment.item_vectors[mine])
        embedded = hllm.embed_in_feature_space(
            collator.item_features(mine).to(experiment.device),
            torch.from_numpy(mine).to(experiment.device),
            None if vectors is None else vectors.to(experiment.device),
        )
        rows.append(all_gather_variable(embedded.float()))
    hllm.train(was_training)
    return torch.cat(rows)
