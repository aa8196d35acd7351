"""Time of the packed Item LLM, forward and backward, against its matrix products alone.

    python scripts/bench_item_llm.py [--quick] [--out FILE]

Real texts of MovieLens-100k with a prompt, each item once, through a Llama of SmolLM2-135M's shape (576 wide, 6 of
its layers, random weights, frozen words). The compared sides run in turn in one process:

    plain     every item with its whole text
    shared    the common prefix once, attended to by all items (what training does)
    compiled  the same, its layers under torch.compile
    products  the matrix products of "shared", forward and backward, on buffers of their shapes, nothing else

Ratios are medians over the rounds of one round's two times, so a slower or faster spell of the machine hits both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.tokens import TokenStore, build_token_store
from hllm_torchrec.flops import measured_matmul_peak
from hllm_torchrec.items import ItemEncoder
from hllm_torchrec.logs import machine_info
from hllm_torchrec.meter import backbone_flops
from hllm_torchrec.modules.item_llm import ItemLLM, build_backbone
from hllm_torchrec.modules.text_attention import BucketPlan

ROOT = Path(__file__).resolve().parents[1]
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
PROMPT = "Compress the following sentence into embedding: "


def keep_large_buffers() -> None:
    """Start again under `ALLOCATOR`: glibc reads it when a process begins."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options, or those of `arguments`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 3 minutes on 2 cores")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--dataset", type=Path, default=ROOT / "data/ml-100k", help="written by `hllm prepare`")
    parser.add_argument("--keys", nargs="+", default=["title", "year", "genres"], help="its text columns")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / ".cache/models/smollm2-135m-instruct")
    parser.add_argument("--items", type=int, default=64, help="unique items of a step")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor seconds of one thread, where others use the machine"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # shapes for the tests
    return parser.parse_args(arguments)


class Side:
    """The Item LLM on one set of items: forward and backward."""

    def __init__(self, tokens: TokenStore, ids: Tensor, shape: dict[str, Any], share: bool) -> None:
        torch.manual_seed(0)
        self.item_llm, self.ids = ItemLLM(build_backbone(None, shape)), ids
        self.item_llm.backbone.get_input_embeddings().requires_grad_(False)
        self.encoder = ItemEncoder(tokens, torch.device("cpu"), share_prefix=share)

    def __call__(self) -> Tensor:
        """One forward and backward pass; the embeddings."""
        self.item_llm.zero_grad(set_to_none=True)
        embeddings = self.encoder.encode(self.item_llm, self.ids)
        embeddings.square().sum().backward()
        return embeddings.detach()

    def work(self) -> tuple[int, int]:
        """(tokens, attended keys) of one pass."""
        before = self.encoder.encoded_tokens, self.encoder.attended_keys
        self()
        return self.encoder.encoded_tokens - before[0], self.encoder.attended_keys - before[1]

    def plan(self) -> BucketPlan:
        """The buckets of its batch, as its forward pass plans them."""
        seen: list[BucketPlan] = []

        def catch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["hllm_plan"])

        handle = self.item_llm.backbone.register_forward_pre_hook(catch, with_kwargs=True)
        self()
        handle.remove()
        return seen[0]


