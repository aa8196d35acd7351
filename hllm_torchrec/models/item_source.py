"""Sources of item embeddings. `HLLM.item_source` is one; a training stage, an evaluation or a server replaces it.

    model.item_source = LiveItems(model.item_llm, encoder)     # current weights, with gradients
    model.item_source = CachedItems(table)                     # complete catalogue, on every rank
    model.item_source = StoredItems(table, model.adapter)      # a frozen table: sharded from a store, or quantized

Sources are not modules: checkpoints, optimizers, averages, FSDP and DDP ignore their tensors.

Legend: n item ids, N items of the catalogue, E width of an embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from hllm_torchrec.modules.encoders.item_llm import ItemLLM

EncodeItems = Callable[[ItemLLM, Tensor], Tensor]
"""(item_llm, unique item ids [n]) -> [n, E], with gradients: an `ItemEncoder` or a `SubsampledEncoder`."""


class ItemSource(ABC):
    """Callable that returns the embeddings of items."""

    is_live: ClassVar[bool] = False
    """True if embeddings are computed with the current weights of the Item LLM."""

    @abstractmethod
    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] int64 -> [n, E]."""


class LiveItems(ItemSource):
    """Embeddings with the Item LLM's current weights, with gradients; collective if ranks share the encoding."""

    is_live = True

    def __init__(self, item_llm: ItemLLM, encode: EncodeItems) -> None:
        self.item_llm, self.encode = item_llm, encode

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n], without repetitions -> [n, E]. Collective."""
        return self.encode(self.item_llm, item_ids)


class CachedItems(ItemSource):
    """Precomputed embeddings; vectors: [N, E] of the complete catalogue, the same on every rank."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self._transformed: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] -> [n, E]."""
        return self.vectors[item_ids]

    def through(self, module: nn.Module, item_ids: Tensor) -> Tensor:
        """Apply `module` (with buffers only) to the embeddings: item_ids [n] -> [n, E]. Computed once for all items."""
        # In-place changes of a buffer (measuring, loading) increment its version.
        state = (id(module), *(buffer._version for buffer in module.buffers()))
        if self._transformed is None or self._transformed[0] != state:
            with torch.no_grad():
                self._transformed = state, module(self.vectors)
        return self._transformed[1][item_ids]


class StoredItems(ItemSource):
    """Embeddings of a frozen table, which may be sharded over the ranks, followed by a trained adapter.

    table: item ids [n] -> [n, E] float32, see `FrozenItems`; adapter: `HLLM.adapter`, or None.
    """

    def __init__(self, table: nn.Module, adapter: nn.Module | None = None) -> None:
        self.table, self.adapter = table, adapter

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] -> [n, E] float32. Collective."""
        stored = self.raw(item_ids)
        adapted: Tensor = stored if self.adapter is None else self.adapter(stored)
        return adapted

    def raw(self, item_ids: Tensor) -> Tensor:
        """The stored embeddings, before the adapter."""
        vectors: Tensor = self.table(item_ids)
        return vectors


class JoinedItems(ItemSource):
    """A source for the items below `first`, and vectors [N - first, E] for the items from `first` on."""

    def __init__(self, source: ItemSource, first: int, vectors: Tensor) -> None:
        self.source, self.first, self.vectors = source, first, vectors

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] -> [n, E]. Collective if the source is."""
        found = self.source(item_ids.clamp(max=self.first - 1))
        later = item_ids >= self.first
        if not later.any():
            return found
        return torch.where(later[:, None], self.vectors[(item_ids - self.first).clamp(min=0)], found)
