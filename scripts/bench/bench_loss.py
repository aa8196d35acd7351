"""Chunked InfoNCE against a plain implementation: peak memory above the inputs, and speed.

    python scripts/bench/bench_loss.py [--quick] [--out FILE]

The plain version computes all logits at once, and autograd saves what its backward pass needs. Both sides mask by id
and run forward and backward in fp32. Memory is the peak of the resident set above the inputs; each side is measured in
a new process with the default allocator settings, under which freed buffers are returned to the system. `loss_memory`
and `loss_speed` are plain / ours.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarking import (
    ROOT,
    alternate,
    arguments,
    keep_large_buffers,
    matmul_peak,
    medians,
    ratio,
    report,
    reset_high_water_mark,
    resident,
    say,
    timed,
)
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.common.machine import LARGE_BUFFERS_KEPT
from hllm_torchrec.modules.losses.objectives import Exclusion, info_nce

Shape = tuple[int, int, int]
"""(T predictions, K negatives, D width)"""

PAPER: Shape = (2560, 28672, 576)
SHAPES: dict[str, Shape] = {"": PAPER, "_k4096": (2560, 4096, 576), "_k408": (400, 408, 256)}
HISTORY = 50
TINY: dict[str, Shape] = {"": (60, 200, 16), "_k408": (40, 50, 8)}


def example(shape: Shape) -> dict[str, Any]:
    """Inputs of `info_nce`, made without temporary copies: histories of 50 items, ids drawn from 10 * K items."""
    rows, negatives, width = shape
    generator = torch.Generator().manual_seed(0)

    def vectors(n: int) -> Tensor:
        return torch.empty(n, width).normal_(generator=generator).requires_grad_()

    ids = torch.randint(1, 10 * negatives, (rows,), generator=generator)
    sequence = torch.arange(rows) // HISTORY
    offsets = torch.cat([torch.arange(0, rows, HISTORY), torch.tensor([rows])])
    return {
        "predictions": vectors(rows),
        "positives": vectors(rows),
        "negatives": vectors(negatives),
        "scale": torch.full((1,), 20.0, requires_grad=True),
        "target_ids": ids,
        "negative_ids": torch.randint(1, 10 * negatives, (negatives,), generator=generator),
        "exclude": Exclusion(ids, offsets, sequence),
    }


def plain(
    predictions: Tensor,
    positives: Tensor,
    negatives: Tensor,
    scale: Tensor,
    target_ids: Tensor,
    negative_ids: Tensor,
    exclude: Exclusion,
) -> Tensor:
    """HLLM's Eq. (1), InfoNCE (see `modules/losses/objectives.py`), in plain torch with all logits at once.

    Returns the sum of the losses, 0-d.
    """
    query = F.normalize(predictions, dim=-1) * scale
    positive_logits = (query * F.normalize(positives, dim=-1)).sum(dim=-1)
    sequences = exclude.ids.split(exclude.offsets.diff().tolist())
    in_sequence = torch.stack([torch.isin(negative_ids, ids) for ids in sequences])
    masked = in_sequence[exclude.row_to_sequence] | (target_ids[:, None] == negative_ids)
    logits = (query @ F.normalize(negatives, dim=-1).T).masked_fill(masked, -torch.inf)
    return -F.logsigmoid(positive_logits - logits.logsumexp(dim=1)).sum()


def ours(**inputs: Any) -> Tensor:
    """Sum of the losses, computed by `info_nce`: 0-d."""
    return info_nce(**inputs).loss_sum


SIDES: dict[str, Callable[..., Tensor]] = {"plain": plain, "ours": ours}


def forward_and_backward(side: str, inputs: dict[str, Any]) -> Tensor:
    """Run forward and backward of the mean loss, as in training; return the loss, detached.

    The gradients are left in the `.grad` of the inputs.
    """
    for name in ("predictions", "positives", "negatives", "scale"):
        inputs[name].grad = None
    loss = SIDES[side](**inputs) / inputs["target_ids"].numel()
    loss.backward()
    return loss.detach()


def check_equal(inputs: dict[str, Any]) -> None:
    """Check that both sides compute the same loss and gradients."""
    found = []
    for side in SIDES:
        loss = forward_and_backward(side, inputs)
        found.append([loss, *(inputs[n].grad for n in ("predictions", "positives", "negatives"))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def peak_bytes(side: str, shape: Shape) -> int:
    """Peak resident bytes of forward and backward above the inputs, measured in a fresh process."""
    return measured_apart(__file__, "--measure", side, "--shape", *map(str, shape))


def measured_apart(*command: str) -> int:
    """The number that a script prints in a fresh process, with the allocator's default settings."""
    environment = {name: value for name, value in os.environ.items() if name not in LARGE_BUFFERS_KEPT}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(side: str, shape: Shape) -> int:
    """Peak resident bytes above the inputs in this process, which `peak_bytes` has started."""
    # A tiny step first, in which libraries allocate their working memory.
    forward_and_backward(side, example((64, 64, 64)))
    inputs = example(shape)
    reset_high_water_mark()
    before = resident("VmRSS")
    forward_and_backward(side, inputs)
    return resident("VmHWM") - before


def memory(shape: Shape) -> dict[str, Any]:
    """Peak bytes above the inputs by side, and the ratio of our total to the minimum.

    Our total is the inputs and the peak above them; the minimum is the inputs and their gradients, which every
    implementation needs.
    """
    rows, negatives, width = shape
    inputs = 4 * width * (2 * rows + negatives)
    peaks = {side: peak_bytes(side, shape) for side in SIDES}
    return {
        "inputs_bytes": inputs,
        "peak_above_inputs_bytes": peaks,
        "ours_with_inputs_by_inputs_and_gradients": (inputs + peaks["ours"]) / (2 * inputs),
    }


def speed(shape: Shape, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of forward and backward by side and round."""
    inputs = example(shape)
    check_equal(inputs)
    sides = {side: timed(partial(forward_and_backward, side, inputs)) for side in SIDES}
    return alternate(sides, repeats, warmup=0, seconds=seconds)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Run the bench."""
    parser = arguments(__doc__)
    parser.add_argument("--measure", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(measure(options.measure, tuple(options.shape)))
        return None
    shapes = TINY if options.tiny else SHAPES
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    say(f"matrix products: {peak / 1e9:.0f} GFLOP/s")
    repeats = 1 if options.tiny else 3 if options.quick else 7
    found: dict[str, Any] = {"memory": memory(shapes[""])}
    peaks = found["memory"]["peak_above_inputs_bytes"]
    ratios = {"loss_memory": peaks["plain"] / peaks["ours"]}
    say(f"peak above inputs: {peaks}")
    seconds, share = {}, {}
    for name, (rows, negatives, width) in shapes.items():
        times = speed((rows, negatives, width), repeats, 0.0 if options.tiny else 2.0)
        seconds[f"loss{name}"] = took = medians(times)
        ratios[f"loss_speed{name}"] = ratio(times["plain"], times["ours"])
        share[f"loss{name}"] = {side: 6 * rows * negatives * width / took[side] / peak for side in took}
        say(f"T={rows} K={negatives} D={width}: {took}")
    named = {f"loss{name}": dict(zip(("T", "K", "D"), shape)) for name, shape in shapes.items()}
    found |= {"ratios": ratios, "shapes": named, "seconds": seconds, "matmul_peak": peak, "matmul_share": share}
    return report("loss", options, found)


if __name__ == "__main__":
    if "--measure" not in sys.argv:
        keep_large_buffers()
    main()
