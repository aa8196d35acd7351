"""The generated shop a day later: new items, users, and values of features, appended as a version of the dataset."""

from pathlib import Path

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from tests.helpers.fixtures import ITEMS, START, write_shop

NEW_ITEMS = 4
LATER = START + 10**8


def prepare_shop(folder: Path, rule: str = "time") -> Path:
    """Prepare the shop of `fixtures` in `folder` with a split rule; returns the dataset's directory."""
    return prepare(table(write_shop(folder / "shop")), folder / "data", split=rule)


def append_day(folder: Path) -> Dataset:
    """Append events of NEW_ITEMS items by an old and a new user of a new country; returns the new version."""
    shop = folder / "shop"
    lines = [
        f"{user},s{ITEMS + item},{LATER + 60 * item},{1 + item},{1 + item}"
        for user in ("u1", "u99")
        for item in range(NEW_ITEMS)
    ]
    (shop / "events.csv").write_text("customer,sku,second,rating,kind\n" + "\n".join(lines) + "\n")
    items = [f"s{ITEMS + item},word{item} word3,word1,{'musical' if item else 'drama'}" for item in range(NEW_ITEMS)]
    (shop / "items.csv").write_text("sku,title,brand,genres\n" + "\n".join(items) + "\n")
    (shop / "users.csv").write_text("customer,country\nu1,\nu99,es\n")
    append_events(table(shop / "mapping.yaml"), folder / "data")
    return Dataset.open(folder / "data")
