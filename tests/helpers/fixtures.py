"""A tiny world for tests: a generated shop, prepared; a tokeniser; Llama and BERT shapes; configurations.

Everything is made once per process, in a folder that goes when the process ends. The shop has what breaks
things: users of 1 to 45 events, seconds with several events, events that are no exposures, items without
text, items without events, features with no value or three.
"""

import shutil
import tempfile
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.schema import Config, DataConfig, EvaluationConfig, FeatureConfig, OptimConfig, ParallelConfig
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems

USERS, ITEMS = 24, 40
WORDS = tuple(f"word{i}" for i in range(24))
GENRES = ("drama", "comedy", "noir", "war")
COUNTRIES = ("de", "fr", "jp")
ACTIONS = ("1", "2", "3", "4", "5", "view")
START = 1_400_000_000

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
"""Grouped queries: two heads share a key."""

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

USER: dict[str, Any] = {**LLAMA, "hidden_size": 16, "num_key_value_heads": 4, "vocab_size": 3}


@cache
def folder() -> Path:
    """A folder that is deleted when the process that made it ends, also if multiprocessing started that process."""
    made = Path(tempfile.mkdtemp(prefix="hllm-tests-"))
    # not a TemporaryDirectory: multiprocessing ends its processes by os._exit, which skips the finalizers of objects
    Finalize(None, shutil.rmtree, args=(made, True), exitpriority=0)
    return made


def write_shop(target: Path, seed: int = 0) -> Path:
    """CSV files of a generated shop and their mapping for `sources.table`; returns the mapping file."""
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pa.csv.write_csv(_events(rng), target / "events.csv")
    pa.csv.write_csv(_items(rng), target / "items.csv")
    countries = [str(rng.choice(COUNTRIES)) if user % 5 else "" for user in range(USERS)]
    names = [f"u{user}" for user in range(USERS)]
    pa.csv.write_csv(pa.table({"customer": names, "country": countries}), target / "users.csv")
    mapping = {
        "name": "tiny-shop",
        "events": {
            "path": "events.csv",
            "user": "customer",
            "item": "sku",
            "time": "second",
            "label": "rating",
            "positive_from": 4,
            "action": "kind",
            "actions": list(ACTIONS),
        },
        "items": {
            "path": "items.csv",
            "item": "sku",
            "text": ["title", "brand"],
            "features": {"genres": "|"},
        },
        "users": {"path": "users.csv", "user": "customer", "features": {"country": None}},
    }
    path = target / "mapping.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def _events(rng: np.random.Generator) -> pa.Table:
    """Sessions: a step in time now and then, several events in many of the seconds, a fifth of them views."""
    columns: dict[str, list[str]] = {name: [] for name in ("customer", "sku", "second", "rating", "kind")}
    for user in range(USERS):
        length = 1 if user == 0 else int(rng.integers(3, 46))
        second = START + int(rng.integers(0, 2_000_000))
        for _ in range(length):
            second += int(rng.choice([0, 0, 1, 60, 90_000]))
            rating = int(rng.integers(1, 6))
            is_view = rng.random() < 0.2
            columns["customer"].append(f"u{user}")
            columns["sku"].append(f"s{int(rng.integers(0, ITEMS - 3))}")  # the last three are never seen
            columns["second"].append(str(second))
            columns["rating"].append("" if is_view else str(rating))
            columns["kind"].append("view" if is_view else str(rating))
    return pa.table(columns)


