"""Item embeddings as a frozen TorchRec table: stage II of HLLM, which trains only the user encoder and features.

The table is an `EmbeddingBagCollection`, so TorchRec shards it over the ranks. Its look-up runs without gradients,
because TorchRec would otherwise train a sharded table even if no optimizer was chosen for it.

Legend: N items (0 is unknown), n items looked up, E width.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

FROZEN_ITEMS = "frozen_items"
"""Name of the table and of its feature."""

_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class FrozenItems(nn.Module):
    """A frozen embedding table.

    Args:
        rows: N.
        width: E.
        dtype: of the table, "fp16" or "fp32"; the output is float32.
        device: of the table ("meta" before sharding).
    """

    def __init__(self, rows: int, width: int, dtype: str = "fp16", device: torch.device | None = None) -> None:
        super().__init__()
        self.rows, self.width = rows, width
        table = EmbeddingBagConfig(
            name=FROZEN_ITEMS,
            embedding_dim=width,
            num_embeddings=rows,
            feature_names=[FROZEN_ITEMS],
            pooling=PoolingType.SUM,
            data_type=_TYPES[dtype],
        )
        self.table = EmbeddingBagCollection(tables=[table], device=device)
        self.table.requires_grad_(False)

    @torch.no_grad()
    def forward(self, item_ids: Tensor) -> Tensor:
        """Look up item_ids [n] int64: [n, E] float32. If the table is sharded, all ranks must call it."""
        ids = item_ids if item_ids.numel() else item_ids.new_zeros(1)  # TorchRec cannot handle a batch of zero bags
        # One id per bag: the sum over a bag is the item's row.
        features = KeyedJaggedTensor(
            keys=[FROZEN_ITEMS], values=ids, lengths=torch.ones_like(ids, dtype=torch.int32), stride=ids.numel()
        )
        return self.table(features).values()[: item_ids.numel()].float()
