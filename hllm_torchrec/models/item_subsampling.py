"""Item sub-sampling: gradients flow through a share of a step's items; the others come from a cache of older vectors.

The Item LLM accounts for most of a step's cost, mostly in its backward pass. An item's embedding changes little from
one step to the next, so it is not recomputed each time the item occurs.
"""

import torch
from torch import Tensor

from hllm_torchrec.distributed.collectives import any_rank
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM

NEVER = -(2**62)


class SubsampledEncoder:
    """Replacement of `ItemEncoder` in `LiveItems`; without gradients it encodes every item, like `ItemEncoder`.

    In each forward pass with gradients (a micro-batch; `step` counts them in this process, from 0 also after a resume)
    an item is encoded with gradients with probability `share`, drawn from (seed, step, item) and so the same on every
    rank. Any other item comes from this rank's cache if its entry is at most `refresh_after` such passes old; otherwise
    it is encoded without gradients. Every encoded item updates its cache entry. With refresh_after 0 the forward pass
    equals that without sub-sampling. The cache (N x E floats) is not saved: a resumed run starts with an empty one.

    Args:
        encoder: encodes items over all ranks.
        share: probability, in (0, 1].
        refresh_after: maximum age of a cached embedding, in forward passes with gradients.
    """

    def __init__(self, encoder: ItemEncoder, share: float, refresh_after: int, seed: int) -> None:
        self.encoder, self.share, self.refresh_after, self.seed = encoder, share, refresh_after, seed
        self.step = 0
        self.cache: Tensor | None = None
        self.made_at = torch.full((len(encoder.tokens),), NEVER, device=encoder.device)

    def __call__(self, item_llm: ItemLLM, unique_items: Tensor) -> Tensor:
        """Embeddings [U, E] of this rank's `unique_items` [U]. Collective."""
        if not torch.is_grad_enabled():
            return self.encoder(item_llm, unique_items)
        self.step += 1
        live = self.draw()[unique_items]
        trained = self.encoder(item_llm, unique_items[live])
        self._store(unique_items[live], trained.detach().float())
        self._refresh(item_llm, unique_items[~live])
        assert self.cache is not None
        # The cache also has the values of the trained items; index_put replaces them by the rows with gradients.
        rows = self.cache[unique_items].to(trained.dtype)
        return rows.index_put((torch.nonzero(live).flatten(),), trained)

    def draw(self) -> Tensor:
        """Draw the items that get gradients in the current step: [N] bool, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        return (torch.rand(self.made_at.numel(), generator=generator) < self.share).to(self.made_at.device)

    def _refresh(self, item_llm: ItemLLM, items: Tensor) -> None:
        """Encode the `items` whose cache entry is too old or missing. Collective."""
        stale = items[self.step - self.made_at[items] > self.refresh_after]
        # Encoding is collective: a rank without stale items takes part if any rank has some.
        if not any_rank(stale.numel() > 0, self.made_at.device):
            return
        with torch.no_grad():
            self._store(stale, self.encoder(item_llm, stale).float())

    def _store(self, items: Tensor, embeddings: Tensor) -> None:
        if self.cache is None:
            self.cache = embeddings.new_zeros(self.made_at.numel(), embeddings.shape[1])
        self.cache[items] = embeddings
        self.made_at[items] = self.step
