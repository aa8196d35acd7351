"""Forgetting: a dataset without a user or an item equals one that never had them, in every version, and grows on."""

from pathlib import Path

import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.split import Split
from hllm_torchrec.data.versions import kept_versions
from hllm_torchrec.data.vocabulary import compute_marks, dataset_marks, map_problems
from tests.helpers.source_files import ITEMS, PARTS, memory_source, random_events, sequences

SPLIT = Split("date", train_until=30, valid_until=35)
USER, ITEM = "user-to-forget", "item-to-forget"
CATALOGUE = [*ITEMS, ITEM]


def some_events(seed: int = 0, count: int = 200) -> list[tuple]:
    """Events in which USER and ITEM take part."""
    events = random_events(count, seed=seed)
    named = [(USER if user == "u3" else user, ITEM if item == "i4" else item, *rest) for user, item, *rest in events]
    return list({(e[0], e[1], e[3]): e for e in named}.values())


def make(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A dataset of a base and an append, from events that do not name `without`."""

    def left(events):
        return [e for e in events if e[0] not in without and e[1] not in without]

    every = some_events(count=300)
    base, later = every[:200], every[200:]
    catalogue = [item for item in CATALOGUE if item not in without]
    root = prepare(memory_source(folder / "0", left(base), catalogue), folder / "out", split=SPLIT, partitions=2)
    append_events(memory_source(folder / "1", left(later), catalogue), root)
    return root


def everything(root: Path, version: int | None = None) -> dict:
    return {part: sequences(Dataset.open(root, version), part) for part in PARTS}


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("names", [Names([USER]), Names((), [ITEM]), Names([USER], [ITEM])])
def test_every_version_equals_one_that_never_had_the_ids(tmp_path, names, erase):
    root, other = make(tmp_path / "a"), make(tmp_path / "b", (*names.users, *names.items))
    before = Dataset.open(root)
    report = forget(root, names, erase=erase)
    assert report.version == 3 and report.found["events"] > 2 and list(kept_versions(root)) == [1, 2, 3]
    assert everything(root) == everything(other) == everything(root, 2)
    assert everything(root, 1) == everything(other, 1)
    after = Dataset.open(root)
    assert after.manifest["counts"]["events"] == Dataset.open(other).manifest["counts"]["events"]
    assert after.manifest["counts"]["positives"] == Dataset.open(other).manifest["counts"]["positives"]
    assert (after.num_users, after.num_items) == (before.num_users, before.num_items)
    assert int(after.training_item_counts().sum()) == int(Dataset.open(other).training_item_counts().sum())
    assert compute_marks(after) == dataset_marks(after) == dataset_marks(before)
    assert not map_problems(dataset_marks(before), after, ["items", "users"])
    assert forget(root, names, erase=erase).version is None
