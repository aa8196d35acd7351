"""Synthetic shop: days of impressions with new items and users every day, as one CSV per table and day.

    python scripts/experiments/shop.py --output data/shop-files [--days 14] [--seed 0] [--active 430] [--signals]

Every day some users see a page: up to `slots` items in one second. Some items are clicked; all clicked items are
watched, and some of them are liked. A click depends on the item's genres (its title has words of them), on the genres
that the user likes, on the item's quality and on its position on the page. Likes and watch seconds depend on the
quality and on the match of genres. From day 2, half of the pages show a new item of the day in the last slot (not with
signals). `mapping` returns the mapping for `hllm prepare --source table`.

Columns of events: user, item, second, click (0 or 1), action (click or skip), like (0 or 1), watch_seconds (0 without a
click), position (from 1).

With signals (`--signals`, `scripts/experiments/tasks.py`) a page has a device and an hour, on which clicks depend. An
item can only be clicked if its position was examined, which has the known probability position^-EXAMINED. Pages are
sorted by a noisy quality, so that positions and items are correlated. Likes and watch time depend on separate tastes.
Further columns: device, hour, and relevance, the probability of a click if the position is examined.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml
from jobs import experiment_parser

DAY = 86_400
START = 1_700_006_400
"""2023-11-15 00:00:00 UTC."""
GENRES = {
    "crime": ["murder", "inspector", "alibi", "witness", "shadow", "night"],
    "romance": ["heart", "letters", "promise", "wedding", "kiss", "summer"],
    "space": ["orbit", "colony", "engine", "signal", "comet", "star"],
    "history": ["empire", "siege", "queen", "war", "river", "crown"],
    "garden": ["roses", "soil", "orchard", "herbs", "pond", "seed"],
    "kitchen": ["bread", "salt", "oven", "soup", "feast", "spice"],
}
NAMES = tuple(GENRES)
COUNTRIES = ("de", "fr", "jp", "us")
ACTIONS = ("click", "skip")
DEVICES = ("phone", "desk")
EXAMINED = 0.7
"""Exponent of the probability that a position is examined, position^-EXAMINED."""
MATCH, OFFSET, POSITION = 1.6, -1.3, 0.1
"""Terms of the logit of a click: for a liked genre, the constant, and for each position on the page (subtracted)."""


@dataclass(frozen=True)
class Shop:
    """Sizes of a shop; the defaults are those of the experiments."""

    days: int = 14
    first_items: int = 344
    daily_items: int = 12
    first_users: int = 1350
    daily_users: int = 50
    active: int = 430
    """Number of random users who see a page each day; from day 2, all new users of the day see one, too."""
    slots: int = 6
    seed: int = 0
    signals: bool = False
    """Device, hour, examined positions, and tastes of each label: see the module docstring."""


@dataclass(frozen=True)
class ShopDay:
    """Tables of one day: its events (sorted by second), its new items and its new users."""

    number: int
    events: pa.Table
    items: pa.Table
    users: pa.Table

    @property
    def start(self) -> int:
        """First second of the day, UTC."""
        return START + (self.number - 1) * DAY


def days(shop: Shop) -> Iterator[ShopDay]:
    """Yield the days of a shop, numbered from 1; they depend only on its sizes and seed."""
    rng = np.random.default_rng(shop.seed)
    has_genre, likes = np.empty((0, len(NAMES)), bool), np.empty((0, len(NAMES)), bool)
    quality = np.empty(0)
    tastes = np.random.default_rng((shop.seed, 1)) if shop.signals else None
    adored, watched = np.empty((0, len(NAMES)), bool), np.empty((0, len(NAMES)), bool)
    for number in range(1, shop.days + 1):
        count = shop.first_items if number == 1 else shop.daily_items
        has_genre = np.concatenate([has_genre, _marked(rng, count, rng.choice([1, 1, 2], count))])
        quality = np.concatenate([quality, rng.normal(0, 0.8, count)])
        joined = shop.first_users if number == 1 else shop.daily_users
        likes = np.concatenate([likes, _marked(rng, joined, np.full(joined, 2))])
        new = np.arange(len(likes) - joined, len(likes)) if number > 1 else np.empty(0, np.int64)
        users = np.union1d(rng.choice(len(likes), min(shop.active, len(likes)), replace=False), new)
        items = _items(rng, has_genre, len(has_genre) - count)
        if tastes is None:
            events = _events(rng, shop, number, users, has_genre, likes, quality, count)
        else:
            adored = np.concatenate([adored, _marked(tastes, joined, np.full(joined, 2))])
            watched = np.concatenate([watched, _marked(tastes, joined, np.full(joined, 2))])
            events = _signals(rng, shop, number, users, has_genre, (likes, adored, watched), quality)
        yield ShopDay(number, events, items, _users(rng, len(likes) - joined, joined))


def _marked(rng: np.random.Generator, rows: int, marks: np.ndarray) -> np.ndarray:
    """bool [rows, genres] with `marks` [rows] random genres each."""
    return rng.random((rows, len(NAMES))).argsort(axis=1).argsort(axis=1) < marks[:, None]


def _items(rng: np.random.Generator, has_genre: np.ndarray, first: int) -> pa.Table:
    titles, genres = [], []
    for row in has_genre[first:]:
        own = [name for name, has in zip(NAMES, row, strict=True) if has]
        one, two, three = (rng.choice(GENRES[rng.choice(own)]) for _ in range(3))
        titles.append(f"The {one} and the {two} of {three}")
        genres.append("|".join(own))
    return pa.table({"item": _ids("i", np.arange(first, len(has_genre))), "title": titles, "genres": genres})


def _users(rng: np.random.Generator, first: int, count: int) -> pa.Table:
    ids = _ids("u", np.arange(first, first + count))
    return pa.table({"user": ids, "country": [str(rng.choice(COUNTRIES)) for _ in range(count)]})


def _events(
    rng: np.random.Generator,
    shop: Shop,
    number: int,
    users: np.ndarray,
    has_genre: np.ndarray,
    likes: np.ndarray,
    quality: np.ndarray,
    new_items: int,
) -> pa.Table:
    """A page of each of `users` [U]: events sorted by second, then user, then position."""
    page = rng.integers(0, len(quality), (len(users), shop.slots))
    if number > 1:
        shows_new = rng.random(len(users)) < 0.5
        page[shows_new, -1] = rng.integers(len(quality) - new_items, len(quality), int(shows_new.sum()))
    second = START + (number - 1) * DAY + rng.integers(6 * 3600, 86_000, len(users))
    order = np.argsort(second, kind="stable")
    users, page, second = users[order], page[order], second[order]
    # No item is shown twice on a page: of equal items, only the first is kept.
    by_item = np.argsort(page, axis=1, kind="stable")
    repeated = np.zeros_like(page, bool)
    again = np.diff(np.take_along_axis(page, by_item, axis=1), axis=1) == 0
    np.put_along_axis(repeated, by_item[:, 1:], again, axis=1)
    position = np.cumsum(~repeated, axis=1)
    match = (has_genre[page] & likes[users][:, None, :]).any(axis=2)
    logit = OFFSET + MATCH * match + quality[page] - POSITION * position
    click = rng.random(page.shape) < 1 / (1 + np.exp(-logit))
    like = click & (rng.random(page.shape) < 1 / (1 + np.exp(1.2 - quality[page] - match)))
    watch = np.where(click, rng.exponential(40 * np.exp(0.4 * quality[page] + 0.5 * match)), 0)
    kept = ~repeated
    columns = {
        "user": _ids("u", np.repeat(users, shop.slots).reshape(page.shape)[kept]),
        "item": _ids("i", page[kept]),
        "second": np.repeat(second, shop.slots).reshape(page.shape)[kept],
        "click": click[kept].astype(np.int64),
        "action": np.where(click[kept], *ACTIONS),
        "like": like[kept].astype(np.int64),
        "watch_seconds": watch[kept].round(1),
        "position": position[kept],
    }
    return pa.table(columns)


def _signals(
    rng: np.random.Generator,
    shop: Shop,
    number: int,
    users: np.ndarray,
    has_genre: np.ndarray,
    tastes: tuple[np.ndarray, np.ndarray, np.ndarray],
    quality: np.ndarray,
) -> pa.Table:
    """A page of each of `users` [U] with signals; tastes: bool [users, genres] of clicks, likes and watch time."""
    chosen = np.stack([rng.choice(len(quality), shop.slots, replace=False) for _ in users])
    by_quality = np.argsort(-quality[chosen] + rng.normal(0, 0.8, chosen.shape), axis=1)
    page = np.take_along_axis(chosen, by_quality, axis=1)
    second = np.sort(START + (number - 1) * DAY + rng.integers(6 * 3600, 86_000, len(users)))
    device, hour = rng.integers(0, len(DEVICES), len(users)), (second - START) % DAY // 3600
    position = np.broadcast_to(np.arange(1, shop.slots + 1), page.shape)
    click_match, like_match, watch_match = (
        (has_genre[page] & taste[users][:, None, :]).any(axis=2) for taste in tastes
    )
    # On a phone the first half of the genres is clicked more, on a desk the other; space is clicked more from 18 h.
    half, space = has_genre[page][:, :, : len(NAMES) // 2].any(axis=2), has_genre[page][:, :, NAMES.index("space")]
    logit = -1.0 + MATCH * click_match + quality[page]
    logit += np.where(half == (device == 0)[:, None], 0.6, -0.6) + 0.8 * space * np.where(hour >= 18, 1, -0.5)[:, None]
    relevance = 1 / (1 + np.exp(-logit))
    click = rng.random(page.shape) < relevance * position**-EXAMINED
    like = click & (rng.random(page.shape) < 1 / (1 + np.exp(1.5 - 0.5 * quality[page] - 2.0 * like_match)))
    watch = np.where(click, rng.exponential(20 * np.exp(0.3 * quality[page] + 1.2 * watch_match)), 0)
    columns = {
        "user": _ids("u", np.repeat(users, shop.slots)),
        "item": _ids("i", page.ravel()),
        "second": np.repeat(second, shop.slots),
        "click": click.ravel().astype(np.int64),
        "action": np.where(click.ravel(), *ACTIONS),
        "like": like.ravel().astype(np.int64),
        "watch_seconds": watch.ravel().round(1),
        "position": position.ravel(),
        "device": np.array(DEVICES)[np.repeat(device, shop.slots)],
        "hour": np.repeat(hour, shop.slots),
        "relevance": relevance.ravel().round(6),
    }
    return pa.table(columns)


def _ids(letter: str, numbers: np.ndarray) -> list[str]:
    return [f"{letter}{number + 1}" for number in numbers.tolist()]


SIGNALS: dict[str, Any] = {
    "labels": {
        "click": "binary",
        "like": {"kind": "binary", "given": "click"},
        "watch_seconds": {"kind": "regression", "transform": "log1p", "given": "click"},
    },
    "context": {"device": "categorical", "hour": "categorical", "position": "categorical"},
}
"""Columns of events of a shop with signals, instead of `label`."""


def mapping(events: str, items: str, users: str, signals: bool = False) -> dict[str, Any]:
    """Mapping of the columns for `hllm prepare --source table`; file names are relative to the mapping."""
    return {
        "name": "shop",
        "events": {
            "path": events,
            "user": "user",
            "item": "item",
            "time": "second",
            **(SIGNALS if signals else {"label": "click"}),
            "action": "action",
            "actions": list(ACTIONS),
        },
        "items": {"path": items, "item": "item", "text": ["title"], "features": {"genres": "|"}},
        "users": {"path": users, "user": "user", "features": {"country": None}},
    }


def write_day(day: ShopDay, folder: Path) -> None:
    """Write a day's tables: `folder`/{events,items,users}/day-NN.csv."""
    for kind in ("events", "items", "users"):
        target = folder / kind / f"day-{day.number:02d}.csv"
        target.parent.mkdir(parents=True, exist_ok=True)
        pa.csv.write_csv(getattr(day, kind), target)


def write_mapping(folder: Path, name: str, pattern: str, signals: bool = False) -> Path:
    """Write `folder`/`name`.yaml, the mapping of the files of `pattern`, such as day-0[1-7].csv; returns its path."""
    path = folder / f"{name}.yaml"
    files = (f"{kind}/{pattern}" for kind in ("events", "items", "users"))
    path.write_text(yaml.safe_dump(mapping(*files, signals=signals)))
    return path


def main() -> None:
    """Write the files of all days, and the mapping of each day and of all."""
    parser = experiment_parser(__doc__, None)
    for name in ("days", "seed", "active"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shop, name))
    parser.add_argument("--signals", action="store_true", help="with device, hour, and tastes of each label")
    options = parser.parse_args()
    shop = Shop(days=options.days, seed=options.seed, active=options.active, signals=options.signals)
    for day in days(shop):
        write_day(day, options.output)
        write_mapping(options.output, f"day-{day.number:02d}", f"day-{day.number:02d}.csv", options.signals)
        share = np.mean(day.events["click"].to_numpy())
        print(f"day {day.number}: {len(day.events):,} events, {share:.1%} clicks")
    write_mapping(options.output, "all", "day-*.csv", options.signals)


if __name__ == "__main__":
    main()
