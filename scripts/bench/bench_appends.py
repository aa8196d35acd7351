"""Appending a day against preparing that day alone, and reading a year of appends against reading one compacted base.

    python scripts/bench/bench_appends.py [--quick] [--out FILE]

A synthetic shop (1.5 million events of 60,000 users on 20,000 items) gets days of new events, items and users.
`append_<day>_after_<events>` is the time of `prepare --append` for a day of <day> events, with <events> events before
it, / the time of preparing a dataset of that day alone. `append_year` is the same ratio for the mean of all days of a
year, including the merging of appends into the base. `read_train` and `read_test` are the times of opening the dataset
and reading a part after the year of appends / after `dataset compact`, when the events are memory maps without appends
to merge; the cuts of the split have moved to the last two days, as in nightly training. `read_worst_...` are the same
for the version of the year that has the most appended events. `..._beside_parquet` is the time per event after the year
of appends / the time per event of version 1, which reads Parquet sequences, as every dataset without appends does.
Seconds are CPU seconds of the process, because the machine may be shared.
"""

import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import Ratio, alternate, arguments, medians, ratio, report, say, timed

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.manifest import MANIFEST, manifest_path
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.versions import kept_versions

START = 1_700_000_000
DAY = 86_400


class Shop:
    """Writes the tables of a synthetic shop.

    users, items: their numbers before the first day; every day adds 10 items and 50 users.
    """

    def __init__(self, folder: Path, users: int, items: int) -> None:
        self.folder, self.users, self.items = folder, users, items
        self._rng = np.random.default_rng(0)

    def write(self, name: str, events: int, day: int, whole: bool) -> Source:
        """Write a day's tables; return their source.

        whole: write the events of the first `day` days, and all items and users instead of the day's new ones.
        """
        folder = self.folder / name
        folder.mkdir(parents=True)
        first_item, first_user = (0, 0) if whole else (self.items, self.users)
        if not whole:
            self.items, self.users = self.items + 10, self.users + 50
        users, items = self._rng.integers(self.users, size=events), self._rng.integers(self.items, size=events)
        seconds = np.sort(START + day * DAY + self._rng.integers(DAY if not whole else DAY * max(day, 1), size=events))
        rows = zip(users.tolist(), items.tolist(), seconds.tolist(), (items % 2).tolist(), strict=True)
        self._table(folder / "events.csv", "user,item,time,label", (f"u{u},i{i},{t},{y}" for u, i, t, y in rows))
        titles = (f"i{i},The title of item number {i},g{i % 20}" for i in range(first_item, self.items))
        self._table(folder / "items.csv", "item,title,genre", titles)
        self._table(folder / "users.csv", "user,country", (f"u{u},c{u % 30}" for u in range(first_user, self.users)))
        return source_of(folder)

    @staticmethod
    def _table(path: Path, header: str, rows: Any) -> None:
        path.write_text("\n".join([header, *rows]) + "\n")


def source_of(folder: Path) -> Source:
    """The source of the tables in a folder."""
    mapping = {
        "name": "shop",
        "events": {"path": "events.csv", "user": "user", "item": "item", "time": "time", "label": "label"},
        "items": {"path": "items.csv", "item": "item", "text": ["title"], "features": {"genre": None}},
        "users": {"path": "users.csv", "user": "user", "features": {"country": None}},
    }
    (folder / "shop.yaml").write_text(json.dumps(mapping))
    return table(folder / "shop.yaml")


def alone(folder: Path) -> Source:
    """Source of a day's events with only the items and users that occur in them, to prepare the day alone."""
    other = folder.with_name(f"{folder.name}-alone")
    other.mkdir()
    shutil.copy(folder / "events.csv", other)
    rows = [line.split(",") for line in (folder / "events.csv").read_text().splitlines()[1:]]
    items, users = sorted({row[1] for row in rows}), sorted({row[0] for row in rows})
    Shop._table(other / "items.csv", "item,title,genre", (f"{i},The title of item number {i},g{i[-1]}" for i in items))
    Shop._table(other / "users.csv", "user,country", (f"{u},c{u[-1]}" for u in users))
    return source_of(other)


