"""Facts of a dataset from which a recipe derives its settings (`config.recipes.DatasetFacts`), read in seconds."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.config.recipes import DatasetFacts
from hllm_torchrec.data.dataset import Dataset

SAMPLED_ITEMS = 10_000
"""Maximum number of items, evenly spaced, whose texts are measured."""


def dataset_facts(dataset: Dataset) -> DatasetFacts:
    """Measure a dataset: sizes, labels, texts and features."""
    manifest, train = dataset.manifest, dataset.manifest["parts"].get("train") or _train_part(dataset)
    positives = int(train.get("positives", 0))
    exposures = int(train.get("exposures", train.get("events", 0)))
    values = dataset.action_values
    return DatasetFacts(
        users=int(train.get("users", 0)),
        items=dataset.num_items - 1,
        exposures=exposures,
        labels=(exposures - positives, positives),
        graded=np.unique(values[~np.isnan(values)]).size > 1,
        words=_words(dataset),
        item_features={name: int(facts["size"]) for name, facts in manifest["item_features"].items()},
        user_features={name: int(facts["size"]) for name, facts in manifest["user_features"].items()},
        split=str(manifest["split"]["rule"]),
    )


def _train_part(dataset: Dataset) -> dict[str, int]:
    """Counts of the training part of a version with appends, whose manifest has no `parts`: read from the events."""
    labels = [events.labels for events in dataset.recent("train", 0, ["labels"])]
    exposures = sum(int(np.count_nonzero(~np.isnan(each))) for each in labels)
    positives = sum(int(np.count_nonzero(each > 0)) for each in labels)
    users = sum(group.rows for group in dataset.row_groups("train"))
    return {"users": users, "exposures": exposures, "positives": positives}


def _words(dataset: Dataset) -> dict[str, float]:
    """95th percentile of the number of words of each text column over SAMPLED_ITEMS items; 0 if all texts are equal."""
    names = dataset.manifest["text_columns"]
    if not names or dataset.num_items < 2:
        return {}
    texts = dataset.text(names)
    texts = texts.take(np.unique(np.linspace(0, len(texts) - 1, SAMPLED_ITEMS).astype(np.int64)))
    return {name: words_of_most(texts[name]) if len(texts[name].unique()) > 1 else 0.0 for name in names}


_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+"
"""A word; in scripts without spaces between words, each character counts as one, similar to tokenizers."""


def words_of_most(texts: pa.ChunkedArray) -> float:
    """95th percentile of the number of words of texts [n]; null has 0 words."""
    return float(np.percentile(pc.count_substring_regex(pc.fill_null(texts, ""), _WORD).to_numpy(), 95))
