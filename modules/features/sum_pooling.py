"""Sum pooling over the rows of a TorchRec collection that returns one row per id.

`EmbeddingCollection` and `ManagedCollisionEmbeddingCollection` return one row for each id. `SumPooledCollection` adds
the rows of each bag, so that it has the interface of an `EmbeddingBagCollection` with sum pooling.

Legend: S bags, V ids of all bags of a key, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class SumPooledCollection(nn.Module):
    """Bags with sum pooling over an `EmbeddingCollection`, with or without managed collisions.

    The collection, which TorchRec shards, is the child `collection`. Every feature must belong to one table.
    """

    def __init__(self, collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection) -> None:
        super().__init__()
        self.collection = collection
        plain = collection if isinstance(collection, EmbeddingCollection) else collection._embedding_collection
        self._configs = as_bag_configs(plain.embedding_configs())
        self._names = [name for table in self._configs for name in table.feature_names]
        self._widths = [table.embedding_dim for table in self._configs for _ in table.feature_names]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configurations of the tables, as of an `EmbeddingBagCollection`."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up the bags and sum their rows: [S, D] per key."""
        rows = self.collection(features)
        if isinstance(rows, tuple):  # managed collisions return the rows, and the row numbers of the ids
            rows = rows[0]
        pooled = [sum_bags(rows[name].values(), rows[name].lengths()) for name in self._names]
        return KeyedTensor(self._names, self._widths, torch.cat(pooled, dim=1))


def as_bag_configs(tables: Sequence[EmbeddingConfig]) -> list[EmbeddingBagConfig]:
    """Convert configurations of tables to those of an `EmbeddingBagCollection` with sum pooling."""
    return [
        EmbeddingBagConfig(
            name=table.name,
            embedding_dim=table.embedding_dim,
            num_embeddings=table.num_embeddings,
            feature_names=table.feature_names,
            data_type=table.data_type,
            pooling=PoolingType.SUM,
        )
        for table in tables
    ]


def sum_bags(rows: Tensor, lengths: Tensor) -> Tensor:
    """Sum rows [V, D] of bags of `lengths` [S]: [S, D]; an empty bag is zero."""
    bags = torch.arange(lengths.numel(), device=rows.device)
    of_row = torch.repeat_interleave(bags, lengths.to(bags.dtype), output_size=rows.shape[0])
    return rows.new_zeros(lengths.numel(), rows.shape[1]).index_add(0, of_row, rows)
