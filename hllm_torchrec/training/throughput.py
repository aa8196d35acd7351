"""Throughput, model FLOPs utilization and weight changes of training, for the log."""

import functools
import re
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.models.flops import flops_utilization, measured_matmul_peak
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.lora import has_adapters

PEAK_SHAPES = {
    "cpu": ((512, 512, 512), (1024, 512, 512)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096)),
}
"""Device -> shapes of the matrix products with which the peak is measured. They are just large enough for the full
speed of a core or a GPU: larger ones would take long on CPUs that emulate bfloat16."""


class StepMeter:
    """Measures seconds, rates and model FLOPs utilization (MFU) of each step, over all ranks.

    With Stochastic Length it also measures `history_kept`, the share of history tokens that were read. Model FLOPs are
    those of the matrix products of the LLMs and the user encoder for real tokens (padding and recomputation do not
    count): 3 times the forward pass for trained weights.

    Args:
        model: the model whose LLMs and user encoder are counted.
        text_encoders: name in `named_backbones` -> item encoder, which counts the tokens of this LLM.
        peak_flops: FLOP/s of all ranks together, from `global_matmul_peak`.
    """

    def __init__(self, model: HLLM, text_encoders: Mapping[str, ItemEncoder], peak_flops: float) -> None:
        self.model, self.text_encoders, self.peak_flops = model, text_encoders, peak_flops
        self.restart()

    def restart(self) -> None:
        """Start measuring now; time and work since the last tick (evaluation, checkpoints) are ignored."""
        self._time = time.perf_counter()
        self._encoded = {name: encoder.work for name, encoder in self.text_encoders.items()}

    def tick(self, batches: Sequence[HybridBatch]) -> dict[str, float]:
        """Rates since the last tick or restart; batches: those on which this rank trained meanwhile. Collective."""
        seconds = time.perf_counter() - self._time
        encoded = {name: encoder.work - self._encoded[name] for name, encoder in self.text_encoders.items()}
        work = [user_token_counts(batch, queries=self.model.fusion.has_queries) for batch in batches]
        user_tokens, user_keys = map(sum, zip(*work, strict=True))
        flops = 0.0
        for part in self.model.named_backbones():
            # An item is counted by the rank that encodes it, which need not be the rank whose batch has the item.
            module = part.module
            if isinstance(module, ItemLLM):
                of_part = module.flops(encoded[part.name])
            elif isinstance(module, CreativeLLM):
                of_part = module.flops(*creative_token_counts(batches))
            else:
                of_part = module.flops(user_tokens, user_keys)
            flops += of_part * forward_passes(module)
        item_tokens = sum(work.tokens for work in encoded.values())
        creatives = sum(batch.creative.rows.numel() for batch in batches if batch.creative is not None)
        exposures = creatives + sum(batch.num_exposures for batch in batches)
        read = sum(batch.item_ids.numel() for batch in batches)
        full = sum(batch.full_history[0].numel() for batch in batches)
        local = torch.tensor([exposures, item_tokens, user_tokens, flops, read, full], dtype=torch.float64)
        exposures_all, items_all, users_all, flops_all, read_all, full_all = global_sum(local).tolist()
        self.restart()
        shortens = any(batch.full_history_items is not None for batch in batches)
        return ({"history_kept": read_all / max(full_all, 1.0)} if shortens else {}) | {
            "seconds": seconds,
            "samples_per_second": exposures_all / seconds,
            "item_tokens_per_second": items_all / seconds,
            "user_tokens_per_second": users_all / seconds,
            "mfu": flops_utilization(flops_all, seconds, self.peak_flops),
        }


def user_token_counts(batch: HybridBatch, queries: bool) -> tuple[int, int]:
    """(number of tokens, total number of keys that they attend to) of the user encoder's forward pass over a batch.

    queries: True if the user encoder also reads query tokens.
    """
    lengths = batch.seq_offsets.diff()
    # Causal: position i of a history sees i + 1 keys. A query sees its visible positions and itself.
    tokens, keys = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    if not queries:
        return tokens, keys
    return tokens + batch.query_times.numel(), keys + int((batch.query_visible + 1).sum())


