"""A training step against that of HLLM's public code, on MovieLens-100k, with two Llamas of width 256 and 4 layers.

    python scripts/bench/bench_step.py [--quick] [--rows h50_b8 ...] [--out FILE] [--dataset DIR] [--tokenizer DIR]

A step is forward, backward and optimizer, without the loader. Our side is `Trainer.train_step` with the generative
loss, without ID and time features. The plain side is `scripts/bench/plain_hllm.py`, in fp32 in every row. Both start
from the same weights and have the same users, items and negatives; the bench stops if their losses differ. Ratios are
plain / ours, with the vocabulary head of the public code (49,152 words), and without it (`_nohead`). In bf16 there is
also `_fused`: the seconds of our step with unfused layers and SDPA, divided by those of our normal step. Item
occurrences have about 33.7 tokens on average (prompt, title, year, genres, [ITEM]), of which the first 10 are the same
for all; the separator was chosen to get this length.

Plain batches of more than 900 item occurrences would not fit in memory (64 users: 6,528 occurrences, 43 GB of logits),
and neither would ours of more than 2,500 unique items (the row without repeats has 6,528). Such batches are timed in
groups of items. Item embeddings are computed in advance, which is not timed. Then the user part runs forward and
backward from these embeddings, each group of items runs forward and backward with the resulting gradients, and the
optimizer steps. So the timed work is that of one step.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from benchmarking import (
    add_dataset,
    alternate,
    arguments,
    keep_large_buffers,
    matmul_peak,
    medians,
    ratio,
    report,
    say,
    why_no_bf16,
)
from plain_hllm import Ints, PlainBatch, PlainHLLM, Sample, draw_samples, plain_batch
from torch import Tensor

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.schema import Config, DataConfig, FeatureConfig, OptimConfig, ParallelConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.modules.attention import dense_attention
from hllm_torchrec.modules.encoders.backbone import backbone_flops
from hllm_torchrec.modules.encoders.fused_llama import FusedLlamaLayer
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts
from hllm_torchrec.training.optim import dense_optimizer
from hllm_torchrec.training.throughput import user_token_counts
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer

Encode = Callable[[Tensor], Tensor]
"""Function item ids [U] -> embeddings [U, E]."""

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
}
SMALL = LLAMA | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
PROMPT = "Compress the following sentence into embedding: "
TEXT_KEYS = ("title", "year", "genres")
SEPARATOR = ", and its "
MAX_TEXT = 64
ITEMS_AT_ONCE = 900
"""Largest number of item occurrences that the plain side encodes in one graph."""
UNIQUE_AT_ONCE = 2500
"""Largest number of unique items that our side encodes in one graph."""


@dataclass(frozen=True)
class Row:
    """One comparison; its ratios have the names step_<precision>_h<history>_b<users>[_norepeats][_nohead | _fused]."""

    history: int
    users: int
    repeats: bool = True
    """False: every occurrence is a different item, as in a catalogue much larger than the batch."""

    @property
    def name(self) -> str:
        """Part of the ratios' names that describes the history and the batch."""
        return f"h{self.history}_b{self.users}{'' if self.repeats else '_norepeats'}"


QUICK = (Row(50, 8),)
FULL = (Row(50, 8), Row(10, 8), Row(150, 8), Row(50, 64), Row(50, 64, repeats=False))
TINY = (Row(5, 3), Row(5, 4, repeats=False))


def config_of(row: Row, dataset: str, tokenizer: str, shape: dict[str, Any], precision: str, output: str) -> Config:
    """The experiment as a user would configure it."""
    return Config(
        output=output,
        data=DataConfig(dataset=dataset, max_history=max(2, row.history + 1), batch_users=row.users),
        item_llm=ItemLLMConfig(
            shape=shape,
            tokenizer=tokenizer,
            prompt=PROMPT,
            text_keys=TEXT_KEYS,
            separator=SEPARATOR,
            max_text_length=MAX_TEXT,
        ),
        user=UserEncoderConfig(shape=shape),
        features=FeatureConfig(item_id=False, action=False, time_depth=0),
        objective=ObjectiveConfig(
            fusion="none",
            negatives=row.users * (row.history + 1),
            positive_targets_only=False,
            collapse_above=1.0,  # no collapse alarm: random weights may collapse, which does not matter here
        ),
        optim=OptimConfig(lr=1e-4, item_llm_lr=1e-4),
        parallel=ParallelConfig(precision=precision),  # type: ignore[arg-type]
    )


