"""All exposures of a user as queries of one sequence, against one sequence for each exposure: a complete training step.

    python scripts/bench/bench_fusion.py [--quick] [--out FILE] [--dataset DIR]

The bench times `Trainer.train_step` (early fusion, classification) for one user with `history` events and then 50
exposures, each of which sees every earlier event. On the side "one by one" each exposure is a separate sequence
(history, then the target), and all 50 sequences are one packed batch, so that both sides use the processor well and
neither encodes padding. Items have only IDs, so that only the user encoder is measured. The bench stops if the two
losses differ. `fusion_one_pass_h<history>` is seconds of one by one / one pass. Events are synthetic, because MovieLens
has no user with 2,000 events.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_step import LLAMA, SMALL
from benchmarking import add_dataset, alternate, arguments, keep_large_buffers, matmul_peak, medians, ratio, report, say

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.schema import Config, DataConfig, FeatureConfig, OptimConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.modules.encoders.backbone import backbone_flops
from hllm_torchrec.training.throughput import user_token_counts
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer

EXPOSURES = 50
USER = LLAMA | {"vocab_size": 8}
TINY = SMALL | {"vocab_size": 8}


def config_of(dataset: str, shape: dict[str, Any], output: str) -> Config:
    """Early fusion over item IDs and actions; tiny learning rates, so that both sides have nearly the same weights."""
    return Config(
        output=output,
        data=DataConfig(dataset=dataset, max_history=4096, batch_users=1),
        item_llm=ItemLLMConfig(enabled=False),
        user=UserEncoderConfig(shape=shape),
        features=FeatureConfig(time_depth=0),
        objective=ObjectiveConfig(fusion="early"),
        optim=OptimConfig(lr=1e-9, table_lr=1e-9),
    )


def user_piece(history: int, exposures: int, items: int, actions: int) -> Piece:
    """Piece of `history` events without labels and then `exposures` events with labels, one second apart."""
    rng = np.random.default_rng(0)
    events = history + exposures
    labels = rng.integers(0, 2, events).astype(np.float32)
    labels[:history] = np.nan
    columns = {"item_ids": rng.integers(1, items, events), "actions": rng.integers(1, actions, events)}
    made = Events.at(1_600_000_000 + np.arange(events), labels=labels, **columns)
    return Piece(**made.columns, user_id=1, first_target=history)


def one_by_one(piece: Piece) -> list[Piece]:
    """One piece for each exposure: its earlier events, and the exposure as the only target."""
    return [piece.cut(0, target + 1, target) for target in range(piece.first_target, len(piece))]


class Comparison:
    """Both sides for one history length: batches of the same exposures, for one trainer."""

    def __init__(self, trainer: Trainer, history: int, exposures: int) -> None:
        experiment = trainer.experiment
        collator = Collator(experiment.dataset, experiment.batch_spec, 0, training=True)
        piece = user_piece(history, exposures, experiment.dataset.num_items, experiment.dataset.num_actions)
        self.trainer = trainer
        self.batches = {"one by one": collator(one_by_one(piece), 0, 0), "one pass": collator([piece], 0, 0)}
        self.losses: dict[str, float] = {}

    def sides(self) -> dict[str, Callable[[], None]]:
        """Side -> function to time."""
        return {side: lambda side=side: self._step(side) for side in self.batches}

    def _step(self, side: str) -> None:
        self.losses.setdefault(side, self.trainer.train_step([self.batches[side]])["loss"])

    def check_losses(self) -> None:
        """Raise AssertionError if the losses of the two sides differ."""
        one, other = self.losses.values()
        if abs(one - other) > 1e-4 * abs(one):
            raise AssertionError(f"the losses differ: {self.losses}")

    def shape(self) -> dict[str, Any]:
        """Number of tokens by side."""
        return {side: user_token_counts(batch, queries=True)[0] for side, batch in self.batches.items()}

    def flops(self, batch: HybridBatch) -> float:
        """Matrix-product operations of a step."""
        return 3 * backbone_flops(self.trainer.hllm.user.backbone, *user_token_counts(batch, queries=True))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    add_dataset(parser)
    options: argparse.Namespace = parser.parse_args(argv)
    init_distributed()
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    histories = (12,) if options.tiny else (500,) if options.quick else (50, 100, 200, 500, 1000, 2000)
    exposures = 4 if options.tiny else EXPOSURES
    ratios, shapes, share = {}, {}, {}
    with tempfile.TemporaryDirectory() as output:
        shape = TINY if options.tiny else USER
        trainer = build_trainer(config_of(str(options.dataset), shape, f"{output}/run"), torch.device("cpu"))
        for history in histories:
            comparison = Comparison(trainer, history, exposures)
            times = alternate(comparison.sides(), 1 if options.tiny or history > 1000 else 3)
            comparison.check_losses()
            seconds = medians(times)
            name = f"fusion_one_pass_h{history}"
            ratios[name] = ratio(times["one by one"], times["one pass"])
            tokens = comparison.shape()
            shapes[name] = {"history": history, "exposures": exposures, "tokens": tokens, "seconds": times}
            share[name] = {s: comparison.flops(b) / seconds[s] / peak for s, b in comparison.batches.items()}
            say(f"history {history}: {seconds}")
    destroy_distributed()
    found = {"ratios": ratios, "shapes": shapes, "model": shape, "matmul_peak": peak, "matmul_share": share}
    return report("fusion", options, found)


if __name__ == "__main__":
    keep_large_buffers()
    main()
