"""`SlotLayout`: order of the feature slots in a batch, and the item vector of each slot.

Legend: T history positions, Q queries, X exposures, U unique items, S slots, D user width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.modules.fusion import Fusion


@dataclass(frozen=True)
class SlotLayout:
    """Slots in the order of the batch's KJT, as the collator writes them.

    T history positions, Q queries, then (late fusion) X targets, then (item space of features) U items.

    interleaved: odd history positions are action tokens; compares_features: training batches have slots of items.
    """

    fusion: Fusion
    interleaved: bool
    compares_features: bool

    def bounds(self, batch: HybridBatch) -> tuple[int, int, int]:
        """Return the numbers of slots before the queries, before the targets, and before the items."""
        history = batch.item_ids.numel()
        queries = batch.query_times.numel() if self.fusion.has_queries else 0
        targets = batch.target_items.numel() if self.fusion.query_is_user else 0
        return history, history + queries, history + queries + targets

    def has_items(self, batch: HybridBatch) -> bool:
        """True for training batches if the loss compares features; evaluation batches have no item slots."""
        return self.compares_features and batch.features.stride() > self.bounds(batch)[2]

    def item_vectors(self, batch: HybridBatch, items: Tensor) -> Tensor:
        """Return the vector [S, D] of each slot's item from `items` [U, D]; 0 for action tokens and [USER] queries."""
        parts = [items[batch.history_index]]
        if self.interleaved:
            parts[0] = parts[0] * (torch.arange(len(parts[0]), device=items.device) % 2 == 0)[:, None]
        targets = items[batch.target_index]
        if self.fusion.query_is_target:
            parts.append(targets[batch.query_target])
        if self.fusion.query_is_user:  # the query has no item; the target has its own slot
            parts += [targets.new_zeros(batch.query_times.numel(), targets.shape[1]), targets]
        if self.has_items(batch):
            parts.append(items)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
