"""Frozen item table filled from an embedding store; each rank reads the rows of its own shards."""

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import Module

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.coordination import run_on_all_ranks, run_on_rank_zero
from hllm_torchrec.embedding.sharding import shard_frozen_items
from hllm_torchrec.embedding.tables import local_shards
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.fingerprint import item_facts
from hllm_torchrec.models.item_source import StoredItems
from hllm_torchrec.models.run_evidence import reads_texts
from hllm_torchrec.modules.features.frozen_items import FROZEN_ITEMS, FrozenItems
from hllm_torchrec.store.keys import is_key, raw_keys
from hllm_torchrec.store.store import EmbeddingStore, Snapshot

_ROWS = 65_536
"""Number of rows that are read at a time."""


def use_stored_items(experiment: Experiment, path: str | None = None) -> None:
    """Make the model look up item embeddings in a frozen fp16 table that is filled from a store. Collective.

    The weights of the Item LLM must be loaded before, because the store must have been made with the same weights.

    Args:
        path: path of the store; by default `item_llm.store`.

    Raises:
        ConfigError: the store does not exist, was made by a different Item LLM, or lacks items of the dataset.
    """
    root, hllm = path or experiment.config.item_llm.store, experiment.hllm
    facts = item_facts(experiment)
    assert root is not None and hllm.item_llm is not None

    def opened() -> None:
        try:
            EmbeddingStore.open(root).require(facts)
        except ValueError as error:
            raise ConfigError(
                [f"item_llm.store: {error}; with start_from, the Item LLM is that of the run that start_from names"]
            ) from None

    run_on_rank_zero(opened)
    items = FrozenItems(experiment.dataset.num_items, hllm.item_llm.width, device=torch.device("meta"))
    table = shard_frozen_items(items, experiment.device)
    fill_from_store(table, experiment.dataset, EmbeddingStore.open(root))
    hllm.item_source = StoredItems(table, hllm.adapter)


@torch.no_grad()
def read_catalogue(experiment: Experiment, path: str) -> None:
    """Use the embeddings of a store in a run that otherwise encodes its items, for serving. Collective.

    The unknown item is encoded, because no store has it.

    Raises:
        ConfigError: see `use_stored_items`.
        ValueError: the run has no Item LLM, or already uses a store.
    """
    hllm, live = experiment.hllm, experiment.live_items
    if live is None or isinstance(hllm.item_source, StoredItems):
        has = "no Item LLM" if live is None else "a store of its own (item_llm.store)"
        raise ValueError(f"{path}: the run has {has}: leave the store of items out")
    use_stored_items(experiment, path)
    vectors = experiment.encode_catalogue()
    assert vectors is not None
    hllm.item_source = live
    vectors[0] = hllm.embed_items(torch.zeros(1, dtype=torch.int64, device=experiment.device), live)[0]
    experiment.frozen_catalogue = vectors
    if experiment.evidence is not None and reads_texts(experiment.config):
        experiment.evidence = experiment.evidence.with_text(vectors.float().cpu().numpy())


@torch.no_grad()
def fill_from_store(model: Module, dataset: Dataset, store: EmbeddingStore) -> None:
    """Copy the vectors of the dataset's items into the table `FROZEN_ITEMS` of `model`; row 0 becomes 0. Collective.

    model: a sharded or unsharded module whose `state_dict` has the table.

    Raises:
        ConfigError: items of the dataset are not in the store.
    """
    snapshot, raw_ids = store.snapshot(), dataset.items["raw_item_id"]
    name = f"embedding_bags.{FROZEN_ITEMS}.weight"
    tables = [value for key, value in model.state_dict().items() if key.endswith(name)]
    parts = [part for table in tables for part in local_shards(table)]
    missing = sum(
        run_on_all_ranks(lambda: sum(_fill(part, row, column, snapshot, raw_ids) for part, row, column in parts))
    )
    if missing:
        raise ConfigError(
            [
                f"item_llm.store: {store.root}: lacks {missing} of the dataset's {len(raw_ids)} items: bring it up to "
                "date with `hllm embed`"
            ]
        )


def _fill(target: Tensor, row: int, column: int, snapshot: Snapshot, raw_ids: pa.ChunkedArray) -> int:
    """Fill a shard in place; returns the number of its items that the store lacks (the unknown item is not counted).

    row, column: position of the shard in the table.
    """
    missing = 0
    for at in range(0, target.shape[0], _ROWS):
        end = min(at + _ROWS, target.shape[0])
        first = max(row + at, 1)  # item i is row i of the table and row i - 1 of the dataset's items
        ids = raw_keys(raw_ids.slice(first - 1, max(0, row + end - first)), snapshot.store.kind)
        vectors, known = snapshot.gather(ids)
        missing += int((~known & is_key(ids)).sum())
        # This slice is empty except in the block that contains row 0, the unknown item.
        target[at : first - row].zero_()
        target[first - row : end].copy_(vectors[:, column : column + target.shape[1]])
    return missing
