"""Time of the packed Item LLM, forward and backward, against its matrix products alone.

    python scripts/bench/bench_item_llm.py [--quick] [--out FILE]

The input is the texts of 64 items of MovieLens-100k (`--items`) with a prompt; the model is a Llama of SmolLM2-135M's
shape (width 576, 6 of its layers, random weights, frozen word embeddings). The compared sides alternate in one process:

    plain     every item with its complete text
    shared    the common prefix is computed once, and all items attend to it
    compiled  as shared, with the layers compiled by torch.compile
    read      as shared, with the last layer computed only for the [ITEM] rows (as in training)
    products  only the matrix products of "shared", forward and backward, on buffers of the same shapes

`item_llm_matmul_share_*` is the time of "products" / that of "shared" (`_compiled`: of "compiled"). --profile also
reports the share of each operator in the wall time of a pass of "shared", in float32 and in bfloat16.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from benchmarking import (
    SMOLLM2,
    add_dataset,
    alternate,
    arguments,
    keep_large_buffers,
    matmul_peak,
    medians,
    ratio,
    report,
    timed,
    why_no_bf16,
)
from torch import Tensor

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.modules.attention.text import BucketPlan
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts, ItemLLM

PROMPT = "Compress the following sentence into embedding: "


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Parse the options of the command line, or `given`."""
    parser = arguments(__doc__)
    add_dataset(parser, tokenizer=True)
    parser.add_argument("--keys", nargs="+", default=["title", "year", "genres"], help="text columns of the dataset")
    parser.add_argument("--items", type=int, default=64, help="unique items of a step")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU seconds of one thread, for a machine that is shared"
    )
    parser.add_argument("--profile", action="store_true", help="also report the share of each operator of a pass")
    return parser.parse_args(given)


class Side:
    """The Item LLM on one set of items: forward and backward. share: compute the common prefix once; read: compute the
    last layer only for the [ITEM] rows."""

    def __init__(
        self,
        tokens: TokenStore,
        ids: Tensor,
        shape: dict[str, Any],
        share: bool,
        read: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.item_llm, self.ids = ItemLLM(build_backbone(None, shape)), ids
        self.item_llm.reads_rows = read
        self.item_llm.backbone.get_input_embeddings().requires_grad_(False)
        self.encoder = ItemEncoder(tokens, torch.device("cpu"), share_prefix=share)

    def __call__(self) -> Tensor:
        """Run one forward and backward pass; return the embeddings."""
        self.item_llm.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            embeddings = self.encoder.encode(self.item_llm, self.ids)
        embeddings.square().sum().backward()
        return embeddings.detach()

    def work(self) -> EncodingCounts:
        """Numbers of items, tokens and keys in one pass."""
        before = self.encoder.work
        self()
        return self.encoder.work - before

    def plan(self) -> BucketPlan:
        """The attention plan of the batch, captured in a forward pass."""
        seen: list[BucketPlan] = []

        def catch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["hllm_plan"])

        handle = self.item_llm.backbone.register_forward_pre_hook(catch, with_kwargs=True)
        self()
        handle.remove()
        return seen[0]


