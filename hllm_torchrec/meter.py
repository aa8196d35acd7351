"""What a step cost and what training moved: the numbers behind the log's throughput and weight lines."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.items import ItemEncoder
from hllm_torchrec.model import HLLM


class StepMeter:
    """Seconds and rates of each step on this rank."""

    def __init__(self, encoder: ItemEncoder | None) -> None:
        self.encoder = encoder
        self._time, self._tokens = time.perf_counter(), self._count()

    def _count(self) -> int:
        return self.encoder.encoded_tokens if self.encoder is not None else 0

    def tick(self, batch: HybridBatch, world: int) -> dict[str, float]:
        """Since the last tick: seconds, exposures a second (all ranks, taking this one as typical), item tokens."""
        now, tokens = time.perf_counter(), self._count()
        seconds, encoded = now - self._time, tokens - self._tokens
        self._time, self._tokens = now, tokens
        return {
            "seconds": seconds,
            "samples_per_second": world * batch.num_exposures / seconds,
            "item_tokens_per_second": world * encoded / seconds,
        }


@dataclass(frozen=True)
class WeightSnapshot:
    """Copies of one matrix of each part: enough to show that a part was trained, or was left alone."""

    matrices: dict[str, Tensor]

    def moved_since(self, earlier: "WeightSnapshot") -> dict[str, float]:
        """Relative change ||now - then|| / ||then|| by part (0 is bit for bit the same)."""
        return {
            part: float(torch.linalg.vector_norm(now - earlier.matrices[part]) / torch.linalg.vector_norm(earlier.matrices[part]))
            for part, now in self.matrices.items()
        }


@torch.no_grad()
def weights_of(model: HLLM) -> WeightSnapshot:
    """The first layer's first matrix of the Item LLM and of the user encoder (this rank's shard under FSDP)."""
    parts: dict[str, torch.nn.Module | None] = {"item_llm": model.item_llm, "user": model.user}
    matrices = {}
    for part, module in parts.items():
        if module is None:
            continue
        layers = [(n, p) for n, p in module.named_parameters() if p.ndim == 2 and ("layers." in n or "layer." in n)]
        matrices[part] = getattr(layers[0][1], "_local_tensor", layers[0][1]).detach().float().clone()
    return WeightSnapshot(matrices)