class GivenNegatives(Collator):
    """The trainer's collator with the negatives of the samples; a repeated negative counts each time on both sides."""

    given: Ints

    def negatives(self, epoch: int, step: int) -> Ints:
        """[K], the same in every step."""
        return self.given


def hybrid_batch(trainer: Trainer, samples: list[Sample]) -> HybridBatch:
    """The trainer's batch for `samples`."""
    experiment = trainer.experiment
    collator = GivenNegatives(experiment.dataset, experiment.batch_spec, 0, training=True)
    collator.given = np.concatenate([sample.negatives for sample in samples])
    return collator([labelled_piece(s.user_id, s.items, s.timestamps) for s in samples], 0, 0)


def labelled_piece(user: int, items: Ints, timestamps: Ints, first: int = 0) -> Piece:
    """Piece of events with label 1 and action 1; events from index `first` on are the exposures."""
    ones = np.ones(items.size)
    events = Events.at(timestamps, item_ids=items, labels=ones, actions=ones)
    return Piece(**events.columns, user_id=user, first_target=first)


def without_repeats(samples: list[Sample], tokens: TokenStore) -> tuple[list[Sample], TokenStore]:
    """Samples with the same texts in which every occurrence is a different item, and the token store of these items."""
    ids, renamed, count = [], [], 0
    for sample in samples:
        new = {}
        for part in ("padding", "items", "negatives"):
            old = getattr(sample, part)
            ids.append(old)
            new[part] = count + 1 + np.arange(old.size)
            count += old.size
        renamed.append(replace(sample, **new))
    packed, offsets = tokens.gather(np.concatenate([[0], *ids]))
    return renamed, TokenStore(tokens.path, packed, offsets, tokens.facts)


