"""`CreativeBatch`: the personalized texts of a batch's requests, an optional part of a `HybridBatch`.

Legend: N creatives (rows of a table of texts), K negatives of a step, Y_n tokens and w_n weight of response n.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torchrec.streamable import Pipelineable

from hllm_torchrec.modules.creative.creative_llm import PackedTexts


@dataclass
class CreativeBatch(Pipelineable):
    """Creatives [N] in the order of the batch's requests."""

    rows: Tensor
    """[N] int64 rows of the table's part."""
    user_ids: Tensor
    """[N] int64 users."""
    weights: Tensor
    """[N] float32."""
    texts: PackedTexts
    """Prompts and responses."""
    may_match: Tensor
    """[N, K] bool: False where the negative is an item of the user's sequence or of the user's creatives."""
    profiles: PackedTexts | None = None
    """Profile prompts with the profiles as responses; None: no loss reads profiles, or not the training part."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "CreativeBatch":
        """A copy on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CreativeBatch":
        """A copy in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors (`Tensor.record_stream`)."""

        def record(x: Tensor) -> Tensor:
            x.record_stream(stream)
            return x

        self._map(record)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "CreativeBatch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: x.map(function) if isinstance(x, PackedTexts) else x if x is None else function(x)
            for name, x in values.items()
        }
        return CreativeBatch(**mapped)

    @property
    def token_weight(self) -> float:
        """sum_n w_n Y_n: the denominator of L_write."""
        return float((self.weights.double() * self.texts.response_tokens).sum())

    @property
    def profile_weight(self) -> float:
        """Denominator of L_recon: like `token_weight`, but with the tokens of the profiles; 0 without profiles."""
        return 0.0 if self.profiles is None else float((self.weights.double() * self.profiles.response_tokens).sum())

    @property
    def pairs(self) -> float:
        """Number of pairs of L_match: one for each creative's own item, and one for each True in `may_match`."""
        return float(self.weights.numel() + self.may_match.sum())