def _items(rng: np.random.Generator) -> pa.Table:
    titles = [" ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) for _ in range(ITEMS)]
    brands = [str(rng.choice(WORDS)) if item % 3 else "" for item in range(ITEMS)]
    for bare in (3, 17):
        titles[bare] = brands[bare] = ""
    genres = ["|".join(rng.choice(GENRES, int(rng.integers(0, 4)), replace=False)) for _ in range(ITEMS)]
    return pa.table({"sku": [f"s{i}" for i in range(ITEMS)], "title": titles, "brand": brands, "genres": genres})


@cache
def dataset(rule: str = "time") -> Dataset:
    """The shop, prepared with a split rule."""
    mapping = write_shop(folder() / "shop")
    return Dataset.open(prepare(table(mapping), folder() / f"dataset-{rule}", split=rule))


@cache
def tokenizer_dir() -> Path:
    """A word-level tokeniser of the shop's words; saved as a Hugging Face directory."""
    known = ["[UNK]", "title", "brand", ":", ",", *WORDS]
    assert len(known) <= LLAMA["vocab_size"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    path = folder() / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return path


@cache
def token_store(rule: str = "time") -> TokenStore:
    """Tokens of the shop's items; the items without text have none."""
    path = build_token_store(dataset(rule), tokenizer_dir(), keys=["title", "brand"], max_text_length=12)
    return TokenStore.open(path)


def config(rule: str = "time", output: str = "runs/test", **sections: Any) -> Config:
    """A tiny configuration on the shop. Sections are dicts: config(objective={"fusion": "early"})."""
    defaults: dict[str, tuple[type, dict[str, Any]]] = {
        "data": (DataConfig, {"dataset": str(dataset(rule).root), "batch_users": 4}),
        "item_llm": (
            ItemLLMConfig,
            {
                "shape": LLAMA,
                "tokenizer": str(tokenizer_dir()),
                "text_keys": ("title", "brand"),
                "max_text_length": 12,
            },
        ),
        "user": (UserEncoderConfig, {"shape": USER}),
        "features": (FeatureConfig, {"time_width": 4, "init_scale": 0.5}),
        "objective": (ObjectiveConfig, {"negatives": 8, "head_hidden": 12}),
        "optim": (OptimConfig, {}),
        "parallel": (ParallelConfig, {}),
        "evaluation": (EvaluationConfig, {}),
    }
    built = {name: kind(**{**given, **sections.pop(name, {})}) for name, (kind, given) in defaults.items()}
    return Config(output=output, **built, **sections)


def recipe(cfg: Config, rule: str = "time") -> BatchSpec:
    """What a batch of the configuration holds."""
    from hllm_torchrec.models.assembly import batch_spec_of

    return batch_spec_of(cfg, dataset(rule))


def model(cfg: Config, rule: str = "time", seed: int = 0) -> HLLM:
    """An unsharded model on the CPU, in evaluation mode, with weights large enough to matter."""
    torch.manual_seed(seed)
    built = build_model(cfg, recipe(cfg, rule).tables(dataset(rule)), base_rate=0.4)
    for backbone in (built.user, built.item_llm.backbone if built.item_llm else None):
        if backbone is not None:
            enlarge(backbone)
    if built.item_llm is not None:
        torch.nn.init.normal_(built.item_llm.item_token)
        built.item_source = LiveItems(built.item_llm, ItemEncoder(token_store(rule), torch.device("cpu")))
    return built.eval()


@torch.no_grad()
def enlarge(module: torch.nn.Module, factor: float = 8.0) -> torch.nn.Module:
    """Scale random matrices up: at their initial size attention is nearly uniform, and hides mistakes."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)
        elif bool((parameter == 0).all()):
            parameter.normal_(std=0.1)
    return module


def collator(cfg: Config, rule: str = "time", training: bool = False) -> Collator:
    """The collator of a configuration."""
    return Collator(dataset(rule), recipe(cfg, rule), cfg.seed, training)


@cache
def pieces(split: str = "train", rule: str = "time") -> tuple[Piece, ...]:
    """One piece per user of a split: the whole sequence, exposures from the split's part on."""
    found = []
    for group in dataset(rule).row_groups(split):
        for row in dataset(rule).read_row_group(group.path, group.index).to_pylist():
            user, first = row.pop("user_id"), row.pop("target_start")
            events = Events.at(row.pop("timestamps"), **row)  # a label that is None becomes NaN
            found.append(Piece(**events.columns, user_id=user, first_target=first))
    return tuple(found)
