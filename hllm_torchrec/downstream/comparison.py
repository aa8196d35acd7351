"""Stage III comparison of the same ID-only DLRM without and with stored vectors.

    alone            the baseline `dlrm` of `hllm baselines`
    items            + each target item's vector, from a store by raw id
    users_<store>    + the user's vector at the time of the exposure, from a store of exposures
    both_<store>     + both

Legend: B rows of a batch, N items, E and D widths of item and user vectors, F + C columns of `DLRMBatch`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hllm_torchrec
from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.config.loading import to_dict
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.predictions import PredictionColumns
from hllm_torchrec.downstream.dlrm import DLRMTrainer
from hllm_torchrec.downstream.dlrm_config import DLRMConfig, DownstreamConfig
from hllm_torchrec.downstream.dlrm_data import DLRMBatch, DLRMData, Window
from hllm_torchrec.downstream.plugin import VectorLookup, append_vectors
from hllm_torchrec.evaluation.cached_predictions import SPLITS, run_if_changed
from hllm_torchrec.inference.exposure_store import ExposureLookup
from hllm_torchrec.store.keys import raw_keys
from hllm_torchrec.store.store import EmbeddingStore

RECORD = "downstream.json"
SAMPLE = 10_000
"""Number of items that are looked up to check that a store has items of the dataset."""


class VectorData(DLRMData):
    """Batches of the DLRM with stored vectors after the numeric features.

    Args:
        items: store of item vectors by raw id, or None.
        users: store of exposures, or None.

    Raises:
        ConfigError: a feature is unknown.
        ValueError: a store does not exist.
    """

    def __init__(self, dataset: Dataset, config: DLRMConfig, items: str | None, users: str | None) -> None:
        super().__init__(dataset, config)
        self._items = None if items is None else _item_vectors(dataset, items)
        self._users = None if users is None else ExposureLookup(users)

    @property
    def widths(self) -> list[int]:
        """E and D, if the respective store is used."""
        items = [] if self._items is None else [self._items.shape[1] - 1]
        return items + ([] if self._users is None else [self._users.width])

    def batch(self, window: Window, rows: Ints, rng: np.random.Generator | None = None) -> DLRMBatch:
        """Like `DLRMData.batch`, with dense_features [B, F + C + E + 1 + D + 1]; a store that is None adds no columns.

        Raises:
            ValueError: the store of exposures was made from a different dataset.
        """
        batch, histories, found = super().batch(window, rows, rng), window.histories, []
        events = histories.exposures[rows]
        items = histories.item_ids[events]
        if self._items is not None:
            found.append(self._items[torch.from_numpy(items)])
        if self._users is not None:
            users = histories.user_ids[histories.row_of_event[events]]
            found.append(self._users(users, histories.position[events], items, histories.timestamps[events]))
        return dataclasses.replace(batch, dense_features=append_vectors(batch.dense_features, *found))


def _item_vectors(dataset: Dataset, store: str) -> Tensor:
    """Item vectors [N, E + 1] in the format of `plugin.VectorLookup`; the store does not contain the unknown item 0."""
    lookup = VectorLookup(store)
    found = lookup(raw_keys(dataset.items["raw_item_id"], lookup.store.kind))
    unknown = torch.zeros(1, found.shape[1])  # row of item 0, so that item ids index the result directly
    unknown[:, -1] = 1
    return torch.cat([unknown, found])


def check_stores(config: DownstreamConfig, dataset: Dataset) -> None:
    """Open every store in the same way as the rows do, so that errors are raised before training.

    Raises:
        ValueError: a store does not exist, has the wrong kind, or has none of the first SAMPLE items.
    """
    for users in config.user_stores:
        ExposureLookup(users)
    if config.item_store is None:
        return
    lookup = VectorLookup(config.item_store)
    part = lookup.store.facts.get("part")
    if part not in (None, "items", "item_features"):
        raise ValueError(f"item_store: {config.item_store}: a store of {part}, not of items: see hllm embed --items")
    lookup(dataset.items["raw_item_id"][:SAMPLE].drop_null().cast("large_string").combine_chunks())
    if lookup.num_requested and lookup.unknown_share == 1:
        raise ValueError(
            f"item_store: {config.item_store}: it has none of the first {lookup.num_requested:,} items of "
            f"{config.dataset}: give the store that hllm embed --items made from a run on this dataset"
        )


def run_row(config: DownstreamConfig, row: str, dataset: Dataset, device: torch.device) -> bool:
    """Train and score a row; writes `predictions/{valid,test}` and `downstream.json` to `<output>/<row>`. Collective.

    Returns:
        False if the files already exist for the same dataset, stores, settings and library version.

    Raises:
        ConfigError: the dataset does not have a feature.
        ValueError: a store does not exist or does not fit the dataset.
    """
    items, users = config.possible_rows()[row]
    directory = Path(config.output) / row
    made_of = {
        "row": row,
        "way": config.way,
        "vector_dropout": config.vector_dropout,
        "config": to_dict(config.dlrm),
        "dataset": dataset.fingerprint,
        "stores": [None if path is None else _state_of(path) for path in (items, users)],
        "hllm_torchrec": hllm_torchrec.__version__,
    }

    def make() -> tuple[dict[str, PredictionColumns], dict[str, float]]:
        data = VectorData(dataset, config.dlrm, items, users)
        trainer = DLRMTrainer(dataset, config.dlrm, device, data, config.way, config.vector_dropout)
        fitted = trainer.fit(directory / "checkpoints")
        return {split: trainer.score(split) for split in SPLITS}, fitted

    return run_if_changed(directory / RECORD, made_of, make)


def _state_of(store: str) -> dict[str, Any]:
    """Fingerprint and version of a store."""
    opened = EmbeddingStore.open(store)
    return {"fingerprint": opened.fingerprint, "version": opened.snapshot().version}
