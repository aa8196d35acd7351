"""Jagged HSTU against the same layers padded, and against a softmax transformer of the same width, depth and size.

    python scripts/bench/bench_hstu.py [--quick] [--out FILE] [--dataset DIR]

A pass is forward and backward over a batch of users (`_forward`: forward alone, without a graph). Lengths of histories
are quantiles of the lengths in MovieLens-100k, scaled so that the longest history of the batch has the length in the
ratio's name (`ml`), or follow a power law (`power`: the n-th longest history of a batch has length / n events). The
sides alternate in one process:

- hstu: research preset (relative position and time bias), jagged, eager backend; `plain` is the same without the bias;
- padded: the same weights over [users, longest] with a dense causal mask, as in the public research code. If the scores
  of all users would not fit into memory, the users are divided into groups, which repeats no work;
- softmax: SASRec blocks with pre-normalization, jagged (SDPA in buckets), and a feed-forward network of half the width,
  so that they have as many parameters as HSTU's layers. They have no relative bias: compare them with `plain`.

Ratios are padded / hstu, softmax / hstu and softmax / plain: jagged HSTU is faster where they are above 1. The bench
stops if padded and jagged outputs differ. On a machine with CUDA, the backends eager, compiled and triton are also
timed on the GPU in bfloat16 (ratios `*_vs_triton_cuda_*`).

Legend: B users, T events of all users, D width, H heads, N events of the longest history, b users of a group.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from bench_candidates import peak_bytes
from benchmarking import add_dataset, alternate, arguments, keep_large_buffers, matmul_peak, medians, ratio, report, say
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.sasrec import SASRec
from hllm_torchrec.modules.encoders.shapes import HSTUShape, SASRecShape
from hllm_torchrec.modules.hstu.layer import HSTU
from hllm_torchrec.modules.hstu.layout import time_bucket
from hllm_torchrec.modules.jagged import offsets_from_lengths

WIDTH, LAYERS, HEADS, USERS = 128, 2, 2, 8
QUICK, FULL, TINY = (200, 1000, 2000), (200, 500, 1000, 2000, 4096, 8192), (12, 24)
DISTRIBUTIONS = ("ml", "power")
PADDED_SCORES = 2**27
"""Largest number of scores of a group of padded users, over all heads: 512 MiB, of which autograd has several copies.
"""
CUDA_USERS = 32


@dataclass(frozen=True)
class Batch:
    """Packed users: lengths of the B histories, x [T, D], offsets [B + 1], times [T] seconds."""

    lengths: list[int]
    x: Tensor
    offsets: Tensor
    times: Tensor

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that the query sees."""
        return sum(length * (length + 1) // 2 for length in self.lengths)


def history_lengths(dataset: Dataset) -> np.ndarray:
    """Number of events of each user in the training part."""
    return np.concatenate([dataset.sequences([group], ["item_ids"]).lengths for group in dataset.row_groups("train")])


def lengths_of(distribution: str, longest: int, users: int, histories: np.ndarray) -> list[int]:
    """Lengths of the histories of a batch, the longest first; `histories`: lengths in the dataset."""
    if distribution == "power":
        return [max(1, longest // (number + 1)) for number in range(users)]
    levels = 1 - np.arange(users) / users
    return [max(1, round(q)) for q in np.quantile(histories, levels) / histories.max() * longest]


def make_batch(lengths: list[int], width: int, device: str = "cpu") -> Batch:
    """Batch of random inputs; the time between events is about one minute to two days."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    times = torch.exp(torch.rand(total, generator=generator) * 8 + 4).long().cumsum(0)
    x = torch.randn(total, width, generator=generator)
    return Batch(lengths, x.to(device), offsets_from_lengths(torch.tensor(lengths)).to(device), times.to(device))


def encoders(width: int, longest: int) -> dict[str, UserEncoder]:
    """The three jagged encoders, without dropout."""
    shape = HSTUShape(width=width, layers=LAYERS, heads=HEADS, max_positions=longest, divide_by=longest)
    softmax = SASRecShape(width=width, layers=LAYERS, heads=HEADS, hidden=width // 2, norm="pre", max_positions=longest)
    torch.manual_seed(0)
    return {"hstu": HSTU(shape), "plain": HSTU(replace(shape, relative_bias=False)), "softmax": SASRec(softmax)}


class Padded:
    """HSTU's layers over [b, N, D] with a dense causal mask: all cells are computed, including padding.

    Scores are [b, H, N, N]; masks, distances and time buckets are computed once for all layers.
    """

    def __init__(self, encoder: HSTU, batch: Batch) -> None:
        self.encoder, self.batch = encoder, batch
        longest = max(batch.lengths)
        self.group = max(1, PADDED_SCORES // (HEADS * longest**2))
        self.valid = torch.arange(longest)[None] < torch.tensor(batch.lengths)[:, None]

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output rows of each group of users, without the padding; x [T, D]."""
        users = range(len(self.batch.lengths))
        for at in range(0, len(users), self.group):
            yield self._rows(x, list(users[at : at + self.group]))

    def _rows(self, x: Tensor, users: list[int]) -> Tensor:
        valid, encoder = self.valid[users], self.encoder
        start, end = int(self.batch.offsets[users[0]]), int(self.batch.offsets[users[-1] + 1])
        filled = x.new_zeros(*valid.shape, x.shape[1])
        filled[valid] = x[start:end]
        times = self.batch.times.new_zeros(valid.shape)
        times[valid] = self.batch.times[start:end]
        number, longest = valid.shape
        places = torch.arange(longest)
        hidden = ~torch.ones(longest, longest, dtype=torch.bool).tril()
        distance = (places[:, None] - places)[None].clamp(min=0)
        assert encoder.rules.last_bucket is not None and encoder.rules.divide_by is not None
        bucket = time_bucket(times[:, :, None] - times[:, None], encoder.rules.last_bucket)
        rows = encoder.add_positions(filled.flatten(0, 1), places.repeat(number))
        for layer in encoder.layers:
            u, v, q, k = layer.project(rows)
            q, k, v = (y.unflatten(0, (number, longest)).transpose(1, 2) for y in (q, k, v))
            scores = q @ k.transpose(-1, -2) * encoder.rules.alpha + layer.bias(distance, bucket)[:, None]
            seen = F.silu(scores).masked_fill(hidden, 0.0) @ v / encoder.rules.divide_by
            rows = layer.combine(rows, u, seen.transpose(1, 2).flatten(0, 1).flatten(1), places)
        return rows.unflatten(0, (number, longest))[valid]


Rows = Callable[[Tensor], Iterator[Tensor]]
"""Function x [T, D] -> rows of the last layer, in consecutive parts: the graph of a part is freed before the next."""


def step(rows: Rows, x: Tensor) -> None:
    """Run forward and backward, and discard the gradients."""
    x = x.detach().requires_grad_()
    for part in rows(x):
        part.backward(torch.ones_like(part))


@torch.no_grad()
def forward(rows: Rows, x: Tensor) -> None:
    """Run the forward pass only."""
    for _ in rows(x):
        pass


def jagged(encoder: UserEncoder, batch: Batch) -> Rows:
    """Side that runs the encoder over a packed batch."""

    def rows(x: Tensor) -> Iterator[Tensor]:
        yield encoder(x, batch.offsets, batch.times)[0]

    return rows


def measure(lengths: list[int], width: int, repeats: int) -> dict[str, Any]:
    """Measure every side on one batch: seconds of forward and backward, of forward alone, and FLOPs of a pass."""
    batch = make_batch(lengths, width)
    models = encoders(width, max(lengths))
    sides: dict[str, Rows] = {name: jagged(model, batch) for name, model in models.items()}
    assert isinstance(models["hstu"], HSTU)
    padded = Padded(models["hstu"], batch)
    sides["padded"] = padded
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(padded(batch.x))), next(sides["hstu"](batch.x)), rtol=2e-3, atol=2e-3)
    for name in models:
        step(sides[name], batch.x)  # the only warm-up if repeats is 1: a padded pass of long histories takes a minute
    warmup = int(repeats > 1)
    both = alternate({name: lambda rows=rows: step(rows, batch.x) for name, rows in sides.items()}, repeats, warmup)
    alone = alternate({name: lambda rows=rows: forward(rows, batch.x) for name, rows in sides.items()}, repeats, warmup)
    return {
        "lengths": lengths,
        "tokens": sum(lengths),
        "pairs": batch.pairs,
        "padded_groups": -(-len(lengths) // padded.group),
        "parameters": {n: sum(p.numel() for p in model.layers.parameters()) for n, model in models.items()},
        "seconds": medians(both),
        "seconds_forward": medians(alone),
        "times": both,
        "times_forward": alone,
        "flops": {name: model.flops(sum(lengths), batch.pairs) for name, model in models.items()},
    }


def ratios_of(point: dict[str, Any], name: str) -> dict[str, float]:
    """The ratios of one batch."""
    found = {}
    for suffix in ("", "_forward"):
        times = point[f"times{suffix}"]
        for other, ours in (("padded", "hstu"), ("softmax", "hstu"), ("softmax", "plain")):
            found[f"{other}_vs_{ours}_{name}{suffix}"] = ratio(times[other], times[ours])
    return found


def memory(lengths: list[int], width: int) -> dict[str, int]:
    """Peak bytes of the tensors of a forward and backward pass, by side."""
    batch, models = make_batch(lengths, width), encoders(width, max(lengths))
    sides: dict[str, Rows] = {name: jagged(model, batch) for name, model in models.items()}
    assert isinstance(models["hstu"], HSTU)
    sides["padded"] = Padded(models["hstu"], batch)

    def run(rows: Rows) -> Tensor:
        step(rows, batch.x)
        return batch.x

    return {name: peak_bytes(lambda rows=rows: run(rows)) for name, rows in sides.items()}


def on_cuda(lengths: list[int], width: int, repeats: int) -> dict[str, Any]:
    """Seconds of the backends on the GPU with bfloat16 autocast, after a warm-up in which they compile and tune."""
    batch = make_batch(lengths, width, "cuda")
    shape = HSTUShape(width=width, layers=LAYERS, heads=HEADS, max_positions=max(lengths), divide_by=max(lengths))
    sides: dict[str, Callable[[], None]] = {}
    for backend in ("triton", "eager", "compiled"):
        torch.manual_seed(0)
        encoder = HSTU(replace(shape, backend=backend)).cuda()

        def run(encoder: HSTU = encoder) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                step(jagged(encoder, batch), batch.x)
            torch.cuda.synchronize()

        sides[backend] = run
    times = alternate(sides, repeats, warmup=2)
    return {"lengths": lengths, "seconds": medians(times), "times": times}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    add_dataset(parser)
    parser.add_argument(
        "--longest", type=int, nargs="+", help="lengths of the longest history, instead of the defaults"
    )
    options: argparse.Namespace = parser.parse_args(argv)
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    histories = history_lengths(Dataset.open(options.dataset))
    longests = options.longest or (TINY if options.tiny else QUICK if options.quick else FULL)
    width = 16 if options.tiny else WIDTH
    ratios: dict[str, float] = {}
    points: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for distribution in DISTRIBUTIONS:
        for longest in longests:
            name = f"{distribution}_{longest}"
            lengths = lengths_of(distribution, longest, USERS, histories)
            few = options.tiny or longest > 4096 or (options.quick and longest > 1000)
            repeats = 1 if few else 3 if options.quick or longest > 1000 else 5
            point = points[name] = measure(lengths, width, repeats)
            ratios |= ratios_of(point, name)
            flops = point.pop("flops")
            shares[name] = {side: 3 * flops[side] / point["seconds"][side] / peak for side in flops}
            say(f"{name}: {point['seconds']}; forward {point['seconds_forward']}")
    longest = min(longests[-1], 2000)
    used = memory(lengths_of("ml", longest, USERS, histories), width)
    ratios[f"padded_vs_hstu_memory_ml_{longest}"] = used["padded"] / used["hstu"]
    cuda = {}
    if torch.cuda.is_available() and not options.tiny:
        for longest in longests:
            name = f"cuda_ml_{longest}"
            cuda[name] = on_cuda(lengths_of("ml", longest, CUDA_USERS, histories), 512, 10)
            times = cuda[name]["times"]
            ratios |= {f"{other}_vs_triton_{name}": ratio(times[other], times["triton"]) for other in times}
    shapes = {"width": width, "layers": LAYERS, "heads": HEADS, "users": USERS, "longest": list(longests)}
    found = {"ratios": ratios, "shapes": shapes, "points": points, "memory": used, "cuda": cuda or "there is none"}
    return report("hstu", options, found | {"matmul_peak": peak, "matmul_share": shares})


if __name__ == "__main__":
    keep_large_buffers()
    main()