def creative_token_counts(batches: Sequence[HybridBatch]) -> tuple[int, int]:
    """(number of tokens, total number of keys that they attend to) of the Creative LLM, without soft tokens."""
    tokens = keys = 0
    for batch in batches:
        if batch.creative is None or not batch.creative.rows.numel():
            continue
        # Profiles are counted once, also if two losses read them.
        for texts in filter(None, (batch.creative.texts, batch.creative.profiles)):
            prefix, lengths = texts.prefix_ids.numel(), texts.cu_seqlens.diff()
            tokens += prefix + int(lengths.sum())
            keys += prefix * (prefix + 1) // 2 + int((lengths * prefix + lengths * (lengths + 1) // 2).sum())
    return tokens, keys


def forward_passes(module: ItemLLM | UserEncoder | CreativeLLM) -> int:
    """Cost of a module in a training step, in units of its forward pass.

    A trained module: 3 (forward, gradients of inputs, gradients of weights). A frozen module: 1 if it reads text,
    because its inputs need no gradients; otherwise 2, because gradients of its inputs are computed. A module with
    adapters (LoRA): 2, because gradients of the base weights are not computed.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return 1 if module.reads_text else 2
    return 2 if has_adapters(module) else 3


def global_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Sum of the FLOP/s of all ranks, which measure at the same time because they may share cores. Collective."""
    global_sum(torch.zeros(1))  # a barrier: all ranks start measuring together
    return float(global_sum(torch.tensor([_local_peak(device, dtype)], dtype=torch.float64)))


@functools.cache
def _local_peak(device: torch.device, dtype: torch.dtype) -> float:
    return measured_matmul_peak(device, dtype, PEAK_SHAPES[device.type], seconds=0.2)


SAMPLED_ITEMS = 256
"""Number of items whose embeddings are compared before and after training."""


@dataclass(frozen=True)
class WeightSnapshot:
    """Copies of one matrix of each part of the model; two snapshots show whether a part was trained in between."""

    matrices: dict[str, Tensor]

    def relative_change_since(self, earlier: "WeightSnapshot") -> dict[str, float]:
        """Part -> relative change ||now - earlier|| / ||earlier|| (0: bitwise identical)."""
        norm = torch.linalg.vector_norm
        return {
            part: float(norm(now - earlier.matrices[part]) / norm(earlier.matrices[part]))
            for part, now in self.matrices.items()
        }


@torch.no_grad()
def snapshot_weights(model: HLLM, item_encoder: ItemEncoder | None = None) -> WeightSnapshot:
    """Copy the first trained matrix in the layers of each part of `named_backbones` (of a frozen part: the first
    matrix); of a sharded matrix, this rank's shard.

    With `item_encoder`, also compute the embeddings of the first SAMPLED_ITEMS items, as "item_embeddings"; the call is
    then collective.
    """
    matrices = {}
    for part in model.named_backbones():
        every = [(n, p) for n, p in part.module.named_parameters() if p.ndim == 2]
        # GPT-2, BLOOM, XLM and others number their layers under another name.
        layers = [p for n, p in every if "layers." in n or "layer." in n]
        layers = layers or [p for n, p in every if re.search(r"\b\d+\.", n)] or [p for _, p in every]
        shown = next((p for p in layers if p.requires_grad), layers[0])
        matrices[part.name] = getattr(shown, "_local_tensor", shown).detach().float().clone()
    if item_encoder is not None and model.item_llm is not None:
        sample = torch.arange(1, min(SAMPLED_ITEMS + 1, len(item_encoder.tokens)), device=item_encoder.device)
        was_training = model.item_llm.training
        model.item_llm.eval()
        matrices["item_embeddings"] = model.embed_items(sample, LiveItems(model.item_llm, item_encoder)).float()
        model.item_llm.train(was_training)
    return WeightSnapshot(matrices)


def untrained_tasks(config: Config, tasks: Sequence[str], labelled: Set[int]) -> list[str]:
    """Warnings about tasks without a label of weight above 0 in any step. labelled: indices of the other tasks."""
    objective = config.objective
    if not objective.has_head or not objective.classification_weight or config.creative.enabled:
        return []
    return [
        f"caution: {name}: no exposure of these steps had this label and a weight above 0: the task was not trained"
        for number, name in enumerate(tasks)
        if number not in labelled
    ]


def summary_line(steps: int, live: int, moved: dict[str, float]) -> str:
    """Summary line of a training run: number of steps, number of steps in which the Item LLM was trained (`live`), and
    relative changes of the weights (`moved`)."""
    shown = ", ".join(f"{part} {change:.2%}" for part, change in moved.items())
    share = live / max(steps, 1)
    return f"trained {steps} steps, {live} of them ({share:.0%}) end to end through the Item LLM; moved: {shown}"
