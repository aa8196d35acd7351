"""Tables of creatives for the generated shop, their tokenizer, and settings of a run that trains on them."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hllm_torchrec.creative.template import TemplateRule, write_by_template
from hllm_torchrec.data.creative_table import split_by_user, write_table
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.split import SPLITS
from tests.helpers import fixtures

WRITER: dict[str, Any] = {**fixtures.LLAMA, "vocab_size": 48}
PROMPT = "write for {user} : {title} by {brand} ,"


@cache
def tokenizer_dir() -> Path:
    """A word-level tokenizer of the shop's words and genres, with an end token."""
    known = [
        "[UNK]",
        "[END]",
        ":",
        ",",
        "for",
        "fans",
        "of",
        "write",
        "by",
        *fixtures.COUNTRIES,
        *fixtures.GENRES,
        *fixtures.WORDS,
    ]
    assert len(known) <= WRITER["vocab_size"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    path = fixtures.folder() / "creative-tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]").save_pretrained(path)
    return path


CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [END] {% endfor %}"
    "{% if add_generation_prompt %}word1{% endif %}"
)


@cache
def tiny_model(chat: bool = True) -> Path:
    """Make a tiny random Llama with a word-level tokenizer, whose chat template (if `chat`) has special tokens."""
    path = fixtures.folder() / f"local-writer-{chat}"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir())
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {name: value for name, value in WRITER.items() if name != "model_type"}
    config = LlamaConfig(**shape, max_position_embeddings=512, initializer_range=0.4, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@cache
def shop(rule: str = "time") -> Dataset:
    """Copy the shop and add a table `lines`, with half of the users in train and a quarter in each other part."""
    path = fixtures.folder() / f"creative-shop-{rule}"
    shutil.copytree(fixtures.dataset(rule).root, path)
    dataset = Dataset.open(path)
    rows, _ = write_by_template(dataset, TemplateRule(least=1))
    rows = rows.append_column("profile", pc.replace_substring(rows["response"], ",", ""))
    of_row = list(split_by_user(rows["raw_user_id"].to_pylist(), (0.5, 0.25, 0.25)))
    parts = {split: rows.filter([one == split for one in of_row]) for split in SPLITS}
    write_table(dataset, "lines", parts, facts={"writer": "template"})
    return dataset


@cache
def country_table(name: str) -> None:
    """Add a table whose texts name the user's country (name "countries"), or a random country (any other name)."""
    dataset, random = shop(), np.random.default_rng(0)
    rows: dict[str, list[Any]] = {column: [] for column in ("raw_user_id", "raw_item_id", "timestamp", "response")}
    raw_items = dataset.items["raw_item_id"].to_pylist()
    values, offsets = dataset.feature_ids("user", "country")
    countries = ["", *dataset.feature_values("country").to_pylist()]
    for user, raw in enumerate(dataset.users["raw_user_id"].to_pylist(), start=1):
        events = dataset.user_events(user)
        own = values[offsets[user] : offsets[user + 1]]
        for item, second in zip(events.item_ids[1:], events.timestamps[1:] + 1, strict=True):
            if own.size:
                chosen = countries[own[0]] if name == "countries" else str(random.choice(fixtures.COUNTRIES))
                for column, value in zip(rows, (raw, raw_items[item - 1], int(second), chosen), strict=True):
                    rows[column].append(value)
    of_row = np.array(list(split_by_user(rows["raw_user_id"], (0.5, 0.2, 0.3))))
    parts = {split: pa.table(rows).filter(pa.array(of_row == split)) for split in SPLITS}
    write_table(dataset, name, parts)


def settings(**more: Any) -> dict[str, Any]:
    """Settings of `training_fixtures.config` for a run with creatives."""
    found = {
        "data__dataset": shop().root,
        "objective__fusion": "late",
        "creative__enabled": "true",
        "creative__data": "lines",
        "creative__shape": WRITER,
        "creative__tokenizer": tokenizer_dir(),
        "creative__prompt": PROMPT,
        "creative__max_prompt_length": 32,
        "creative__max_response_length": 16,
        "creative__per_batch": 8,
        "creative__soft__dropout": "0.25",
        "creative__losses__match": "0.5",
        "creative__match__width": "8",
        "stages": [{"name": "writer", "epochs": 1, "item_embeddings": "cached"}],
    }
    return found | more
