"""Tables of the experiments with personalized texts on MovieLens that `hllm creatives build` cannot make.

history     E1's table; its column `profile` lists the user's latest likes, for a model without user vectors
interests   E1's table; its column `profile` has the genres with the largest lifts among the latest likes
next        E2's table: the response is the title and year of the next film that the user liked
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Sequence_
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.creative_table import CreativeTable, split_by_user, table_path, write_table
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.visibility import visible_before

RECENT, LEAST = 20, 5
"""Number of latest likes that a text is made from, and minimum number of earlier likes; defaults of `hllm creatives
build`."""
FRACTIONS = (0.7, 0.1, 0.2)
"""Shares of the users in each part; defaults of `hllm creatives build`."""


def add_history(dataset: Dataset, source: str, name: str, columns: Sequence[str] = ("title", "genres")) -> None:
    """Write a copy of the table `source` whose profiles list the user's latest likes, unless it exists."""
    films = _names(dataset, columns)
    _add_profiles(dataset, source, name, lambda recent: "; ".join(films[item] for item in recent))


def add_interests(dataset: Dataset, source: str, name: str, feature: str = "genres") -> None:
    """Write a copy of the table `source` whose profiles are the five values with the largest lifts in the latest likes.

    An existing table is not changed.
    """
    values, offsets = dataset.feature_ids("item", feature)
    labels = ["", *dataset.feature_values(feature).to_pylist()]
    has = np.zeros((offsets.size - 1, len(labels)), bool)
    has[np.repeat(np.arange(offsets.size - 1), np.diff(offsets)), values] = True
    liked = np.concatenate([likes(dataset, user)[0] for user in range(1, dataset.num_users)])
    base = has[liked].mean(0).clip(min=1e-9)

    def interests(recent: Ints) -> str:
        lifts = has[recent].mean(0) / base
        best = np.argsort(-lifts, kind="stable")[:5]
        return ", ".join(labels[value] for value in best if lifts[value] > 0)

    _add_profiles(dataset, source, name, interests)


def _add_profiles(dataset: Dataset, source: str, name: str, describe: Callable[[Ints], str]) -> None:
    """Write a copy of the table `source` with profile = describe(items of the latest likes), unless it exists."""
    if table_path(dataset, name).exists():
        return
    table, parts = CreativeTable.open(dataset, source), {}
    for split in SPLITS:
        part = table.part(split)
        users = {user: likes(dataset, user) for user in np.unique(part.user_ids).tolist()}
        profiles = []
        for user, second in zip(part.user_ids.tolist(), part.timestamps.tolist(), strict=True):
            items, seconds = users[user]
            profiles.append(describe(items[: visible_before(seconds, second)][-RECENT:]))
        column = part.rows.schema.get_field_index("profile")
        parts[split] = part.rows.set_column(column, "profile", pa.array(profiles, pa.string()))
    write_table(dataset, name, parts, facts={"writer": "template", "of": source})


def write_next(dataset: Dataset, name: str, columns: Sequence[str] = ("title", "year")) -> None:
    """Write the table with each user's next liked film as text, unless it exists."""
    if table_path(dataset, name).exists():
        return
    films = _names(dataset, columns)
    rows: dict[str, list[Any]] = {"raw_user_id": [], "raw_item_id": [], "timestamp": [], "response": []}
    raw_items = dataset.items["raw_item_id"].to_pylist()
    for user, raw in enumerate(dataset.users["raw_user_id"].to_pylist(), start=1):
        items, seconds = likes(dataset, user)
        for item, second in zip(items.tolist(), seconds.tolist(), strict=True):
            if visible_before(seconds, second) >= LEAST:
                for column, value in zip(rows, (raw, raw_items[item - 1], second, films[item]), strict=True):
                    rows[column].append(value)
    of_row = np.array(list(split_by_user(rows["raw_user_id"], FRACTIONS)))
    parts = {split: pa.table(rows).filter(pa.array(of_row == split)) for split in SPLITS}
    write_table(dataset, name, parts, facts={"writer": "next liked film"})


def word_tokenizer(dataset: Dataset, folder: Path) -> int:
    """Write a tokenizer of the words and punctuation in the catalogue's texts; returns the size of its vocabulary."""
    split = Sequence_([WhitespaceSplit(), Split(Regex(r"[(),:;.]"), "isolated")])
    known = {"[UNK]": 0, "[END]": 1}
    for name in dataset.manifest["text_columns"]:
        for text in (*dataset.text([name])[name].to_pylist(), "Liked : Next film : Genre : ( ) , ; . Film Genres"):
            for word, _ in split.pre_tokenize_str(text or ""):
                known.setdefault(word, len(known))
    tokenizer = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]").save_pretrained(folder)
    return len(known)


def _names(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """Return the two text columns of each item as "first (second)"; item 0 is the unknown item."""
    first, second = (dataset.text([name])[name].to_pylist() for name in columns)
    return ["", *(f"{a} ({b})" for a, b in zip(first, second, strict=True))]


def likes(dataset: Dataset, user: int) -> tuple[Ints, Ints]:
    """Return (items, seconds) of a user's likes, in order of time."""
    events = dataset.user_events(user)
    liked = np.flatnonzero(events.labels == 1)
    return events.item_ids[liked], events.timestamps[liked]
