"""Full-catalogue retrieval with an experiment's model: vectors of the items, and the retrieval metrics of a split.

Legend: N items including the unknown item 0, n requested items, D width of the user encoder's inputs, V width of the
item vectors that are compared with users.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.data.predictions import save_predictions
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.evaluation.scoring import metrics_of_target_ranks, rank_catalogue_targets
from hllm_torchrec.metrics.distributed_ranking import CatalogueShard, shard_bounds
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_source import CachedItems, JoinedItems, StoredItems

ITEMS_AT_ONCE = 8192
"""Number of catalogue items whose features all ranks together look up per step."""


def measures_retrieval(experiment: Experiment) -> bool:
    """True if retrieval is evaluated: the configuration enables it, or the model has no queries to rank exposures."""
    return experiment.config.evaluation.retrieval or not experiment.hllm.fusion.has_queries


def evaluate_retrieval(
    experiment: Experiment, loader: Loader, show: bool = False, ranks_folder: Path | None = None
) -> dict[str, Any]:
    """Retrieval metrics of a split (`metrics_of_target_ranks`) with their protocol. Collective.

    ranks_folder: directory to which every ranked target is written with its rank (read by
    `evaluation.retrieval_comparison`), or None.

    In addition to the metrics, the result has `protocol` (or None), `filter_seen`, `targets` ("all" or "positive")
    and `candidates`, the number of candidate items. Cached item embeddings are used if the model has them.
    """
    config = experiment.config
    positive = config.objective.positive_targets_only
    shard, excluded = catalogue_shard(experiment), experiment.dataset.excluded_items
    if excluded.size:
        shard = replace(shard, excluded=torch.from_numpy(excluded).to(experiment.device))
    columns, skipped = rank_catalogue_targets(
        experiment.model,
        loader,
        shard,
        experiment.device,
        show,
        filter_seen=config.evaluation.filter_seen,
        positive_only=positive,
    )
    if ranks_folder is not None:
        save_predictions(columns, ranks_folder)
    return metrics_of_target_ranks(columns, skipped, config.evaluation.ks) | {
        "protocol": config.evaluation.protocol,
        "filter_seen": config.evaluation.filter_seen,
        "targets": "positive" if positive else "all",
        "candidates": experiment.dataset.num_items - 1 - excluded.size,
    }


def catalogue_vectors(experiment: Experiment) -> Tensor:
    """Vectors [N, V] of all items on every rank, gathered from `catalogue_shard`. Collective."""
    return all_gather_variable(catalogue_shard(experiment).vectors)


@torch.no_grad()
def catalogue_shard(experiment: Experiment) -> CatalogueShard:
    """Vectors of this rank's share of the items, which are compared with users: E, or P(E) + ID + ... Collective.

    Row 0 of the first rank is the unknown item. The complete catalogue is in the memory of each rank only if it has all
    embeddings already (`CachedItems`), or if the Item LLM encodes the catalogue here.
    """
    hllm, source = experiment.hllm, experiment.hllm.item_source
    if not hllm.compares_features and not isinstance(source, StoredItems | JoinedItems):
        items = source.vectors if isinstance(source, CachedItems) else experiment.encode_catalogue()
        assert items is not None, "without an Item LLM items are compared by their features"
        return CatalogueShard.of_rank(items)
    was_training = hllm.training
    hllm.eval()
    total = experiment.dataset.num_items
    first, end = shard_bounds(total)
    blocks = -(-total // ITEMS_AT_ONCE)  # the same number of collective look-ups on every rank
    rows = [vectors_of_items(experiment, block) for block in np.array_split(np.arange(first, end), blocks)]
    hllm.train(was_training)
    return CatalogueShard(torch.cat(rows), first, total)


def vectors_of_items(experiment: Experiment, items: NDArray[np.int64]) -> Tensor:
    """Vectors [n, V] of items [n] in the space of the generative loss; n may be 0. Collective."""
    hllm, ids = experiment.hllm, torch.from_numpy(items).to(experiment.device)
    if not hllm.compares_features:
        return hllm.embed_items(ids).float()
    return vectors_by_features(experiment, experiment.request_collator(), items, joined=True)


def vectors_by_features(
    experiment: Experiment, collator: Collator, items: NDArray[np.int64], joined: bool = False
) -> Tensor:
    """P(E) + ID + item features of items [n]: [n, D] float32; n may be 0. Collective.

    joined: see `HLLM.embed_in_feature_space`.
    """
    hllm, device, ids = experiment.hllm, experiment.device, torch.from_numpy(items).to(experiment.device)
    dense = experiment.item_vectors
    vectors = None if dense is None else torch.from_numpy(dense[items]).to(device)
    return hllm.embed_in_feature_space(collator.item_features(items).to(device), ids, vectors, joined).float()
