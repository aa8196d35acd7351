"""A frozen item table filled from an embedding store, each rank reading the rows of its own shards."""

import torch
from torch import Tensor
from torch.nn import Module
from torchrec.distributed.types import ShardedTensor

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.errors import ConfigError
from hllm_torchrec.modules.frozen_items import FROZEN_ITEMS
from hllm_torchrec.ranks import together
from hllm_torchrec.store.store import EmbeddingStore, Snapshot

_ROWS = 65_536
"""Rows read at a time."""


@torch.no_grad()
def fill_from_store(model: Module, dataset: Dataset, store: EmbeddingStore) -> None:
    """Copy the vectors of the dataset's items into the table `FROZEN_ITEMS` of `model`; row 0 is zeros. Collective.

    model: sharded or not; its `state_dict` has the table.

    Raises:
        ConfigError: items of the dataset are not in the store.
    """
    snapshot, raw_ids = store.snapshot(), dataset.items["raw_item_id"]
    parts = list(_parts(model))
    missing = sum(together(lambda: sum(_fill(part, row, column, snapshot, raw_ids) for part, row, column in parts)))
    if missing:
        raise ConfigError(
            [
                f"item_llm.store: {store.root}: lacks {missing} of the dataset's {len(raw_ids)} items: bring it up to "
                "date with `hllm embed`"
            ]
        )


def _parts(model: Module) -> list[tuple[Tensor, int, int]]:
    """This rank's parts of the table: (values, first row, first column)."""
    found: list[tuple[Tensor, int, int]] = []
    for name, value in model.state_dict().items():
        if not name.endswith(f"embedding_bags.{FROZEN_ITEMS}.weight"):
            continue
        if isinstance(value, ShardedTensor):
            found += [(shard.tensor, *shard.metadata.shard_offsets) for shard in value.local_shards()]
        else:
            found.append((value, 0, 0))
    return found


def _fill(target: Tensor, row: int, column: int, snapshot: Snapshot, raw_ids: object) -> int:
    """Fill a part in place; the number of its items that the store lacks (0 for the unknown item)."""
    missing = 0
    for at in range(0, target.shape[0], _ROWS):
        end = min(at + _ROWS, target.shape[0])
        first = max(row + at, 1)  # item i is row i of the table and row i - 1 of the dataset's items
        ids = raw_ids.slice(first - 1, max(0, row + end - first)).cast("large_string").combine_chunks()  # type: ignore[attr-defined]
        vectors, known = snapshot.gather(ids)
        missing += int((~known).sum())
        target[at : first - row].zero_()
        target[first - row : end].copy_(vectors[:, column : column + target.shape[1]])
    return missing
