"""A tiny shop whose days are nights' exports, and the files of `hllm nightly` for it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import nightly
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module
from tests.helpers.training_fixtures import ITEM_LLAMA

shop = bench_module("shop")
SHOP = shop.Shop(days=5, first_items=24, daily_items=2, first_users=30, daily_users=3, active=20)


@dataclass(frozen=True)
class World:
    """A shop's files, a dataset of its first two days, and the configuration of its nights, `day-03` and later."""

    root: Path

    @property
    def nights(self) -> Path:
        return self.root / "nights"

    @property
    def dataset(self) -> Path:
        return self.root / "data"

    def copy(self, root: Path) -> "World":
        """A copy in another folder, of which night.yaml says so."""
        copied = World(shutil.copytree(self.root, root, symlinks=True))
        copied.configure()
        return copied

    def words(self, night: str, *more: str) -> list[str]:
        """Arguments of `hllm nightly`."""
        return ["--config", str(self.root / "night.yaml"), "--night", night, *more]

    def state(self, night: str) -> dict[str, dict[str, Any]]:
        """What the steps of a night have done."""
        text = (self.nights / "nights" / night / "state.json").read_text()
        done: dict[str, dict[str, Any]] = json.loads(text)["done"]
        return done

    def run(self, night: str) -> None:
        """Run a night, which must pass."""
        status = nightly.main(self.words(night))
        assert status == 0, f"{night}: exit status {status}"

    def configure(self, **sections: Any) -> Path:
        """Write night.yaml, with values that replace the standard ones."""
        night = {
            "folder": str(self.nights),
            "dataset": str(self.dataset),
            "append": {"path": str(self.root / "{night}.yaml")},
            "training": str(self.root / "train.yaml"),
            "increment": {"optim.lr": 0.002},
            "held_out": 0.4,
            "gate": {"max_drop": 1.0},
        }
        path = self.root / "night.yaml"
        path.write_text(yaml.safe_dump(night | sections))
        return path


TRAINING = {
    "data": {"max_history": 32, "batch_users": 8, "item_features": ["genres"], "user_features": ["country"]},
    "item_llm": {
        "shape": ITEM_LLAMA,
        "text_keys": ["title"],
        "max_text_length": 10,
        "trainable": False,
    },
    "user": {"encoder": "sasrec", "shape": {"width": 16, "layers": 1, "heads": 2, "max_positions": 32}},
    "features": {"time_depth": 0, "shard_from_rows": 20, "init_scale": 0.1},
    "objective": {"fusion": "early", "head_hidden": 8, "collapse_above": 1},
    "stages": [{"name": "all", "epochs": 1, "item_embeddings": "cached"}],
    "optim": {"lr": 0.005},
}


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a world before its first night."""
    return begin(tmp_path_factory.mktemp("world"))


def begin(root: Path) -> Path:
    """Write the files of a world before its first night into a folder, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    for day in shop.days(SHOP):
        shop.write_day(day, root)
        shop.write_mapping(root, f"day-{day.number:02d}", f"day-{day.number:02d}.csv")
    with (root / "events" / "day-04.csv").open("a") as file:  # of the third day, a day late
        file.write(f"u1,i1,{shop.START + 2 * shop.DAY + 6 * 3600},1,click,0,0,1\n")
    prepare(table(shop.write_mapping(root, "first", "day-0[12].csv")), root / "data")
    training = {**TRAINING, "item_llm": {**TRAINING["item_llm"], "tokenizer": str(fixtures.tokenizer_dir())}}
    (root / "train.yaml").write_text(yaml.safe_dump(training))
    return root


@pytest.fixture(scope="session")
def after_one(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world after the night of its third day."""
    return next_night(World(begun), tmp_path_factory.mktemp("one") / "world", "day-03")


@pytest.fixture(scope="session")
def after_two(after_one: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world after the nights of its third and fourth day."""
    return next_night(after_one, tmp_path_factory.mktemp("two") / "world", "day-04")


def next_night(before: World, root: Path, name: str) -> World:
    """A copy of a world, in another folder, with one more night."""
    world = before.copy(root)
    try:
        assert nightly.main(world.words(name)) == 0
    finally:
        destroy_distributed()
    return world
