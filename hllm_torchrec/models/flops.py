"""What a transformer costs in floating-point operations, and the share of a machine's peak in use."""

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def transformer_flops_per_token(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: float,
    *,
    head_dim: int | None = None,
    gated: bool = True,
) -> float:
    """Return the operations of one token's forward pass: the matrix products, at 2 per multiply and add.

    Norms, activations, softmax, rotary embeddings, the word embeddings and a vocabulary head are not counted.
    Training costs 3 times as much (the backward pass has two products for each forward one), or 4 times with
    activation checkpointing, though model FLOPs utilisation counts 3 in either case.

    Args:
        hidden: width D of the residual stream.
        intermediate: width of the feed-forward part.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads (fewer than `heads` with grouped queries).
        context: keys a token attends to, on average: (n + 1) / 2 for causal attention over n tokens, n
            without a causal mask or where a kernel computes the masked half as well.
        head_dim: width of a head; none given: `hidden / heads`.
        gated: three feed-forward matrices (Llama's SwiGLU) instead of two (BERT).
    """
    head_dim = head_dim or hidden // heads
    projections = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    attention = 2 * context * heads * head_dim  # scores, then the weighted sum of values
    feed_forward = (3 if gated else 2) * hidden * intermediate
    return 2.0 * layers * (projections + attention + feed_forward)


def measured_matmul_peak(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, int, int]] = ((1024, 1024, 1024), (2048, 1024, 512)),
    seconds: float = 0.5,
) -> float:
    """Return the machine's peak in operations per second: the best of several matrix products' median speeds.

    Processes that share the cores share the peak: measure on one rank while the others wait.

    Args:
        device: where to measure.
        dtype: of both factors.
        shapes: (m, k, n) of products [m, k] x [k, n] to try.
        seconds: to spend on all of them together, after a warm-up of each.
    """
    share = seconds / len(shapes)
    return max(_matmul_speed(torch.device(device), dtype, *shape, share) for shape in shapes)


def _matmul_speed(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, seconds: float) -> float:
    """Return the median speed of [m, k] x [k, n] over `seconds` (3 repeats at least), operations/s."""
    left, right = torch.rand(m, k, device=device).to(dtype), torch.rand(k, n, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    for _ in range(2):
        torch.mm(left, right, out=out)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2.0 * m * k * n / statistics.median(times)


def _synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; the CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_utilization(flops: float, seconds: float, peak: float) -> float:
    """Return the share of the peak, in [0, 1], at which `flops` operations were done in `seconds`.

    Args:
        flops: model operations, such as 3 x tokens x `transformer_flops_per_token` for a training step.
        seconds: what they took.
        peak: operations per second, as from `measured_matmul_peak`; of all devices that shared the work.

    Raises:
        ValueError: `seconds` or `peak` is not positive.
    """
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"seconds ({seconds}) and peak ({peak}) must be positive: measure them first")
    return flops / (seconds * peak)


def backbone_flops(backbone: "PreTrainedModel", tokens: int, keys: int) -> float:
    """Operations of a forward pass over `tokens` that attend to `keys` keys all together."""
    if tokens == 0:
        return 0.0
    config = backbone.config
    per_token = transformer_flops_per_token(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        keys / tokens,
        head_dim=getattr(config, "head_dim", None),
        gated=any("gate" in name for name, _ in backbone.named_modules()),
    )
    return tokens * per_token
