"""What a step cost and what training moved: the numbers behind the log's throughput and weight lines."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.models.flops import flops_utilization, measured_matmul_peak
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import EncodingCounts, ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.lora import has_adapters

if TYPE_CHECKING:
    pass
from hllm_torchrec.models.flops import backbone_flops

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
        model: whose two transformers are counted.
        item_encoder: counts the item tokens; None in an ID-only model.
        peak_flops: operations per second of all ranks together, from `global_matmul_peak`.
    """

    def __init__(self, model: HLLM, item_encoder: ItemEncoder | None, peak_flops: float) -> None:
        self.model, self.item_encoder, self.peak_flops = model, item_encoder, peak_flops
        self.restart()

    def restart(self) -> None:
        """Leave out what has happened since the last tick."""
        self._time, self._item_work = time.perf_counter(), self._encoded()

    def _encoded(self) -> EncodingCounts:
        return EncodingCounts() if self.item_encoder is None else self.item_encoder.work

    def tick(self, batches: Sequence[HybridBatch]) -> dict[str, float]:
        """Rates since the last tick, in which every rank trained on its `batches`. Collective."""
        seconds = time.perf_counter() - self._time
        encoded = self._encoded() - self._item_work
        flops = 0.0
        if self.model.item_llm is not None:
            flops += item_flops(self.model.item_llm, encoded) * item_passes(self.model)
        work = [user_token_counts(batch, queries=self.model.fusion != "none") for batch in batches]
        user_tokens, user_keys = map(sum, zip(*work, strict=True))
        user = self.model.user
        if isinstance(user, UserEncoder):
            flops += user.flops(user_tokens, user_keys) * user_passes(self.model)
        else:
            flops += backbone_flops(user.backbone, user_tokens, user_keys) * user_passes(self.model)
        exposures = sum(batch.num_exposures for batch in batches)
        read = sum(batch.item_ids.numel() for batch in batches)
        whole = sum(batch.full_history[0].numel() for batch in batches)
        local = torch.tensor([exposures, encoded.tokens, user_tokens, flops, read, whole], dtype=torch.float64)
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


def item_flops(item_llm: ItemLLM, work: EncodingCounts) -> float:
    """Operations of the Item LLM's forward pass; of its last layer only what is read, where it runs so."""
    backbone, tokens = item_llm.backbone, work.tokens
    whole, config = backbone_flops(backbone, tokens, work.keys), backbone.config
    if not item_llm.reads_rows or tokens == 0:
        return whole
    layers = config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys_and_values = 2.0 * 2 * config.hidden_size * head * config.num_key_value_heads
    last_layer = backbone_flops(backbone, work.items, work.last_keys) / layers + keys_and_values * (tokens - work.items)
    return whole * (layers - 1) / layers + last_layer


def item_passes(model: HLLM) -> int:
    """What the Item LLM's tokens cost, in forward passes; frozen 1, since nothing before it learns."""
    return _passes(model.item_llm, frozen=1) if model.item_llm is not None else 1


def user_passes(model: HLLM) -> int:
    """The same of the user encoder: frozen, it still hands gradients on to its inputs, in one more pass."""
    return _passes(model.user, frozen=2)


def _passes(module: nn.Module, frozen: int) -> int:
    """Adapters (LoRA) need gradients handed on to them, but none of the products that give the weights' gradients."""
    if not _is_trained(module):
        return frozen
    return 2 if has_adapters(module) else 3


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


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
    """The first layer's first matrix of the Item LLM and of the user encoder (this rank's part of it).

    With an encoder also the embeddings of the first SAMPLED_ITEMS items, as "item_embeddings"; then collective.
    """
    parts: dict[str, nn.Module | None] = {"item_llm": model.item_llm, "user": model.user}
    matrices = {}
    for part, module in parts.items():
        if module is None:
            continue
        layers = [p for n, p in module.named_parameters() if p.ndim == 2 and ("layers." in n or "layer." in n)]
        shown = next((p for p in layers if p.requires_grad), layers[0])
        matrices[part] = getattr(shown, "_local_tensor", shown).detach().float().clone()
    if item_encoder is not None and model.item_llm is not None:
        sample = torch.arange(1, min(SAMPLED_ITEMS + 1, len(item_encoder.tokens)), device=item_encoder.device)
        was_training = model.item_llm.training
        model.item_llm.eval()
        matrices["item_embeddings"] = model.embed_items(sample, LiveItems(model.item_llm, item_encoder)).float()
        model.item_llm.train(was_training)
    return WeightSnapshot(matrices)