def products(side: Side, shape: dict[str, Any]) -> Callable[[], None]:
    """The matrix products of a forward and backward pass of `side`, on buffers of their own.

    Per layer: seven linear maps, each y = x W', dx = dy W, dW = dy' x; and in every bucket, for each head, the
    scores and weighted sums with their two gradients each, over the bucket's padded cells (the masked half too).
    """
    plan = side.plan()
    rows = plan.position_ids.numel()
    d, ff, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = d // heads * shape["num_key_value_heads"]
    maps = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    layers = [[torch.randn(m, n) for n, m in maps] for _ in range(shape["num_hidden_layers"])]
    inputs = {n: torch.randn(rows, n) for n in {size for pair in maps for size in pair}}
    grids = []
    for bucket in plan.buckets:
        size, keys = bucket.texts * heads, bucket.seen + bucket.longest
        q, k = torch.randn(size, bucket.longest, d // heads), torch.randn(size, keys, d // heads)
        grids.append((q, k, torch.randn(size, bucket.longest, keys)))

    def forward_and_backward() -> None:
        for layer in layers:
            for weight in layer:
                torch.mm(inputs[weight.shape[1]], weight.t())
            for q, k, scores in grids:
                torch.bmm(q, k.transpose(1, 2))
                torch.bmm(scores, k)
        for layer in reversed(layers):
            for q, k, scores in grids:  # of scores and of weighted sums, with respect to both factors
                torch.bmm(q, k.transpose(1, 2))
                torch.bmm(scores.transpose(1, 2), q)
                torch.bmm(scores, k)
                torch.bmm(scores.transpose(1, 2), q)
            for weight in layer:
                out = inputs[weight.shape[0]]
                torch.mm(out, weight)
                torch.mm(out.t(), inputs[weight.shape[1]])

    return forward_and_backward


def alternate(
    sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float], warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every timed call, by side; the sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, run in sides.items():
            start = clock()
            run()
            if number >= warmup:
                times[name].append(clock() - start)
    return times


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def why_no_bf16() -> str | None:
    """Why there are no bfloat16 rows; None where the processor multiplies bfloat16 matrices itself."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "the processor has no bfloat16 matrix instructions (AVX512-BF16 or AMX)"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; ratios, seconds and shapes."""
    shape = {**SHAPE, "num_hidden_layers": 1, "hidden_size": 72, "intermediate_size": 96} if options.tiny else SHAPE
    path = build_token_store(
        Dataset.open(options.dataset),
        options.tokenizer,
        prompt=PROMPT,
        keys=options.keys,
        max_text_length=64,
    )
    tokens = TokenStore.open(path)
    ids = torch.from_numpy(np.random.default_rng(0).choice(np.arange(1, len(tokens)), options.items, replace=False))
    sides = {name: Side(tokens, ids, shape, share=name != "plain") for name in ("plain", "shared", "compiled")}
    for layer in sides["compiled"].item_llm.backbone.layers:
        layer.compile(dynamic=True, backend="eager" if options.tiny else "inductor")
    outputs = {name: side() for name, side in sides.items()}
    for found in outputs.values():
        torch.testing.assert_close(found, outputs["plain"], rtol=1e-3, atol=1e-3)
    work = {name: sides[name].work() for name in ("plain", "shared")}
    timed = {**sides, "products": products(sides["shared"], shape)}
    rounds = 2 if options.tiny else 5 if options.quick else 15
    times = alternate(timed, rounds, time.process_time if options.cpu_time else time.perf_counter)
    return _describe(options, shape, sides, work, times)


def _peak_of_one_thread() -> float:
    """Operations per processor second of a large product; `measured_matmul_peak` goes by the wall clock."""
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    times = alternate({"product": lambda: torch.mm(left, right)}, 15, time.process_time)["product"]
    return 2.0 * 1024**3 / statistics.median(times)


def _describe(
    options: argparse.Namespace,
    shape: dict[str, Any],
    sides: dict[str, Side],
    work: dict[str, tuple[int, int]],
    times: dict[str, list[float]],
) -> dict[str, Any]:
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = _peak_of_one_thread() if options.cpu_time else measured_matmul_peak("cpu", torch.float32, seconds=1.0)
    flops = 3 * backbone_flops(sides["shared"].item_llm.backbone, *work["shared"])
    lengths = [bucket.longest for bucket in sides["shared"].plan().buckets]
    ratios = {
        "item_llm_matmul_share_fp32": ratio(times["products"], times["shared"]),
        "item_llm_matmul_share_fp32_compiled": ratio(times["products"], times["compiled"]),
        "item_llm_matmul_share_bf16": None,
        "prefix_sharing": ratio(times["plain"], times["shared"]),
        "compile": ratio(times["shared"], times["compiled"]),
    }
    machine = machine_info()
    return {
        "bench": "item_llm",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "mode": "tiny" if options.tiny else "quick" if options.quick else "full",
        "ratios": {name: None if value is None else round(value, 3) for name, value in ratios.items()},
        "bf16": why_no_bf16() or "not measured",
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "spread": {name: [round(min(values), 4), round(max(values), 4)] for name, values in times.items()},
        "peak_share": {
            "shared": round(flops / seconds["shared"] / peak, 3),
            "products": round(flops / seconds["products"] / peak, 3),
        },
        "matmul_peak": peak,
        "shapes": {
            "backbone": shape,
            "items": options.items,
            "tokens": {name: tokens for name, (tokens, _) in work.items()},
            "prefix_tokens": sides["shared"].encoder.tokens.prefix.size,
            "buckets": lengths,
            "rounds": len(times["plain"]),
        },
        "clock": "processor seconds" if options.cpu_time else "wall seconds",
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "load": os.getloadavg()[0],
        "machine": {name: machine[name] for name in ("cpu", "cores")},
        "versions": {"python": machine["python"], **machine["packages"]},
        "commit": machine["commit"],
    }


def main() -> None:
    """Run, print and save."""
    keep_large_buffers()
    options = parse()
    if options.cpu_time:
        torch.set_num_threads(1)
    result = run(options)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["peak_share"].items())
    print(
        f"of the machine's matrix-product peak ({result['matmul_peak'] / 1e9:.0f} GFLOP/s): {shares}", file=sys.stderr
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
