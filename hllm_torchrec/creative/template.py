"""Writer `template`: texts made by a rule from the history, for tests and demonstrations. They are true of the item.

The rule applies to items that a user likes and that have at least two values of a categorical feature (such as genres).
The text names the value of the item with the largest lift among the user's latest likes, and the latest liked item that
has this value (and a name):

    lift(v) = (share of v among the last `recent` likes) / (share of v among all likes of the dataset)

Only likes of strictly earlier seconds are used. Because the texts are made by a rule, a model that reproduces them has
only learned this rule.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.config.creative import PLACEHOLDER
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.visibility import visible_before

UNREADABLE = "an item without a name, or control characters"


@dataclass(frozen=True)
class TemplateRule:
    """Settings of the rule; see the module docstring.

    feature: categorical item feature; name: text column with an item's name; recent: number of latest likes that are
    used; least: minimum number of earlier likes for a text; template: the text, with {value} (the chosen value of the
    feature) and optionally {liked} (the name of the latest liked item that has this value).
    """

    feature: str = "genres"
    name: str = "title"
    recent: int = 20
    least: int = 5
    template: str = "{value}, for fans of {liked}"

    def problems(self, dataset: Dataset) -> Iterator[str]:
        """Yield a message for each setting that is wrong for a dataset."""
        if self.feature not in dataset.manifest["item_features"]:
            known = ", ".join(dataset.manifest["item_features"]) or "none"
            yield f"--feature {self.feature}: no item feature of {dataset.root}; it has {known}"
        if self.name not in dataset.manifest["text_columns"]:
            known = ", ".join(dataset.manifest["text_columns"])
            yield f"--title {self.name}: no text column of {dataset.root}; it has {known}"
        if "{value}" not in self.template:
            yield f"--template {self.template!r}: must have {{value}}: what the text is about"
        for other in dict.fromkeys(PLACEHOLDER.findall(self.template)):
            if other not in ("value", "liked"):
                yield f"--template {self.template!r}: {{{other}}} is neither {{value}} nor {{liked}}"


def write_by_template(dataset: Dataset, rule: TemplateRule) -> tuple[pa.Table, dict[str, int]]:
    """Return rows for a table of texts (`creative_table.SCHEMA`), and the number of likes without a text by reason.

    Raises:
        ValueError: a setting is wrong for the dataset, see `TemplateRule.problems`.
    """
    if problems := list(rule.problems(dataset)):
        raise ValueError("; ".join(problems))
    values, offsets = dataset.feature_ids("item", rule.feature)
    maker = _Maker(rule, values, offsets, _base_shares(dataset, values, offsets), dataset)
    rows: dict[str, list[Any]] = {name: [] for name in ("user", "item", "timestamp", "response")}
    for user in range(1, dataset.num_users):
        maker.add(user, dataset.user_events(user), rows)
    raw_users, raw_items = (dataset.users["raw_user_id"], dataset.items["raw_item_id"])
    table = pa.table(
        {
            "raw_user_id": raw_users.take(pa.array(np.array(rows["user"], np.int64) - 1)),
            "raw_item_id": raw_items.take(pa.array(np.array(rows["item"], np.int64) - 1)),
            "timestamp": pa.array(rows["timestamp"], pa.int64()),
            "response": pa.array(rows["response"], pa.string()),
            "origin": pa.array(["template"] * len(rows["user"])),
        }
    )
    return table, maker.dropped


def _base_shares(dataset: Dataset, values: Ints, offsets: Ints) -> np.ndarray:
    """Compute the share of all likes of the dataset whose item has each value (an item may have several values)."""
    counts, likes = np.zeros(int(values.max(initial=0)) + 1), 0
    for user in range(1, dataset.num_users):
        events = dataset.user_events(user)
        for item in events.item_ids[events.labels == 1]:
            counts[values[offsets[item] : offsets[item + 1]]] += 1
            likes += 1
    return counts / max(likes, 1)


class _Maker:
    def __init__(self, rule: TemplateRule, values: Ints, offsets: Ints, base: np.ndarray, dataset: Dataset) -> None:
        self.rule, self.values, self.offsets, self.base = rule, values, offsets, base
        self.names = ["", *dataset.text([rule.name])[rule.name].to_pylist()]
        self.labels = ["", *dataset.feature_values(rule.feature).to_pylist()]
        self.dropped = {
            "fewer than two values": 0,
            "too few earlier likes": 0,
            "none of the latest likes has a value": 0,
        }

    def _of(self, item: int) -> Ints:
        found: Ints = self.values[self.offsets[item] : self.offsets[item + 1]]
        return found

    def add(self, user: int, events: Events, rows: dict[str, list[Any]]) -> None:
        """Append the texts of one user's likes."""
        liked = events[np.flatnonzero(events.labels == 1)]
        for n in range(len(liked)):
            item, second = int(liked.item_ids[n]), int(liked.timestamps[n])
            before = visible_before(liked.timestamps, second)
            own = self._of(item)
            if own.size < 2:
                self.dropped["fewer than two values"] += 1
            elif before < self.rule.least:
                self.dropped["too few earlier likes"] += 1
            elif (text := self._text(own, liked.item_ids[max(0, before - self.rule.recent) : before])) is None:
                self.dropped["none of the latest likes has a value"] += 1
            elif not text.strip() or not text.isprintable():
                self.dropped[UNREADABLE] = self.dropped.get(UNREADABLE, 0) + 1
            else:
                for name, value in zip(rows, (user, item, second, text), strict=True):
                    rows[name].append(value)

    def _text(self, own: Ints, recent: Ints) -> str | None:
        """Write the text of an item with the values `own`; recent: items of the latest likes, oldest first.

        None if no recent item has one of the values; "" if the template has {liked}, but no recent item with the chosen
        value has a name.
        """
        of_recent = [self._of(int(item)) for item in recent]
        lifts = [sum(int(v in of_item) for of_item in of_recent) / len(recent) / self.base[v] for v in own]
        best = int(np.argmax(lifts))
        if lifts[best] == 0:
            return None
        value = own[best]
        having = (item for item, of_item in zip(recent[::-1], of_recent[::-1], strict=True) if value in of_item)
        liked = next((name for item in having if (name := self.names[int(item)] or "").strip()), "")
        if "{liked}" in self.rule.template and not liked:
            return ""
        texts = {"value": self.labels[value], "liked": liked}
        # A single pass over the template, so that braces in inserted titles are not replaced.
        return PLACEHOLDER.sub(lambda found: texts.get(found[1], found[0]), self.rule.template)
