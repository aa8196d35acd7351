"""Sources of item embeddings: `HLLM` is handed one, and a stage, an evaluation or a server hands it another.

    model.item_source = LiveItems(model.item_llm, encoder)     # by the present weights, with gradients
    model.item_source = CachedItems(table)                     # of the whole catalogue, on every rank
    model.item_source = StoredItems(table, model.adapter)      # a frozen table: sharded from a store, or quantized

Sources are no modules: what they hold is in no checkpoint, optimizer or average, and FSDP and DDP do not see it.

Legend: n item ids, N items of the catalogue, E width of an embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from hllm_torchrec.modules.encoders.item_llm import ItemLLM

EncodeItems = Callable[[ItemLLM, Tensor], Tensor]
"""(item_llm, unique item ids [n]) -> [n, E], with gradients: `ItemEncoder`, or `SubsampledEncoder` around it."""


class ItemSource(ABC):
    """Callable that gives the embeddings of items."""

    is_live: ClassVar[bool] = False
    """Whether embeddings are made by the present weights of the Item LLM."""

    @abstractmethod
    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] int64 -> [n, E]."""


class LiveItems(ItemSource):
    """Embeddings by the Item LLM's present weights, with gradients; collective where ranks share the items out."""

    is_live = True

    def __init__(self, item_llm: ItemLLM, encode: EncodeItems) -> None:
        self.item_llm, self.encode = item_llm, encode

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n], each once -> [n, E]. Collective."""
        return self.encode(self.item_llm, item_ids)


class CachedItems(ItemSource):
    """Embeddings that were made before; vectors: [N, E] of the whole catalogue, the same on every rank."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] -> [n, E]."""
        return self.vectors[item_ids]


class StoredItems(ItemSource):
    """Embeddings of a frozen table, which may be sharded over the ranks, and a trained adapter on top of them.

    table: item ids [n] -> [n, E] float32, see `FrozenItems`; adapter: the model's, or None.
    """

    def __init__(self, table: nn.Module, adapter: nn.Module | None = None) -> None:
        self.table, self.adapter = table, adapter

    def __call__(self, item_ids: Tensor) -> Tensor:
        """item_ids [n] -> [n, E] float32. Collective."""
        stored = self.raw(item_ids)
        adapted: Tensor = stored if self.adapter is None else self.adapter(stored)
        return adapted

    def raw(self, item_ids: Tensor) -> Tensor:
        """The same before the adapter."""
        vectors: Tensor = self.table(item_ids)
        return vectors
