"""Measured peak of a machine in floating-point operations per second (FLOP/s), and the utilization of it."""

import statistics
import time
from collections.abc import Sequence

import torch


def measured_matmul_peak(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, int, int]] = ((1024, 1024, 1024), (2048, 1024, 512)),
    seconds: float = 0.5,
) -> float:
    """Return the machine's peak in FLOP/s: the highest of the median speeds of several matrix products.

    Processes that share the cores share the peak: measure on one rank while the others wait.

    Args:
        device: device to measure.
        dtype: dtype of both factors.
        shapes: (m, k, n) of the products [m, k] x [k, n] to try.
        seconds: total measuring time for all shapes, after a warm-up of each.
    """
    share = seconds / len(shapes)
    return max(_matmul_speed(torch.device(device), dtype, *shape, share) for shape in shapes)


def _matmul_speed(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, seconds: float) -> float:
    """Return the median speed of [m, k] x [k, n] over `seconds` (at least 3 repeats), in FLOP/s."""
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
    """Wait for the device's queued work; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_utilization(flops: float, seconds: float, peak: float) -> float:
    """Return flops / (seconds x peak), the utilization as a fraction (above 1 if the measured peak is too low).

    Args:
        flops: model operations, such as 3 x tokens x `transformer_flops_per_token` for a training step.
        seconds: duration.
        peak: FLOP/s, as from `measured_matmul_peak`; summed over all devices that shared the work.

    Raises:
        ValueError: `seconds` or `peak` is not positive.
    """
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"seconds ({seconds}) and peak ({peak}) must be positive: measure them first")
    return flops / (seconds * peak)
