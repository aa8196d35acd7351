"""Generates datasets of any size that resemble MovieLens-100k, and runs with random weights, for serving benchmarks.

    dataset = stand_in_dataset(folder / "data", Sizes())
    run = stand_in_run(folder / "late", dataset, "late", device)

Users have a log-normal number of events and three features; an event has a label and one of five actions; a tenth of
the items has a third of the events; items have titles and genres. The model is similar to that of
configs/ml100k/early.yaml. With a `width` above 0 it has a small Item LLM with random weights. The speed does not depend
on the values of the weights, and scores are only compared between programs with the same weights.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.training.trainer_setup import build_trainer

START = 1_700_000_000
"""Earliest second of an event."""
YEAR = 31_536_000
ACTIONS = ("1", "2", "3", "4", "5")
WORDS = tuple(f"word{number}" for number in range(2000))
GENRES = tuple(f"genre{number}" for number in range(18))
USER_FEATURES = {"gender": 2, "age": 61, "occupation": 21}
USER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 8,
}
ITEM: dict[str, Any] = {**USER, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Shape of the Item LLM; `stand_in_config` replaces its width."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a generated dataset; the defaults of users, items and events are those of MovieLens-100k.

    events: median number of events of a user; width: of the item embeddings, if the run has an Item LLM.
    """

    users: int = 943
    items: int = 1682
    events: int = 65
    width: int = 64
    seed: int = 0


def stand_in_dataset(folder: Path, sizes: Sizes) -> Path:
    """Generate the dataset, unless it exists; return its folder."""
    if (folder / "data" / "manifest.json").is_file():
        return folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sizes.seed)
    pq.write_table(_items(rng, sizes.items), folder / "items.parquet")
    pq.write_table(_users(rng, sizes.users), folder / "users.parquet")
    pq.write_table(_events(rng, sizes), folder / "events.parquet")
    mapping = {
        "name": "stand-in",
        "events": {"path": "events.parquet", "user": "user", "item": "item", "time": "second", "label": "label"},
        "items": {"path": "items.parquet", "item": "item", "text": ["title"], "features": {"genres": "|"}},
        "users": {"path": "users.parquet", "user": "user", "features": dict.fromkeys(USER_FEATURES)},
        "keep_items_without_events": True,
    }
    mapping["events"] |= {"action": "action", "actions": list(ACTIONS)}  # type: ignore[operator]
    (folder / "tables.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    share = min(0.01, 2000 / (sizes.users * sizes.events))  # small: the evaluation results of random runs are not used
    split = Split(fractions=(1 - 2 * share, share, share))
    return Path(prepare(table(folder / "tables.yaml"), folder / "data", split=split))


def _ids(kind: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(kind, pa.array(numbers).cast(pa.string()), "")


def _items(rng: np.random.Generator, count: int) -> pa.Table:
    words = pa.array(WORDS)
    title = pc.binary_join_element_wise(*(words.take(pa.array(rng.integers(0, len(WORDS), count))) for _ in "123"), " ")
    genres = pa.array(GENRES)
    parts = (genres.take(pa.array(rng.integers(0, len(GENRES), count))) for _ in "12")
    return pa.table(
        {"item": _ids("i", np.arange(count)), "title": title, "genres": pc.binary_join_element_wise(*parts, "|")}
    )


def _users(rng: np.random.Generator, count: int) -> pa.Table:
    features = {name: pa.array(rng.integers(0, size, count)).cast(pa.string()) for name, size in USER_FEATURES.items()}
    return pa.table({"user": _ids("u", np.arange(count)), **features})


def _events(rng: np.random.Generator, sizes: Sizes) -> pa.Table:
    counts = np.clip(rng.lognormal(np.log(sizes.events), 0.8, sizes.users), 5, 737).astype(np.int64)
    total = int(counts.sum())
    items = (sizes.items * rng.random(total) ** 2).astype(np.int64)  # the first tenth of the items has a third of them
    rating = rng.integers(1, 6, total)
    columns = {
        "user": _ids("u", np.repeat(np.arange(sizes.users), counts)),
        "item": _ids("i", np.minimum(items, sizes.items - 1)),
        "second": pa.array(START + rng.integers(0, YEAR, total)),
        "label": pa.array((rating > 3).astype(np.float32)),
        "action": pa.array(rating).cast(pa.string()),
    }
    return pa.table(columns)


def stand_in_config(folder: Path, dataset: Path, fusion: str, width: int, seed: int) -> Config:
    """Configuration of a run. width: width of the Item LLM; 0: the model has no Item LLM."""
    item_llm: dict[str, Any] = {"enabled": False}
    if width:
        shape = {**ITEM, "hidden_size": width, "intermediate_size": width, "vocab_size": len(WORDS) + 8}
        tokenizer = _write_tokenizer(folder.parent / "tokenizer")
        item_llm = {"shape": shape, "tokenizer": str(tokenizer), "text_keys": ["title"], "max_text_length": 8}
    sections = {
        "output": str(folder),
        "seed": seed,
        "max_steps": 2 if width else 1,
        "stages": [{"name": "random", "epochs": 1}],
        "data": {
            "dataset": str(dataset),
            "batch_users": 4,
            "max_history": 128,
            "item_features": ["genres"],
            "user_features": list(USER_FEATURES),
            "numeric_features": ["history_length", "user_mean"],
        },
        "item_llm": item_llm,
        "user": {"shape": USER},
        "features": {"action_gate": True, "time_depth": 0, "init_scale": 0.05},
        "objective": {"fusion": fusion, "value_weight": 0.5, "generative_weight": float(width > 0)},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return load_config(["--config", str(file)])


def stand_in_run(folder: Path, dataset: Path, fusion: str, device: torch.device, width: int = 0, seed: int = 0) -> Path:
    """Make a run by training one step, unless it exists; return its folder. fusion: early or late.

    A run with an Item LLM (width > 0) is not evaluated, because an evaluation would encode all items; so it has no best
    checkpoint.
    """
    if not (folder / "checkpoints").is_dir():
        trainer = build_trainer(stand_in_config(folder, dataset, fusion, width, seed), device)
        trainer.preemption.requested = width > 0
        with suppress(Preempted):
            trainer.run()
    return folder


def _write_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def raw_ids(dataset: Path) -> tuple[list[str], list[str]]:
    """Raw ids of the users, and of the items."""
    opened = Dataset.open(dataset)
    return opened.users["raw_user_id"].to_pylist(), opened.items["raw_item_id"].to_pylist()