def plain_step(model: PlainHLLM, batch: PlainBatch, optimizer: torch.optim.Optimizer) -> float:
    """Run one step; returns the loss."""
    loss = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def plain_step_in_groups(
    model: PlainHLLM, batch: PlainBatch, groups: list[PlainBatch], optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """Run one step with items encoded in `groups`; returns the loss and the seconds (see the module's docstring)."""
    kinds = ("positives", "negatives")
    heads, model.heads = model.heads, torch.nn.ModuleList()
    with torch.no_grad():
        found = {kind: [model.encode(getattr(group, kind)) for group in groups] for kind in kinds}
    model.heads = heads
    embedded = {kind: torch.cat(parts).requires_grad_() for kind, parts in found.items()}
    start = time.perf_counter()
    loss = model.loss(batch, **embedded)
    loss.backward()
    for kind in kinds:
        grads = embedded[kind].grad
        assert grads is not None, "every embedding is used"
        for group, grad in zip(groups, grads.chunk(len(groups)), strict=True):
            model.encode(getattr(group, kind)).backward(grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), time.perf_counter() - start


class EncodedBeforehand(torch.autograd.Function):
    """Item embeddings [U, E] computed without a graph; the backward pass encodes the items again, in groups."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, embedded: Tensor, encode: Encode, groups: list[Tensor]) -> Tensor:
        """Return `embedded`. `anchor` is any tensor that requires a gradient: it makes the result part of the graph."""
        ctx.encode, ctx.groups = encode, groups
        return embedded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        """Run forward and backward of each group of ids, which adds the gradients of the encoder's weights."""
        for ids, part in zip(ctx.groups, grad.split([len(ids) for ids in ctx.groups]), strict=True):
            with torch.enable_grad():
                ctx.encode(ids).backward(part)
        return None, None, None, None


def timed_step(trainer: Trainer, batch: HybridBatch, groups: int) -> tuple[dict[str, float], float, EncodingCounts]:
    """Run one step with items encoded in `groups` groups; return its metrics, its seconds, and the encoder's counts."""
    hllm, encoder = trainer.hllm, trainer.experiment.item_encoder
    assert encoder is not None, "a model without an Item LLM encodes nothing"
    if groups > 1:
        parts = list(batch.unique_items.chunk(groups))
        encode: Encode = functools.partial(encoder, hllm.item_llm)
        with torch.no_grad():
            embedded = torch.cat([encode(part) for part in parts])
        anchor = torch.zeros((), requires_grad=True)
        hllm.item_source = LiveItems(hllm.item_llm, lambda *_: EncodedBeforehand.apply(anchor, embedded, encode, parts))
    before, start = encoder.work, time.perf_counter()
    # DDP does not support backward passes within the backward pass. On one rank it has no gradients to reduce.
    with trainer._no_sync() if groups > 1 else nullcontext():
        numbers = trainer.train_step([batch])
    seconds = time.perf_counter() - start
    if groups > 1:
        hllm.item_source = trainer.experiment.live_items
    return numbers, seconds, encoder.work - before


class Comparison:
    """The two plain sides and our side of a row, on one batch."""

    def __init__(self, row: Row, options: argparse.Namespace, precision: str, output: str) -> None:
        self.row, self.precision = row, precision
        shape = SMALL if options.tiny else LLAMA
        config = config_of(row, str(options.dataset), str(options.tokenizer), shape, precision, output)
        config = replace(config, parallel=replace(config.parallel, compile=options.compile))
        self.trainer = build_trainer(config, torch.device("cpu"))
        encoder = self.trainer.experiment.item_encoder
        assert encoder is not None
        samples = draw_samples(self.trainer.experiment.dataset, row.history, row.users)
        if not row.repeats:
            samples, encoder.tokens = without_repeats(samples, encoder.tokens)
        self.encoder = encoder
        self.batch = hybrid_batch(self.trainer, samples)
        self.plain = plain_batch(samples, encoder.tokens)
        users = max(1, ITEMS_AT_ONCE // (2 * (row.history + 1)))
        parts = [samples[at : at + users] for at in range(0, row.users, users)]
        assert len({len(part) for part in parts}) == 1, "groups of equal size"
        self.groups = [plain_batch(part, encoder.tokens) for part in parts]
        self.item_groups = -(-self.batch.unique_items.numel() // UNIQUE_AT_ONCE)
        self.models = {side: PlainHLLM(shape, shape, head=side == "plain") for side in ("plain", "plain_nohead")}
        self.optimizers = {}
        for side, model in self.models.items():
            model.copy_weights(self.trainer.hllm)
            self.optimizers[side] = dense_optimizer(model.named_parameters(), learning_rate=1e-4)
        self.losses: dict[str, float] = {}
        self.padding = sum(sample.padding.size for sample in samples)

    def sides(self) -> dict[str, Callable[[], float | None]]:
        """Side -> function to time."""
        sides: dict[str, Callable[[], float | None]]
        sides = {side: lambda side=side: self._plain(side) for side in self.models} | {"ours": self._ours}
        if self.precision == "bf16":
            sides["unfused"] = self._unfused
        return sides

    def _plain(self, side: str) -> float | None:
        args = (self.models[side], self.plain)
        seconds = None
        if len(self.groups) == 1:
            loss = plain_step(*args, self.optimizers[side])
        else:
            loss, seconds = plain_step_in_groups(*args, self.groups, self.optimizers[side])
        self.losses.setdefault(side, loss)
        return seconds

    def _ours(self) -> float:
        numbers, seconds, self.item_work = timed_step(self.trainer, self.batch, self.item_groups)
        self.losses.setdefault("ours", numbers["loss"])
        return seconds

    def _unfused(self) -> float:
        """Our step with the layers of transformers under autocast, and SDPA."""
        fused, longest = FusedLlamaLayer.runs_fused, dense_attention.LONGEST
        FusedLlamaLayer.runs_fused = lambda *_: False  # type: ignore[method-assign]
        dense_attention.LONGEST = 0
        try:
            return timed_step(self.trainer, self.batch, self.item_groups)[1]
        finally:
            FusedLlamaLayer.runs_fused, dense_attention.LONGEST = fused, longest  # type: ignore[method-assign]

    def check_losses(self, tolerance: float) -> None:
        """Raise AssertionError if the first losses, which all sides compute with equal weights, differ."""
        ours = self.losses["ours"]
        for side, loss in self.losses.items():
            if abs(loss - ours) > tolerance * abs(ours):
                raise AssertionError(f"{self.row.name}: loss of ours {ours}, of {side} {loss}: not the same step")

    def shapes(self) -> dict[str, Any]:
        """Numbers of tokens and items of the step on both sides."""
        occurrences = len(self.plain.positives.lengths) + len(self.plain.negatives.lengths)
        return {
            "history": self.row.history,
            "users": self.row.users,
            "item_occurrences": occurrences,
            "padding_items": self.padding,
            "unique_items": self.batch.unique_items.numel(),
            "tokens_plain": self.plain.tokens,
            "tokens_plain_per_item": self.plain.tokens / occurrences,
            "tokens_ours": self.item_work.tokens,
            "prefix_tokens": len(getattr(self.encoder.tokens, "prefix", ())),
            "predictions": self.batch.next_rows.numel(),
            "negatives": self.batch.negative_items.numel(),
            "plain_groups": len(self.groups),
            "our_groups": self.item_groups,
        }

    def flops(self) -> dict[str, float]:
        """FLOPs of the matrix products of a step by side, forward and backward.

        The users' padding is counted only in the plain side's vocabulary head, which also runs on it, forward only.
        """
        hllm = self.trainer.hllm
        assert hllm.item_llm is not None
        lengths = np.array(self.plain.positives.lengths + self.plain.negatives.lengths)
        keys = int((lengths * (lengths + 1) // 2).sum())
        rest = 3 * backbone_flops(hllm.user.backbone, *user_token_counts(self.batch, queries=False))
        rest += 6.0 * self.batch.next_rows.numel() * self.batch.negative_items.numel() * hllm.user.width
        plain = 3 * backbone_flops(hllm.item_llm.backbone, self.plain.tokens, keys) + rest
        shape = hllm.item_llm.backbone.config
        head = 2.0 * (self.plain.tokens + self.plain.valid.numel()) * shape.hidden_size * shape.vocab_size
        ours = 3 * hllm.item_llm.flops(self.item_work) + rest
        return {"plain": plain + head, "plain_nohead": plain, "ours": ours, "unfused": ours}


def compare(row: Row, precision: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Measure one row: ratios, shares of the peak, shapes and seconds."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as output:
        comparison = Comparison(row, options, precision, f"{output}/run")
        big = row.users * row.history > 400
        repeats = 1 if options.tiny else 3 if options.quick or big else 5
        times = alternate(comparison.sides(), repeats)
        if options.profile:
            with torch.profiler.profile() as profiled:
                comparison.sides()["ours"]()
            say(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    comparison.check_losses(1e-4 if precision == "fp32" else 2e-2)
    seconds = medians(times)
    flops = comparison.flops()
    name = f"step_{precision}_{row.name}"
    say(f"{name}: " + ", ".join(f"{side} {value:.2f} s" for side, value in seconds.items()))
    return {
        "ratios": {
            name: ratio(times["plain"], times["ours"]),
            f"{name}_nohead": ratio(times["plain_nohead"], times["ours"]),
            **({f"{name}_fused": ratio(times["unfused"], times["ours"])} if precision == "bf16" else {}),
        },
        "share": {side: flops[side] / seconds[side] / peak for side in seconds},
        "row": {
            **comparison.shapes(),
            "seconds": times,
            "loss": comparison.losses,
            "plain_with_by_without_head": seconds["plain"] / seconds["plain_nohead"],
            "item_attention": str(getattr(comparison.trainer.hllm.item_llm, "attention", "buckets")),
        },
    }


def precisions() -> Iterator[tuple[str, str | None]]:
    """Yield (precision of our side, reason to leave it out, or None)."""
    yield "fp32", None
    yield "bf16", why_no_bf16()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    add_dataset(parser, tokenizer=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile our LLM layers (parallel.compile)")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in FULL], help="only these comparisons")
    parser.add_argument("--profile", action="store_true", help="also print a profile of a step of our side")
    options = parser.parse_args(argv)
    init_distributed()
    Dataset.open(options.dataset)  # fails early, with a message that names the remedy
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    say(f"matrix products: {peak / 1e9:.0f} GFLOP/s")
    rows = TINY if options.tiny else QUICK if options.quick else FULL
    if options.rows:
        rows = tuple(row for row in FULL if row.name in options.rows)
    ratios: dict[str, float | None] = {}
    shapes, share, left_out = {}, {}, {}
    for row in rows:
        for precision, reason in precisions():
            name = f"step_{precision}_{row.name}"
            if reason is not None:
                ratios |= {name: None, f"{name}_nohead": None, f"{name}_fused": None}
                left_out[name] = reason
                continue
            found = compare(row, precision, options, peak)
            ratios |= found["ratios"]
            shapes[name], share[name] = found["row"], found["share"]
    destroy_distributed()
    model = {"llama": SMALL if options.tiny else LLAMA, "prompt": PROMPT, "text_keys": TEXT_KEYS, "max_text": MAX_TEXT}
    found = {"ratios": ratios, "shapes": shapes, "left_out": left_out, "model": model}
    return report("step", options, found | {"matmul_peak": peak, "matmul_share": share})


if __name__ == "__main__":
    keep_large_buffers()
    main()
