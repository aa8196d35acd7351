"""Seconds of a training step by history length, batch size, number of negatives and catalogue size.

    python scripts/bench/bench_curves.py [--quick] [--out FILE]

The bench runs the training path (Item LLM on texts of 32 tokens and [ITEM], item-ID table sharded by TorchRec with its
in-backward optimizer, generative loss) on synthetic catalogues. No item of a batch is repeated, so a step has the
highest possible cost. All batches of the catalogue curve have the same number of unique items and tokens, so the
cost should be constant: `step_catalogue_flat` is the seconds with the largest catalogue / those with the smallest.
`step_per_token_<curve>` is the time per item token at the curve's end / at its beginning (1: linear in tokens). With
`--out` the curves are also plotted beside that file, as PNG and SVG.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import LLAMA, SMALL, GivenNegatives, labelled_piece
from benchmarking import alternate, arguments, keep_large_buffers, matmul_peak, medians, ratio, report, say
from matplotlib.figure import Figure

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.schema import Config, DataConfig, FeatureConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.distributed.wrappers import unwrap_model
from hllm_torchrec.embedding.tables import initialize_tables
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.modules.encoders.backbone import backbone_flops
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts
from hllm_torchrec.training.loss import LossWeights, micro_batch_loss, step_counts
from hllm_torchrec.training.optim import clip_grad_norm, dense_optimizer
from hllm_torchrec.training.throughput import user_token_counts

TEXT_TOKENS = 32
SHAPE = LLAMA | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 8192}
DEFAULT = {"history": 50, "users": 8, "negatives": 512, "catalogue": 100_000}
CURVES = {
    "history": (10, 25, 50, 100, 200),
    "users": (2, 4, 8, 16, 32),
    "negatives": (128, 512, 2048, 8192),
    "catalogue": (10_000, 100_000, 1_000_000),
}
QUICK = {"history": (10, 50, 100), "users": (2, 8), "negatives": (128, 1024), "catalogue": (10_000, 1_000_000)}
TINY_DEFAULT = {"history": 5, "users": 2, "negatives": 8, "catalogue": 2000}
TINY = {"history": (3, 6), "users": (1, 2), "negatives": (4, 8), "catalogue": (2000, 4000)}


class Catalogue:
    """A model and a synthetic catalogue of `items` texts."""

    def __init__(self, items: int, shape: dict[str, Any]) -> None:
        config = Config(
            data=DataConfig(max_history=4096),
            item_llm=ItemLLMConfig(shape=shape, tokenizer="none", max_text_length=TEXT_TOKENS),
            user=UserEncoderConfig(shape=shape),
            features=FeatureConfig(action=False, time_depth=0),
            objective=ObjectiveConfig(fusion="none", negatives=1, positive_targets_only=False),
        )
        torch.manual_seed(0)
        self.items = items
        rng = np.random.default_rng(0)
        values = rng.integers(0, shape["vocab_size"], (items + 1) * TEXT_TOKENS, dtype=np.int32)
        offsets = np.arange(items + 2, dtype=np.int64) * TEXT_TOKENS
        tokens = TokenStore(Path("invented"), values, offsets, {"vocab_size": shape["vocab_size"]})
        model = build_model(config, {"item_id": items + 1}, 0.5, torch.device("meta"))
        self.encoder = ItemEncoder(tokens, torch.device("cpu"))
        model.item_source = LiveItems(model.item_llm, self.encoder)
        self.model = parallelize(model, config, torch.device("cpu"))
        initialize_tables(self.model, 0, config.features.init_scale)
        self.hllm = unwrap_model(self.model)
        self.optimizer = dense_optimizer(self.hllm.named_parameters(), learning_rate=1e-4)
        self.weights = LossWeights.of(config)

    def batch(self, history: int, users: int, negatives: int) -> HybridBatch:
        """Batch of users with `history` + 1 events each; all items and negatives are different."""
        count = users * (history + 1)
        ids = np.random.default_rng(1).choice(self.items, count + negatives, replace=False) + 1
        spec = BatchSpec(fusion="none", negatives=negatives, positive_targets_only=False, action=False, time_depth=0)
        collator = GivenNegatives(_Sizes(self.items), spec, training=True)
        collator.given = ids[count:]
        of_users = enumerate(np.split(ids[:count], users), start=1)
        return collator([labelled_piece(user, items, np.arange(history + 1)) for user, items in of_users], 0, 0)

    def step(self, batch: HybridBatch) -> None:
        """Run forward, backward (which updates the table) and the dense optimizer."""
        loss, _ = micro_batch_loss(self.model(batch), step_counts([batch]), self.weights, encodes_items=True)
        loss.backward()
        clip_grad_norm(self.hllm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Sizes:
    """Replacement for a dataset, with the attributes that a collator reads."""

    def __init__(self, items: int) -> None:
        self.num_items = self.num_table_items = items + 1
        self.action_values = np.full(2, np.nan)  # one action, without a number
        self.manifest: dict[str, Any] = {"split": {}}  # nothing is held out
        self.schema = EventSchema()
        self.excluded_items = np.empty(0, np.int64)


def measure(
    curve: str, values: tuple[int, ...], default: dict[str, int], made: Callable[[int], Catalogue], repeats: int
) -> list[dict[str, Any]]:
    """Measure the points of one curve alternately."""
    points = [default | {curve: value} for value in values]
    sides, batches = {}, []
    for point in points:
        catalogue = made(point["catalogue"])
        batch = catalogue.batch(point["history"], point["users"], point["negatives"])
        batches.append((catalogue, batch))
        sides[str(point[curve])] = lambda catalogue=catalogue, batch=batch: catalogue.step(batch)
    times = alternate(sides, repeats)
    seconds = medians(times)
    found = []
    for point, (catalogue, batch) in zip(points, batches, strict=True):
        items = batch.unique_items.numel()
        name = str(point[curve])
        work = {"unique_items": items, "item_tokens": items * (TEXT_TOKENS + 1), "flops": flops(catalogue, batch)}
        found.append({**point, **work, "seconds": seconds[name], "times": times[name]})
    say(f"{curve}: " + ", ".join(f"{point[curve]} {point['seconds']:.3f} s" for point in found))
    return found


def flops(catalogue: Catalogue, batch: HybridBatch) -> float:
    """Matrix-product operations of a step."""
    items, length, hllm = batch.unique_items.numel(), TEXT_TOKENS + 1, catalogue.hllm
    keys = items * length * (length + 1) // 2
    texts = hllm.item_llm.flops(EncodingCounts(items, items * length, keys, items * length))
    users = backbone_flops(hllm.user.backbone, *user_token_counts(batch, queries=False))
    logits = 2.0 * batch.next_rows.numel() * batch.negative_items.numel() * hllm.user.width
    return 3 * (texts + users + logits)


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> list[str]:
    """Plot one panel per curve to `path` with the suffixes .png and .svg; returns the names of the files."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (curve, points) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axes.plot([point[curve] for point in points], [point["seconds"] for point in points], "o-", color="#0072B2")
        axes.set(xlabel=curve, xscale="log", ylim=(0, None))
        axes.grid(color="#D9D9D9")
    figure.axes[0].set_ylabel("seconds per step")
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return [file.name for file in files]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    options: argparse.Namespace = arguments(__doc__).parse_args(argv)
    init_distributed()
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    shape = SMALL | {"vocab_size": 64} if options.tiny else SHAPE
    chosen, default = (TINY, TINY_DEFAULT) if options.tiny else (QUICK if options.quick else CURVES, DEFAULT)
    repeats = 1 if options.tiny else 3 if options.quick else 7
    catalogues: dict[int, Catalogue] = {}

    def made(items: int) -> Catalogue:
        if items not in catalogues:
            catalogues[items] = Catalogue(items, shape)
        return catalogues[items]

    curves = {curve: measure(curve, values, default, made, repeats) for curve, values in chosen.items()}
    destroy_distributed()
    ends = {curve: (points[0], points[-1]) for curve, points in curves.items()}
    first, last = ends["catalogue"]
    ratios = {"step_catalogue_flat": ratio(last["times"], first["times"])}
    for curve in ("history", "users", "negatives"):
        first, last = ends[curve]
        per_token = first["item_tokens"] / last["item_tokens"]
        ratios[f"step_per_token_{curve}"] = ratio(last["times"], first["times"], per_token)
    share = {
        curve: {point[curve]: point["flops"] / point["seconds"] / peak for point in points}
        for curve, points in curves.items()
    }
    found = {"ratios": ratios, "shapes": default, "curves": curves, "model": shape}
    found |= {"matmul_peak": peak, "matmul_share": share}
    if options.out is not None:
        found["plots"] = draw(curves, options.out)
    return report("curves", options, found)


if __name__ == "__main__":
    keep_large_buffers()
    main()
