"""What remedies are tried on: a source, a dataset, a run with stores and predictions; command lines in this process."""

import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.cli import main
from tests.docs.messages import GAP
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config, train


@cache
def world() -> Path:
    """A source with its mapping, a dataset, a run with its predictions and stores, and rows of predictions."""
    root = fixtures.folder() / "remedies"
    fixtures.write_shop(root / "shop")
    _other_sources(root / "shop")
    shutil.copytree(fixtures.dataset().root, root / "data")
    rng, n = np.random.default_rng(0), 80
    table = pa.table({
        "label": (rng.random(n) < 0.5).astype(float), "score": rng.normal(size=n), "other": rng.normal(size=n),
        "logit": rng.normal(size=n) * 9, "probability": rng.random(n), "user_id": rng.integers(0, 9, n),
        "item_id": rng.integers(0, 9, n), "timestamp": 10**18 + np.arange(n),
    })  # fmt: skip
    pq.write_table(table.drop_columns(["timestamp"]), root / "rows.parquet")
    pq.write_table(table, root / "timed.parquet")
    pq.write_table(table.drop_columns(["timestamp"])[:70], root / "fewer.parquet")
    pq.write_table(table.select(["label", "score"]), root / "bare.parquet")
    pq.write_table(table.rename_columns([name.replace("label", "clicked") for name in table.column_names]),
                   root / "clicked.parquet")  # fmt: skip
    pq.write_table(table.select(["user_id", "item_id", "label"]).rename_columns(["who", "what", "label"]),
                   root / "named.parquet")  # fmt: skip
    (root / "full").mkdir()
    (root / "full" / "note").write_text("mine\n")
    return root


def _other_sources(shop: Path) -> None:
    """Mappings of the same shop without a feature, with half of its events, and with rows without a time."""
    mapping, events = (shop / "mapping.yaml").read_text(), pa.csv.read_csv(shop / "events.csv")
    other = yaml.safe_load(mapping)
    del other["items"]["features"]
    (shop / "other.yaml").write_text(yaml.safe_dump(other))
    (shop / "other_half.yaml").write_text((shop / "other.yaml").read_text().replace("events.csv", "half.csv"))
    (shop / "items.json").write_text('{"asin": "s1", "title": "a book"}\n')
    seconds = events["second"].to_pylist()
    for name, kept, bad in (("half", 0.5, 0), ("one_bad", 1, 1), ("bad", 1, len(seconds) // 2)):
        column = pa.array([None] * bad + seconds[bad:])
        table = events.set_column(events.column_names.index("second"), "second", column)
        pa.csv.write_csv(table[: int(kept * len(table))], shop / f"{name}.csv")
        (shop / f"{name}.yaml").write_text(mapping.replace("events.csv", f"{name}.csv"))


@cache
def run() -> Path:
    """A trained run, with stores of its items and users."""
    root = world()
    settings = {"data__dataset": root / "data", "objective__generative_weight": 0.1, "max_steps": 2}
    train(config(root / "run", **settings))
    destroy_distributed()
    say("embed", f"--run {root}/run --checkpoint latest --items {root}/items --users {root}/users")
    return root / "run"


def say(command: str, words: str) -> int:
    """Run a command line in this process; its exit status."""
    try:
        return main([command, *words.split()])
    except SystemExit as left:
        return int(left.code or 0)


def pattern(part: str) -> str:
    """Regular expression of the messages with this part."""
    return re.escape(part).replace(GAP, "(?s:.*)")
