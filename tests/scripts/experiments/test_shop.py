"""The shop of the experiments: a function of its seed, whose days follow each other, and that a dataset is made of."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from tests.helpers.scripts import bench_module

shop = bench_module("shop")
TINY = shop.Shop(days=3, first_items=20, daily_items=2, first_users=30, daily_users=4, active=20)


def test_days_are_a_function_of_the_seed_and_do_not_depend_on_how_many_follow() -> None:
    short, long = list(shop.days(TINY)), list(shop.days(shop.Shop(**{**vars(TINY), "days": 5})))
    assert all(one.events.equals(other.events) for one, other in zip(short, long[:3], strict=True))
    other = next(shop.days(shop.Shop(**{**vars(TINY), "seed": 1})))
    assert not other.events.equals(short[0].events)


def test_every_day_brings_items_and_users_and_its_events_are_its_own() -> None:
    days = list(shop.days(TINY))
    items, users = (pa.concat_tables(getattr(day, kind) for day in days) for kind in ("items", "users"))
    assert items["item"].to_pylist() == [f"i{n}" for n in range(1, 25)] and len(users) == 38
    for day in days:
        events = day.events
        seconds = events["second"].to_numpy()
        assert (np.diff(seconds) >= 0).all() and seconds.min() >= day.start and seconds.max() < day.start + shop.DAY
        pages = events.group_by(["user", "second"]).aggregate([("item", "count"), ("item", "count_distinct")])
        assert pages["item_count"].to_pylist() == pages["item_count_distinct"].to_pylist()
        click, like, watch = (events[name].to_numpy() for name in ("click", "like", "watch_seconds"))
        assert not like[click == 0].any() and not watch[click == 0].any() and like.any()
        if day.number > 1:
            assert set(day.users["user"].to_pylist()) <= set(events["user"].to_pylist())


def test_genres_and_likes_decide_more_than_chance() -> None:
    day = next(shop.days(shop.Shop(days=1)))
    quality = {}
    for item, click in zip(day.events["item"].to_pylist(), day.events["click"].to_pylist(), strict=True):
        quality.setdefault(item, []).append(click)
    score = [np.mean(quality[item]) for item in day.events["item"].to_pylist()]
    assert roc_auc_score(day.events["click"].to_numpy(), score) > 0.6


def test_its_files_are_prepared(tmp_path: Path) -> None:
    for day in shop.days(TINY):
        shop.write_day(day, tmp_path)
    mapping = shop.write_mapping(tmp_path, "two", "day-0[12].csv")
    counts = Dataset.open(prepare(table(mapping), tmp_path / "data")).manifest["counts"]
    assert counts["items"] == 22 and 0 < counts["users"] <= 34
