"""Where item embeddings come from: the Item LLM over tokens in the memory map, shared out over the ranks."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from hllm_torchrec.data.tokens import TokenStore
from hllm_torchrec.exchange import encode_unique_items, world_size
from hllm_torchrec.logs import progress
from hllm_torchrec.modules.item_llm import ItemLLM

CATALOGUE_TOKENS = 16_384
"""Tokens encoded at a time when the whole catalogue is."""


class ItemEncoder:
    """Callable that `HLLM` uses to embed the unique items of the global batch, each on one rank only.

    The tokens are looked up by the rank that encodes them (it may be another than the one whose batch has the
    item), so batches carry ids, not text.
    """

    def __init__(self, tokens: TokenStore, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.encoded_tokens = 0
        """Tokens encoded on this rank so far, [ITEM] included: what the throughput log counts."""
        self.attended_keys = 0
        """Keys that those tokens attended to, all together: what their attention cost."""

    def __call__(self, item_llm: ItemLLM, unique_items: Tensor) -> Tensor:
        """Embeddings [U, E] of this rank's `unique_items` [U], with gradients."""
        return encode_unique_items(unique_items, self.costs, lambda ids: self.encode(item_llm, ids))

    def costs(self, ids: Tensor) -> Tensor:
        """Tokens of each item, the [ITEM] vector included."""
        rows, offsets = ids.cpu().numpy(), self.tokens.offsets
        return torch.from_numpy(offsets[rows + 1] - offsets[rows] + 1).to(ids.device)

    def encode(self, item_llm: ItemLLM, ids: Tensor) -> Tensor:
        """Embeddings [n, E] of `ids` [n], on this rank."""
        token_ids, cu_seqlens = self.tokens.gather(ids.cpu().numpy())
        self._count(np.diff(cu_seqlens), item_llm)
        return item_llm(torch.from_numpy(token_ids).to(self.device), torch.from_numpy(cu_seqlens).to(self.device))

    def _count(self, lengths: np.ndarray, item_llm: ItemLLM) -> None:
        lengths = lengths + (1 if item_llm.pooling == "item" else lengths == 0)
        self.encoded_tokens += int(lengths.sum())
        self.attended_keys += int((lengths * (lengths + 1) // 2 if item_llm.causal else lengths**2).sum())

    @torch.no_grad()
    def encode_catalogue(self, item_llm: ItemLLM, embed: Callable[[Tensor], Tensor], show: bool) -> Tensor:
        """Embeddings [N, E] of all items, row 0 the unknown one; ranks share the work. Dropout is off.

        embed: the model's `embed_items`, through which wrappers of the model see the call.
        """
        was_training = item_llm.training
        item_llm.eval()
        table = torch.zeros(len(self.tokens), item_llm.width, device=self.device)
        shares = list(self._chunks(world_size()))
        with progress(len(shares), "encode items", show) as bar:
            for ids in shares:
                table[ids] = embed(ids).float()
                bar.update(1)
        item_llm.train(was_training)
        return table

    def _chunks(self, world: int) -> Iterator[Tensor]:
        """Ids sorted by length, cut so that a rank encodes about CATALOGUE_TOKENS at a time."""
        lengths = self.tokens.lengths + 1
        order = np.argsort(lengths, kind="stable")
        parts = np.cumsum(lengths[order]) // (CATALOGUE_TOKENS * world)
        for part in np.split(order, np.flatnonzero(np.diff(parts)) + 1):
            yield torch.from_numpy(np.sort(part)).to(self.device)
