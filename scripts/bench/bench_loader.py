"""Samples per second of the loader, against a PyTorch dataset that tokenizes items one by one, on MovieLens-100k.

    python scripts/bench/bench_loader.py [--quick] [--out FILE] [--dataset DIR] [--tokenizer DIR]

A sample is one user's piece of history + 1 events and as many negatives; a batch has 8 samples. The plain side does
what HLLM's public dataset class does: `__getitem__` draws negatives and padding one by one, looks each item up in a
dictionary, joins its text and calls the tokenizer, in one worker process of a `DataLoader`. Our side is the trainer's
`Loader` with its background thread, and gathers the tokens of each batch's unique items from the memory map, as the
Item LLM's encoder does. `loader_h<history>` is our samples per second / those of the plain side.

`steps` compares, without timing, steps with a fixed number of users and steps with a fixed number of item tokens
(`data.batch_item_tokens`) on 2 ranks: `variation` is the standard deviation of the steps' costs divided by their mean,
and `waiting` the share of the ranks' time spent waiting for the slowest rank, if time is proportional to cost.
"""

import argparse
import os
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import LLAMA, MAX_TEXT, PROMPT, SEPARATOR, TEXT_KEYS, Row, config_of
from benchmarking import add_dataset, alternate, arguments, keep_large_buffers, medians, ratio, report, say
from plain_hllm import Ints, pieces_of
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.models.assembly import batch_spec_of, open_token_store

USERS = 8


class PlainDataset(TorchDataset):
    """Dataset that tokenizes in `__getitem__`, item by item."""

    def __init__(self, dataset: Dataset, tokenizer: Path, history: int) -> None:
        self.history, self.num_items = history, dataset.num_items
        self.pieces = list(pieces_of(dataset, history))
        self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
        self.texts = dict(enumerate(dataset.text(TEXT_KEYS).to_pylist(), start=1))

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        items = self.pieces[index][1].tolist()
        own = set(items)
        while len(items) < self.history + 1:
            items.insert(0, self._other(own))
        found: dict[str, list[int]] = {"items": items, "negatives": [self._other(own) for _ in items]}
        for kind in ("items", "negatives"):
            found[f"{kind}_tokens"], found[f"{kind}_lengths"] = [], []
            for item in found[kind]:
                ids = self._tokens(item)
                found[f"{kind}_tokens"].extend(ids)
                found[f"{kind}_lengths"].append(len(ids))
        return found

    def _other(self, own: set[int]) -> int:
        item = random.randint(1, self.num_items - 1)
        while item in own:
            item = random.randint(1, self.num_items - 1)
        return item

    def _tokens(self, item: int) -> list[int]:
        values = self.texts[item]
        text = PROMPT + SEPARATOR.join(f"{key}: {values[key]}" for key in TEXT_KEYS if values[key])
        ids: list[int] = self.tokenizer.encode(text)[:MAX_TEXT]
        return [*ids, 0]


def collate(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Concatenate the lists of all samples, as tensors."""
    return {name: torch.tensor([entry for sample in samples for entry in sample[name]]) for name in samples[0]}


def plain_batches(dataset: Dataset, tokenizer: Path, history: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches without end, from one worker process."""
    source = PlainDataset(dataset, tokenizer, history)
    loader: DataLoader = DataLoader(
        source, USERS, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True, collate_fn=collate
    )
    while True:
        yield from loader


def our_config(dataset: Dataset, tokenizer: Path, history: int) -> Config:
    """The configuration of `bench_step`."""
    return config_of(Row(history, USERS), str(dataset.root), str(tokenizer), LLAMA, "fp32", "runs/bench")


def our_batches(dataset: Dataset, tokenizer: Path, history: int) -> Iterator[tuple[HybridBatch, Ints]]:
    """Yield (batch, tokens of its unique items) without end."""
    config = our_config(dataset, tokenizer, history)
    tokens = open_token_store(config.item_llm, dataset)
    collator = Collator(dataset, batch_spec_of(config, dataset), config.seed, training=True)
    loader = Loader(dataset, collator, LoaderSpec("train", USERS, config.data.max_history, shuffle=True))
    epoch = 0
    while True:
        for batch in islice(loader.batches(epoch), len(loader.pieces) // USERS):
            yield batch, tokens.gather(batch.unique_items.numpy())[0]
        epoch += 1


def taking(batches: Iterator[Any], count: int) -> Callable[[], None]:
    """Side that takes `count` batches."""

    def take() -> None:
        for _ in range(count):
            next(batches)

    return take


def compare(history: int, options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of both sides."""
    dataset = Dataset.open(options.dataset)
    plain, ours = (make(dataset, options.tokenizer, history) for make in (plain_batches, our_batches))
    counts = {"plain": 2, "ours": 2} if options.tiny else {"plain": 24, "ours": 400}
    sides = {"plain": taking(plain, counts["plain"]), "ours": taking(ours, counts["ours"])}
    times = alternate(sides, 1 if options.tiny else 3 if options.quick else 7)
    rates = {side: USERS * counts[side] / seconds for side, seconds in medians(times).items()}
    say(f"history {history}: {', '.join(f'{side} {rate:,.0f} samples/s' for side, rate in rates.items())}")
    sample, (batch, packed) = next(plain), next(ours)
    shape = {
        "history": history,
        "users": USERS,
        "plain_items": sample["items"].numel() + sample["negatives"].numel(),
        "plain_tokens": sample["items_tokens"].numel() + sample["negatives_tokens"].numel(),
        "ours_events": batch.item_ids.numel(),
        "ours_negatives": batch.negative_items.numel(),
        "ours_unique_items": batch.unique_items.numel(),
        "ours_tokens": int(np.size(packed)),
        "samples_per_second": rates,
        "seconds": times,
    }
    return {"ratio": ratio(times["plain"], times["ours"], counts["ours"] / counts["plain"]), "shape": shape}


def spread_of_steps(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`variation` and `waiting` (see the module's docstring) of batches by users and by tokens, at equal mean cost."""
    dataset, ranks, history = Dataset.open(options.dataset), 2, 150
    config = our_config(dataset, options.tokenizer, history)
    collator = Collator(dataset, batch_spec_of(config, dataset), config.seed, training=True)
    item_costs = open_token_store(config.item_llm, dataset).lengths + 1
    found, budget = {}, 0
    for kind in ("users", "tokens"):
        spec = LoaderSpec("train", USERS, history, shuffle=True, batch_cost=budget, item_costs=item_costs)
        loader = Loader(dataset, collator, spec, world_size=ranks)
        costs = np.array([[loader.costs[step].sum() for step in of_rank] for of_rank in loader.rank_batches(0)])[:, :-1]
        budget = budget or int(costs.mean())
        total = costs.sum(axis=0)
        found[kind] = {
            "variation": float(total.std() / total.mean()),
            "waiting": float(1 - costs.mean(axis=0).sum() / costs.max(axis=0).sum()),
        }
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    add_dataset(parser, tokenizer=True)
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are tokenized one at a time
    histories = (50,) if options.tiny or options.quick else (10, 50, 150)
    found = {f"loader_h{history}": compare(history, options) for history in histories}
    ratios = {name: result["ratio"] for name, result in found.items()}
    shapes = {name: result["shape"] for name, result in found.items()}
    return report("loader", options, {"ratios": ratios, "shapes": shapes, "steps": spread_of_steps(options)})


if __name__ == "__main__":
    keep_large_buffers()
    main()
