"""Selection of the likes for which a writer is asked for texts, each with the user's earlier likes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.visibility import visible_before


@dataclass(frozen=True)
class Selection:
    """Choice of the likes that get a text.

    title: text column with the titles of items; facts: text columns with facts that a writer may use (None: all except
    title); history: maximum number of earlier likes in a prompt; least: a like gets a text only if it has at least
    this many earlier likes; per_user: number of latest likes of each user that are considered (0: all); users: number
    of users, drawn by a hash of their ids and `seed` (0: all).
    """

    title: str = "title"
    facts: tuple[str, ...] | None = None
    history: int = 50
    least: int = 5
    per_user: int = 1
    users: int = 0
    seed: int = 0

    def problems(self, dataset: Dataset) -> Iterator[str]:
        """Yield a message for each column that a dataset does not have."""
        known = dataset.manifest["text_columns"]
        for option, name in (("--title", self.title), *(("--facts", name) for name in self.facts or ())):
            if name not in known:
                yield f"{option} {name}: no text column of {dataset.root}; it has {', '.join(known)}"


@dataclass(frozen=True)
class Wanted:
    """A like that gets a text.

    raw_user, raw_item: raw ids; second: time of the like, UTC; titles: titles of the earlier likes, oldest first;
    title: the item's title; facts: texts of the item by their columns.
    """

    raw_user: str
    raw_item: str
    second: int
    titles: tuple[str, ...]
    title: str
    facts: dict[str, str]


def wanted_texts(dataset: Dataset, selection: Selection) -> Iterator[Wanted]:
    """Yield the likes that get a text, ordered by user and second. Earlier likes are of strictly earlier seconds.

    Raises:
        ValueError: the dataset lacks a text column.
    """
    if problems := list(selection.problems(dataset)):
        raise ValueError("; ".join(problems))
    names = selection.facts or tuple(name for name in dataset.manifest["text_columns"] if name != selection.title)
    columns = dataset.text(list(dict.fromkeys((selection.title, *names))))
    texts: dict[str, list[str]] = {name: ["", *columns[name].to_pylist()] for name in columns.column_names}
    titles, raw_items = texts[selection.title], ["", *dataset.items["raw_item_id"].to_pylist()]
    for user, raw_user in _users(dataset, selection):
        events = dataset.user_events(user)
        liked = events[np.flatnonzero(events.labels == 1)]
        first = max(0, len(liked) - selection.per_user) if selection.per_user else 0
        for n in range(first, len(liked)):
            item, second = int(liked.item_ids[n]), int(liked.timestamps[n])
            before = visible_before(liked.timestamps, second)
            if before < selection.least or not titles[item].strip():
                continue
            seen = liked.item_ids[max(0, before - selection.history) : before].tolist()
            yield Wanted(
                raw_user,
                raw_items[item],
                second,
                tuple(title for title in (titles[one] for one in seen) if title.strip()),
                titles[item],
                # In the prompt the title is named "title", so a fact from a column of this name gets another name.
                {name if name != "title" else "title (column)": texts[name][item] for name in names},
            )


def _users(dataset: Dataset, selection: Selection) -> list[tuple[int, str]]:
    """Return (id, raw id) of the selected users, in the order of the ids."""
    users = list(enumerate(dataset.users["raw_user_id"].to_pylist(), start=1))
    if selection.users:
        # Not the hash of `split_by_user`: with the same hash, all drawn users would be in the same part.
        users.sort(key=lambda user: hash_json(["build", selection.seed, user[1]]))
        users = sorted(users[: selection.users])
    return users