def append_cost(folder: Path, before: int, size: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds, by round, of appending a day of `size` events after `before` events, and of preparing it alone."""
    shop = Shop(folder / f"tables-{before}-{size}", min(60_000, before // 10), min(20_000, before // 20))
    root = prepare(shop.write("base", before, 30, whole=True), folder / f"data-{before}-{size}")
    days = [shop.write(f"day{n}", size, 60 + n, whole=False) for n in range(repeats + 1)]
    single = [alone(source.event_files[0].parent) for source in days]
    at = {"append": 0, "alone": 0}

    def one(side: str) -> None:
        number, at[side] = at[side], at[side] + 1
        if side == "append":
            append_events(days[number], root)
        else:
            prepare(single[number], folder / f"alone-{before}-{size}-{number}")

    return alternate({side: timed(partial(one, side), time.process_time) for side in at}, repeats)


def year(folder: Path, before: int, days: int, size: int) -> tuple[Path, float]:
    """Make a dataset with `days` appends of `size` events; return it and the mean CPU seconds of an append."""
    shop = Shop(folder / "tables-year", min(60_000, before // 10), min(20_000, before // 20))
    root = prepare(shop.write("base", before, 30, whole=True), folder / "data-year")
    spent = 0.0
    for n in range(days):
        source = shop.write(f"day{n}", size, 60 + n, whole=False)
        spent += timed(partial(append_events, source, root), time.process_time)()
    return root, spent / days


def as_of(root: Path, version: int, folder: Path) -> Path:
    """Copy a dataset; the copy's newest version is `version`, with the split cut at the starts of its last two days."""
    shutil.copytree(root, folder)
    manifest = json.loads(manifest_path(root, version).read_text())
    day = (manifest["seconds"][1] - START) // DAY
    manifest["split"] |= {"cut_timestamps": [START + (day - 1) * DAY, START + day * DAY], "cut_orders": [0, 0]}
    for path in (folder / MANIFEST, manifest_path(folder, version)):
        path.write_text(json.dumps(manifest))
    return folder


def most_appended(root: Path) -> int:
    """Number of the version that has the most events in appends."""
    versions = kept_versions(root)
    return max(versions, key=lambda v: (sum(one["events"] for one in versions[v].get("appends", ())), v))


def reading(root: Path, part: str, repeats: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Ratios and median CPU seconds of reading a part: of the second newest version, which has appends, of the newest
    (its compaction), and of version 1."""
    folded = Dataset.open(root).version
    versions = {"appends": folded - 1, "folded": folded, "parquet": 1}
    events = {side: read(root, part, version) for side, version in versions.items()}
    assert events["appends"] == events["folded"]
    sides = {side: timed(partial(read, root, part, version), time.process_time) for side, version in versions.items()}
    times = alternate(sides, repeats)
    per_event = events["parquet"] / events["appends"]
    ratios = {
        "": ratio(times["appends"], times["folded"]),
        "_beside_parquet": ratio(times["appends"], times["parquet"], per_event),
    }
    return ratios, medians(times)


def read(root: Path, part: str, version: int) -> int:
    """Open a version and read a part; returns its number of events."""
    dataset, events = Dataset.open(root, version), 0
    for group in dataset.row_groups(part):
        events += len(dataset.sequences([group]))
    return events


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write the result."""
    options = arguments(__doc__).parse_args(argv)
    repeats = 1 if options.tiny else 3 if options.quick else 7
    sizes = [(2_000, 400)] if options.tiny else [(100_000, 4_000), (1_500_000, 4_000), (1_500_000, 100_000)]
    before, days, size = (2_000, 5, 100) if options.tiny else (1_500_000, 60 if options.quick else 365, 4_000)
    ratios: dict[str, float] = {}
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-appends-") as scratch:
        for events, day in sizes:
            say(f"a day of {day:,} events after {events:,}")
            times = append_cost(Path(scratch), events, day, repeats)
            seconds[f"day_of_{day}_after_{events}"] = medians(times)
            ratios[f"append_{day}_after_{events}"] = ratio(times["append"], times["alone"])
        say(f"{days} appends")
        root, mean = year(Path(scratch), before, days, size)
        alone_seconds = seconds[f"day_of_{sizes[0][1]}_after_{sizes[0][0]}"]["alone"]  # a day of the year's size
        seconds["append_year"] = {"append": mean, "alone": alone_seconds}
        ratios["append_year"] = mean / alone_seconds
        for name, version in (("read", Dataset.open(root).version), ("read_worst", most_appended(root))):
            copy = as_of(root, version, Path(scratch) / name)
            assert compact(copy) is not None
            for part in ("train", "test"):
                found, seconds[f"{name}_{part}"] = reading(copy, part, repeats)
                ratios |= {f"{name}_{part}{kind}": value for kind, value in found.items()}
    shapes = {"before": before, "days": days, "events_a_day": size}
    return report("appends", options, {"ratios": ratios, "shapes": shapes, "cpu_seconds": seconds})


if __name__ == "__main__":
    main(sys.argv[1:])
