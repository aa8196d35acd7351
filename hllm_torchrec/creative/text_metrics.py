"""Metrics of generated texts: overlap with reference texts, and diversity.

    ROUGE-n = F1 of the n-grams that two texts share        ROUGE-L = F1 of their longest common subsequence of words

Words are compared without case and accents. (The package `rouge-score` is not used, because it drops all letters
outside of ASCII, and depends on nltk.)
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hllm_torchrec.creative.support import words
from hllm_torchrec.creative.titles import Creatives


def rouge_n(text: str, reference: str, n: int = 1) -> float:
    """Return ROUGE-n, the F1 of the common n-grams of two texts; 0 if one of them has no n-gram."""
    own, other = (Counter(_n_grams(one, n)) for one in (text, reference))
    return _f1(sum((own & other).values()), sum(own.values()), sum(other.values()))


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L, the F1 of the longest common subsequence of the words of two texts."""
    own, other = _n_grams(text, 1), _n_grams(reference, 1)
    longest = np.zeros(len(other) + 1, np.int64)
    for word in own:
        above = longest.copy()
        for at, known in enumerate(other):
            longest[at + 1] = above[at] + 1 if word == known else max(above[at + 1], longest[at])
    return _f1(int(longest[-1]), len(own), len(other))


def _f1(common: int, own: int, other: int) -> float:
    return 2 * common / (own + other) if common else 0.0


def _n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    found = [word.casefold() for word in words(text)]
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of distinct n-grams of texts divided by the number of all their n-grams; NaN if there are
    none."""
    found = [gram for text in texts for gram in _n_grams(text, n)]
    return len(set(found)) / len(found) if found else float("nan")


def diversity(items: Sequence[str], clusters: Sequence[int], texts: Sequence[str]) -> dict[str, float]:
    """Compute the diversity of each item's titles for clusters, and average over the items.

    Args:
        items, clusters, texts: item, cluster (-1: null title) and text of each title.

    Returns:
        distinct_1, distinct_2: see `distinct`; most_frequent: share of an item's titles that equal its most frequent
        one; equal_to_null: share of titles that equal the item's null title. NaN if no item has titles for clusters.
    """
    of_item: dict[str, list[str]] = defaultdict(list)
    null: dict[str, str] = {}
    for item, cluster, text in zip(items, clusters, texts, strict=True):
        if cluster < 0:
            null[item] = text
        else:
            of_item[item].append(text)
    rows = [
        (
            distinct(own, 1),
            distinct(own, 2),
            max(Counter(own).values()) / len(own),
            sum(text == null.get(item) for text in own) / len(own),
        )
        for item, own in of_item.items()
    ]
    means = np.array([np.nanmean(column) if len(column) else np.nan for column in np.array(rows).reshape(-1, 4).T])
    names = ("distinct_1", "distinct_2", "most_frequent", "equal_to_null")
    return dict(zip(names, means.tolist(), strict=True))


def describe_titles(creatives: Creatives) -> dict[str, Any]:
    """Return the number of titles, the share that was replaced by the item's source text, and the `diversity`."""
    columns = {name: creatives.titles[name].to_pylist() for name in ("raw_item_id", "cluster", "text")}
    fallbacks = creatives.titles["fallback"].to_numpy(zero_copy_only=False)
    return {
        "titles": len(creatives),
        "fallbacks": float(fallbacks.mean()) if fallbacks.size else 0.0,
        **diversity(*columns.values()),
    }
