"""The fortnight: its periods follow each other, its trainings are configurations, its means are of what was kept."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.data.sources.table_mapping import table
from tests.helpers.scripts import bench_module

fortnight, shop = bench_module("fortnight"), bench_module("shop")
SIZES = {"days": 9, "first_items": 20, "daily_items": 2, "first_users": 30, "daily_users": 4, "active": 10}


def events(period: object) -> int:
    return sum(len(chunk.table) for chunk in table(period.mapping).events())  # type: ignore[attr-defined]


def test_periods_of_the_shop_are_its_first_days_and_then_one_each(tmp_path: Path) -> None:
    periods = fortnight.shop_periods(tmp_path, 0, SIZES)
    days = list(shop.days(shop.Shop(**SIZES)))
    assert [events(period) for period in periods] == [
        sum(len(day.events) for day in days[: fortnight.FIRST]),
        *(len(day.events) for day in days[fortnight.FIRST :]),
    ]
    for before, period in zip(periods, periods[1:], strict=False):
        assert before.start < before.cut <= before.seconds[-1] < period.start
        share = np.mean(before.seconds >= before.cut)
        assert share == pytest.approx(fortnight.HELD, abs=0.15)


def test_periods_of_a_table_are_its_last_weeks_and_all_before_them(tmp_path: Path) -> None:
    seconds = [*range(0, 40, 4), *range(40, 100, 3)]
    rows = [f"u{n},i{n % 3},{second},{n % 2}" for n, second in enumerate(seconds)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,second,liked", *rows[::-1]]) + "\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"i{n},t{n}\n" for n in range(3)))
    mapping = {
        "name": "tiny",
        "events": {"path": "events.csv", "user": "user", "item": "item", "time": "second", "label": "liked"},
        "items": {"path": "items.csv", "item": "item", "text": ["title"]},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(mapping))
    periods = fortnight.table_periods(tmp_path / "files", tmp_path / "tiny.yaml", 20, 3)
    assert [events(period) for period in periods] == [sum(s < 38 for s in seconds), 6, 7, 7]
    assert sum(map(events, periods)) == len(seconds)
    assert periods[0].start >= 18, "its validation part is of its last period"
    assert all(one.seconds[-1] - one.start < 20 for one in periods)


@pytest.mark.parametrize("world", ["shop", "table"])
def test_every_training_is_a_configuration(tmp_path: Path, world: str) -> None:
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(fortnight.COMMON | fortnight.WORLDS[world]))
    periods = fortnight.shop_periods(tmp_path / "files", 0, SIZES)
    one = fortnight.Fortnight(tmp_path, world, 0, periods, None)
    config = one.config(one.increment(2, tmp_path / "run"))
    assert config.start_from_optimizer and config.data.train_since == periods[0].cut
    assert config.stages[0].epochs == 1 < one.config({}).stages[0].epochs
    assert load_config(["--config", str(tmp_path / "common.yaml")]).objective.fusion == "early"


def test_the_summary_compares_what_was_measured() -> None:
    results = {}
    for number, shift in ((2, 0.0), (3, 0.1)):
        for arm, auc in zip(fortnight.ARMS, (0.5, 0.62, 0.6, 0.4), strict=True):
            results[number, arm] = {"auc": auc + shift}
        for arm, cost in (("nightly", 1), ("scratch", 10)):
            results[number, f"train {arm}"] = {"samples": cost, "cpu_seconds": 2 * cost}
    found = fortnight.summary(results)
    assert found["periods"] == 2 and found["auc"]["nightly"] == 0.67 and found["least_auc"]["stale"] == 0.5
    assert found["nightly_minus_scratch"] == 0.02 and found["nightly_minus_stale"] == 0.12
    assert found["share_of_samples"] == found["share_of_cpu_seconds"] == 0.1
