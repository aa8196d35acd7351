"""A tiny shop whose days are nights' exports, and the files of `hllm nightly` for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
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
    root = tmp_path_factory.mktemp("world")
    for day in shop.days(SHOP):
        shop.write_day(day, root)
        shop.write_mapping(root, f"day-{day.number:02d}", f"day-{day.number:02d}.csv")
    prepare(table(shop.write_mapping(root, "first", "day-0[12].csv")), root / "data")
    training = {**TRAINING, "item_llm": {**TRAINING["item_llm"], "tokenizer": str(fixtures.tokenizer_dir())}}
    (root / "train.yaml").write_text(yaml.safe_dump(training))
    return root


@pytest.fixture
def world(begun: Path, tmp_path: Path, copy: Callable[[Path, Path], Path]) -> World:
    """A world of this test's own."""
    return World(copy(begun, tmp_path / "world"))


@pytest.fixture(scope="session")
def copy() -> Callable[[Path, Path], Path]:
    """Copy a folder, links as links."""
    import shutil

    return lambda source, target: shutil.copytree(source, target, symlinks=True)