def products(side: Side, shape: dict[str, Any]) -> Callable[[], None]:
    """Function that computes the matrix products of a forward and backward pass of `side`, on separate buffers.

    Each layer has seven linear maps with y = x W', dx = dy W, dW = dy' x. In every bucket and for each head it has the
    attention scores and the weighted sums, with two gradients each, over the padded cells and the masked half as well.
    """
    plan = side.plan()
    rows = plan.position_ids.numel()
    d, ff, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = d // heads * shape["num_key_value_heads"]
    maps = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    dtype = side.dtype
    layers = [[torch.randn(m, n, dtype=dtype) for n, m in maps] for _ in range(shape["num_hidden_layers"])]
    inputs = {n: torch.randn(rows, n, dtype=dtype) for n in {size for pair in maps for size in pair}}
    grids = []
    for bucket in plan.buckets:
        size, keys = bucket.texts * heads, bucket.seen + bucket.longest
        q, k = (torch.randn(size, length, d // heads, dtype=dtype) for length in (bucket.longest, keys))
        grids.append((q, k, torch.randn(size, bucket.longest, keys, dtype=dtype)))

    def forward_and_backward() -> None:
        for layer in layers:
            for weight in layer:
                torch.mm(inputs[weight.shape[1]], weight.t())
            for q, k, scores in grids:
                torch.bmm(q, k.transpose(1, 2))
                torch.bmm(scores, k)
        for layer in reversed(layers):
            for q, k, scores in grids:  # gradients of the scores and of the weighted sums, for both factors
                torch.bmm(q, k.transpose(1, 2))
                torch.bmm(scores.transpose(1, 2), q)
                torch.bmm(scores, k)
                torch.bmm(scores.transpose(1, 2), q)
            for weight in layer:
                out = inputs[weight.shape[0]]
                torch.mm(out, weight)
                torch.mm(out.t(), inputs[weight.shape[1]])

    return forward_and_backward


def operators(side: Side) -> dict[str, float]:
    """Share of each operator in the wall time of a pass, largest first; shares below 1% are summed as "rest"."""
    with torch.profiler.profile() as profiled:
        side()
    own = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(own.values())
    found = {name: spent / total for name, spent in sorted(own.items(), key=lambda one: -one[1])}
    large = {name: round(share, 3) for name, share in found.items() if share >= 0.01}
    return {**large, "rest": round(1 - sum(large.values()), 3)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all sides; return ratios, seconds and shapes."""
    tiny = {"num_hidden_layers": 1, "hidden_size": 72, "intermediate_size": 96}
    shape = SMOLLM2 | tiny if options.tiny else SMOLLM2
    path = build_token_store(
        Dataset.open(options.dataset),
        options.tokenizer,
        prompt=PROMPT,
        keys=options.keys,
        max_text_length=64,
    )
    tokens = TokenStore.open(path)
    ids = torch.from_numpy(np.random.default_rng(0).choice(np.arange(1, len(tokens)), options.items, replace=False))
    names = ("plain", "shared", "compiled", "read")
    sides = {name: Side(tokens, ids, shape, share=name != "plain", read=name == "read") for name in names}
    for layer in sides["compiled"].item_llm.backbone.layers:
        layer.compile(dynamic=True, backend="eager" if options.tiny else "inductor")
    outputs = {name: side() for name, side in sides.items()}
    for found in outputs.values():
        torch.testing.assert_close(found, outputs["plain"], rtol=1e-3, atol=1e-3)
    if why_no_bf16() is None:
        sides["shared_bf16"] = Side(tokens, ids, shape, share=True, dtype=torch.bfloat16)
        least = torch.cosine_similarity(sides["shared_bf16"](), outputs["plain"]).min()
        assert least > 0.99, f"the least cosine of bfloat16 and float32 is {least:.4f}"
    clock = time.process_time if options.cpu_time else time.perf_counter
    calls: dict[str, Callable[[], object]] = {**sides, "products": products(sides["shared"], shape)}
    if "shared_bf16" in sides:
        calls["products_bf16"] = products(sides["shared_bf16"], shape)
    timed_calls = {name: timed(call, clock) for name, call in calls.items()}
    times = alternate(timed_calls, 2 if options.tiny else 5 if options.quick else 15)
    return describe(options, sides, times)


def describe(options: argparse.Namespace, sides: dict[str, Side], times: dict[str, list[float]]) -> dict[str, Any]:
    """Results for `report`."""
    seconds, peak = medians(times), matmul_peak()
    work = {name: side.work() for name, side in sides.items()}
    flops = {name: 3 * side.item_llm.flops(work[name]) for name, side in sides.items()}
    shape = sides["shared"].item_llm.backbone.config
    measured = "shared_bf16" in sides
    share_bf16 = ratio(times["products_bf16"], times["shared_bf16"]) if measured else None
    return {
        "ratios": {
            "item_llm_matmul_share_fp32": ratio(times["products"], times["shared"]),
            "item_llm_matmul_share_fp32_compiled": ratio(times["products"], times["compiled"]),
            "item_llm_matmul_share_bf16": share_bf16,
            "bf16_vs_fp32": None if share_bf16 is None else ratio(times["shared"], times["shared_bf16"]),
            "prefix_sharing": ratio(times["plain"], times["shared"]),
            "compile": ratio(times["shared"], times["compiled"]),
            "read_rows_alone": ratio(times["shared"], times["read"]),
        },
        "bf16": why_no_bf16(),
        "operators": {n: operators(sides[n]) for n in ("shared", "shared_bf16") if options.profile and n in sides},
        "seconds": seconds,
        "ranges": {name: [min(values), max(values)] for name, values in times.items()},
        "clock": "processor seconds of one thread" if options.cpu_time else "wall seconds",
        "matmul_peak": peak,
        "matmul_share": {"item_llm": {name: flops[name] / seconds[name] / peak for name in sides}},
        "shapes": {
            "layers": shape.num_hidden_layers,
            "width": shape.hidden_size,
            "items": options.items,
            "tokens": {name: done.tokens for name, done in work.items()},
            "prefix_tokens": sides["shared"].encoder.tokens.prefix.size,
            "buckets": [bucket.longest for bucket in sides["shared"].plan().buckets],
        },
    }


def main() -> None:
    """Run, print and save."""
    keep_large_buffers()
    options = parse()
    if options.cpu_time:
        torch.set_num_threads(1)
    report("item_llm", options, run(options))


if __name__ == "__main__":
    main()
