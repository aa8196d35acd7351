"""What a step cost and what training moved: the numbers behind the log's throughput and weight lines."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.models.flops import flops_utilization, measured_matmul_peak
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.lora import has_adapters

PEAK_SHAPES = {
    "cpu": ((512, 512, 512), (1024, 512, 512)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096)),
}
"""Products large enough for the full speed of a core, or of a GPU, and no larger: some CPUs emulate bfloat16."""


class StepMeter:
    """Seconds, rates and model FLOPs utilisation of each step, over all ranks; with Stochastic Length also
    `history_kept`, the share of history tokens that were read.

    Model FLOPs are the matrix products of the two transformers for the tokens there really are (padding and
    recomputation do not count), 3 times the forward pass where weights are trained.

    Args:
        model: whose transformers are counted.
        text_encoders: count the tokens of those that read text, by their names in `named_backbones`.
        peak_flops: operations per second of all ranks together, from `global_matmul_peak`.
    """

    def __init__(self, model: HLLM, text_encoders: Mapping[str, ItemEncoder], peak_flops: float) -> None:
        self.model, self.text_encoders, self.peak_flops = model, text_encoders, peak_flops
        self.restart()

    def restart(self) -> None:
        """Leave out what has happened since the last tick."""
        self._time = time.perf_counter()
        self._encoded = {name: encoder.work for name, encoder in self.text_encoders.items()}

    def tick(self, batches: Sequence[HybridBatch]) -> dict[str, float]:
        """Rates since the last tick, in which every rank trained on its `batches`. Collective."""
        seconds = time.perf_counter() - self._time
        encoded = {name: encoder.work - self._encoded[name] for name, encoder in self.text_encoders.items()}
        work = [user_token_counts(batch, queries=self.model.fusion.has_queries) for batch in batches]
        user_tokens, user_keys = map(sum, zip(*work, strict=True))
        flops = 0.0
        for part in self.model.named_backbones():
            module = part.module
            of_part = (
                module.flops(encoded[part.name])
                if isinstance(module, ItemLLM)
                else module.flops(user_tokens, user_keys)
            )
            flops += of_part * forward_passes(module)
        item_tokens = sum(work.tokens for work in encoded.values())
        exposures = sum(batch.num_exposures for batch in batches)
        read = sum(batch.item_ids.numel() for batch in batches)
        whole = sum(batch.full_history[0].numel() for batch in batches)
        local = torch.tensor([exposures, item_tokens, user_tokens, flops, read, whole], dtype=torch.float64)
        exposures_all, items_all, users_all, flops_all, read_all, whole_all = global_sum(local).tolist()
        self.restart()
        shortens = any(batch.full_history_items is not None for batch in batches)
        return ({"history_kept": read_all / max(whole_all, 1.0)} if shortens else {}) | {
            "seconds": seconds,
            "samples_per_second": exposures_all / seconds,
            "item_tokens_per_second": items_all / seconds,
            "user_tokens_per_second": users_all / seconds,
            "mfu": flops_utilization(flops_all, seconds, self.peak_flops),
        }


def user_token_counts(batch: HybridBatch, queries: bool) -> tuple[int, int]:
    """(tokens, keys that they attend to, all together) of the user encoder's forward pass over a batch.

    queries: whether it reads the query tokens, too.
    """
    lengths = batch.seq_offsets.diff()
    tokens, keys = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    if not queries:
        return tokens, keys
    return tokens + batch.query_times.numel(), keys + int((batch.query_visible + 1).sum())


def forward_passes(module: ItemLLM | UserEncoder) -> int:
    """Cost of a training step's rows in an LLM, in forward passes.

    Frozen: 1 where it reads text, before which nothing learns; otherwise gradients are handed on to its inputs, in one
    more. Adapters (LoRA) need no more than that: no products give the weights' gradients.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return 1 if module.reads_text else 2
    return 2 if has_adapters(module) else 3


def global_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of all ranks together, who measure at once: they may share cores. Collective."""
    global_sum(torch.zeros(1))  # they begin together
    return float(global_sum(torch.tensor([_local_peak(device, dtype)], dtype=torch.float64)))


@functools.cache
def _local_peak(device: torch.device, dtype: torch.dtype) -> float:
    return measured_matmul_peak(device, dtype, PEAK_SHAPES[device.type], seconds=0.2)


SAMPLED_ITEMS = 256
"""How many items' embeddings are looked at before and after."""


@dataclass(frozen=True)
class WeightSnapshot:
    """Copies of one matrix of each part: enough to show that a part was trained, or was left alone."""

    matrices: dict[str, Tensor]

    def relative_change_since(self, earlier: "WeightSnapshot") -> dict[str, float]:
        """Relative change ||now - then|| / ||then|| by part (0 is bit for bit the same)."""
        norm = torch.linalg.vector_norm
        return {
            part: float(norm(now - earlier.matrices[part]) / norm(earlier.matrices[part]))
            for part, now in self.matrices.items()
        }


@torch.no_grad()
def snapshot_weights(model: HLLM, item_encoder: ItemEncoder | None = None) -> WeightSnapshot:
    """The first layer's first matrix of each part of `named_backbones` (this rank's part of it).

    With an encoder also the embeddings of the first SAMPLED_ITEMS items, as "item_embeddings"; then collective.
    """
    matrices = {}
    for part in model.named_backbones():
        layers = [p for n, p in part.module.named_parameters() if p.ndim == 2 and ("layers." in n or "layer." in n)]
        shown = next((p for p in layers if p.requires_grad), layers[0])
        matrices[part.name] = getattr(shown, "_local_tensor", shown).detach().float().clone()
    if item_encoder is not None and model.item_llm is not None:
        sample = torch.arange(1, min(SAMPLED_ITEMS + 1, len(item_encoder.tokens)), device=item_encoder.device)
        was_training = model.item_llm.training
        model.item_llm.eval()
        matrices["item_embeddings"] = model.embed_items(sample, LiveItems(model.item_llm, item_encoder)).float()
        model.item_llm.train(was_training)
    return WeightSnapshot(matrices)
