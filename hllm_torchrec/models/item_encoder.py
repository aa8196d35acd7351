"""Item encoding: runs the Item LLM on memory-mapped tokens, with the items distributed over the ranks."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hllm_torchrec.common.errors import ArgumentError, configured_by
from hllm_torchrec.common.progress import progress
from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.distributed.collectives import encode_unique_items, global_max, world_size
from hllm_torchrec.distributed.coordination import rank
from hllm_torchrec.distributed.preemption import raise_if_preempted
from hllm_torchrec.modules.encoders.int8 import quantized_copy
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts, ItemLLM

CATALOGUE_TOKENS = 16_384
"""Number of tokens per rank and call when the complete catalogue is encoded."""


COMPARED = 64
"""Number of items whose quantized and float32 embeddings are compared."""
LEAST_COSINE = 0.9
"""Minimum accepted cosine of an item's quantized and float32 embeddings; below it, nearest neighbors change."""


class ItemEncoder:
    """Callable that `LiveItems` uses to embed the unique items of the global batch, each on one rank only.

    The rank that encodes an item may differ from the rank whose batch has the item. So batches contain ids, not tokens,
    and the encoding rank looks up the tokens.

    Args:
        tokens: token store of all items.
        device: device of the Item LLM.
        share_prefix: encode the common prefix of most items once per call instead of once per item; only for causal
            Item LLMs.
        items_at_once: if above 0, items are encoded in checkpointed groups of about this size: the backward pass
            recomputes the activations of one group at a time.
        section: section of the configuration, for messages.
        quantizes: encode with a quantized copy of the (frozen) Item LLM.
    """

    def __init__(
        self,
        tokens: TokenStore,
        device: torch.device,
        share_prefix: bool = False,
        items_at_once: int = 0,
        section: str = "item_llm",
        *,
        quantizes: bool = False,
    ) -> None:
        self.tokens, self.device, self.items_at_once, self.section = tokens, device, items_at_once, section
        self.share_prefix = share_prefix and len(tokens.prefix) > 0
        self.quantizes = quantizes
        self._int8: tuple[list[tuple[int, int]], ItemLLM] | None = None
        self.work = EncodingCounts()
        """Counts of the items, tokens and keys encoded on this rank so far."""

    def __call__(self, item_llm: ItemLLM, unique_items: Tensor) -> Tensor:
        """Embeddings [U, E] of this rank's `unique_items` [U], with gradients. Collective."""
        return encode_unique_items(unique_items, self.costs, lambda ids: self._encode_in_groups(item_llm, ids))

    def _encode_in_groups(self, item_llm: ItemLLM, ids: Tensor) -> Tensor:
        """Like `encode`, in checkpointed groups if gradients are on; all ranks use the same number of groups."""
        groups = 1
        if self.items_at_once and torch.is_grad_enabled():
            # The maximum over ranks: under FSDP2 every forward of a group is collective, so counts must agree.
            groups = global_max(-(-ids.numel() // self.items_at_once), self.device)
        if groups <= 1:
            return self.encode(item_llm, ids)
        order = self.costs(ids).argsort(descending=True, stable=True)  # similar lengths in a group
        parts = ids[order].tensor_split(groups)
        self._count(ids, item_llm)  # not in the checkpointed function, which runs twice
        rows = [checkpoint(self._encode, item_llm, part, use_reentrant=False) for part in parts]
        return torch.cat(rows).index_select(0, order.argsort())  # back to the order of `ids`

    def costs(self, ids: Tensor) -> Tensor:
        """Cost of each item: its number of tokens without a shared prefix, plus 1 (for the [ITEM] vector)."""
        rows, offsets = ids.cpu().numpy(), self.tokens.offsets
        counts = offsets[rows + 1] - offsets[rows] + 1
        if self.share_prefix:
            counts = counts - self.tokens.begins_with_prefix[rows] * len(self.tokens.prefix)
        return torch.from_numpy(counts).to(ids.device)

    def encode(self, item_llm: ItemLLM, ids: Tensor) -> Tensor:
        """Embeddings [n, E] of `ids` [n], on this rank."""
        self._count(ids, item_llm)
        return self._encode(item_llm, ids)

    def _encode(self, item_llm: ItemLLM, ids: Tensor) -> Tensor:
        return self._read(self._quantized(item_llm) if self.quantizes else item_llm, ids)

    def _quantized(self, item_llm: ItemLLM) -> ItemLLM:
        """The quantized copy of the current weights; prints how much its embeddings differ when the copy is made."""
        # Loading a checkpoint writes into the weights, which raises their versions.
        state = [(weight.data_ptr(), weight._version) for weight in item_llm.parameters()]
        if self._int8 is None or self._int8[0] != state:
            self._int8 = state, quantized_copy(item_llm)
            self._say_difference(item_llm, self._int8[1])
        return self._int8[1]

    @torch.no_grad()
    def _say_difference(self, item_llm: ItemLLM, quantized: ItemLLM) -> None:
        """Print the cosines of quantized and float32 embeddings of up to `COMPARED` items.

        Raises:
            ArgumentError: a cosine is below `LEAST_COSINE`.
        """
        was_training = item_llm.training
        ids = torch.linspace(1, len(self.tokens) - 1, min(COMPARED, len(self.tokens) - 1)).long().unique()
        cosines = torch.cosine_similarity(self._read(item_llm.eval(), ids), self._read(quantized, ids))
        item_llm.train(was_training)
        mean, least = cosines.mean().item(), cosines.min().item()
        if rank() == 0:
            say(
                f"{self.section} in int8: cosine with float32 over {len(ids)} items: mean {mean:.5f}, least {least:.5f}"
            )
        if not least >= LEAST_COSINE:
            raise ArgumentError(
                f"{self.section}.quantization: int8: the least cosine with float32 is {least:.3f}, below "
                f"{LEAST_COSINE}: int8 changes the embeddings of this model too much; write quantization: none"
            )

    def _read(self, item_llm: ItemLLM, ids: Tensor) -> Tensor:
        rows = ids.cpu().numpy()
        with configured_by(self.section, length=f"{self.section}.max_text_length"):
            if not self.share_prefix:
                return item_llm(*map(self._tensor, self.tokens.gather(rows)))
            token_ids, cu_seqlens, has_prefix = self.tokens.gather_behind_prefix(rows)
            return item_llm(*map(self._tensor, (token_ids, cu_seqlens, self.tokens.prefix, has_prefix)))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _count(self, ids: Tensor, item_llm: ItemLLM) -> None:
        """Add the work of encoding `ids` [n] to `work`; recomputation is not counted."""
        rows = ids.cpu().numpy()
        prefix = len(self.tokens.prefix) if self.share_prefix else 0
        in_front = self.tokens.begins_with_prefix[rows] * prefix if prefix else np.zeros(len(rows), np.int64)
        lengths = self.tokens.offsets[rows + 1] - self.tokens.offsets[rows] - in_front  # without the shared prefix
        # [ITEM] adds a position; with other poolings an empty text still has one position.
        lengths = lengths + (1 if item_llm.pooling == "item" else lengths + in_front == 0)
        # Query-key pairs within the item's own text; if causal, position i sees i + 1 keys.
        own = lengths * (lengths + 1) // 2 if item_llm.causal else lengths**2
        keys, last_keys = (own + lengths * in_front).sum(), (lengths + in_front).sum()
        self.work += EncodingCounts(len(lengths), int(lengths.sum()), int(keys), int(last_keys))
        if len(rows) and prefix:  # without items, the prefix is not encoded either
            self.work += EncodingCounts(tokens=prefix, keys=prefix * (prefix + 1) // 2)

    @torch.no_grad()
    def encode_catalogue(self, item_llm: ItemLLM, embed: Callable[[Tensor], Tensor], show: bool) -> Tensor:
        """Embeddings [N, E] of all items (row 0: unknown item), without dropout; the ranks share the work. Collective.

        embed: function that calls this encoder through the model's `embed_items`, so that FSDP2 gathers the weights.
        """
        was_training = item_llm.training
        item_llm.eval()
        table = torch.zeros(len(self.tokens), item_llm.width, device=self.device)
        chunks = length_sorted_chunks(
            np.arange(len(self.tokens)), self.tokens.lengths + 1, CATALOGUE_TOKENS * world_size()
        )
        with progress(len(chunks), "encode items", show) as bar:
            for chunk in chunks:
                raise_if_preempted()
                ids = torch.from_numpy(np.sort(chunk)).to(self.device)
                table[ids] = embed(ids).float()
                bar.update(1)
        item_llm.train(was_training)
        return table


def length_sorted_chunks(ids: NDArray[np.int64], lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Sort `ids` [n] by length and cut them into chunks of about `tokens` tokens; lengths: by id, of all items."""
    order = ids[np.argsort(lengths[ids], kind="stable")]
    # The chunk of an item is the index of its last token // tokens; a chunk ends where this number changes.
    parts = np.cumsum(lengths[order]) // tokens
    return [chunk for chunk in np.split(order, np.flatnonzero(np.diff(parts)) + 1) if chunk.size]
