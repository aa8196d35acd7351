"""Groups of a part: read in any order, or on and on, they are the same; whoever reads on is read ahead for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.data import folding
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset, UserGroup
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.merged_sequences import MergedSequences
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.split import Split
from tests.helpers.source_files import ITEMS, memory_source, random_events

SECONDS = 400


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose last two appends overlap in time; its last seconds are valid and test."""
    folder = tmp_path_factory.mktemp("reader")
    events = list({(e[0], e[1], e[3]): e for e in random_events(700, seconds=SECONDS)}.values())
    events.sort(key=lambda event: event[3])
    days = [events[:200], events[200:350], events[350:500], events[500::2], events[501::2]]
    out = prepare(memory_source(folder / "0", days[0], ITEMS), folder / "out", users_per_row_group=2)
    cuts = Split("date", train_until=SECONDS - 40, valid_until=SECONDS - 20)
    for number, day in enumerate(days[1:]):
        last = number + 2 == len(days)
        append_events(memory_source(folder / f"{number + 1}", day, ITEMS), out, split=cuts if last else None)
    return out


def rows_of(dataset: Dataset, group: Any) -> list[tuple[Any, ...]]:
    rows = dataset.sequences([group])
    columns = (
        rows.user_ids,
        rows.target_start,
        rows.offsets,
        rows.item_ids,
        rows.timestamps,
        rows.labels,
        rows.actions,
    )
    return [column.tolist() for column in columns]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_groups_are_the_same_in_any_order(root: Path, part: str) -> None:
    groups = Dataset.open(root).row_groups(part)
    expected = [rows_of(Dataset.open(root), group) for group in groups]
    assert len(groups) > 4
    for order in (range(len(groups)), range(len(groups))[::-1], np.random.default_rng(0).permutation(len(groups))):
        dataset = Dataset.open(root)
        found = {int(number): rows_of(dataset, groups[number]) for number in order}
        assert str([found[number] for number in range(len(groups))]) == str(expected)


def test_whoever_reads_on_is_read_ahead_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], MergedSequences.read

    def counted(self: MergedSequences, users: Any, *rest: Any) -> Any:
        reads.append(len(users))
        return read(self, users, *rest)

    monkeypatch.setattr(MergedSequences, "read", counted)
    dataset = Dataset.open(root)
    groups = dataset.row_groups("train")
    for group in groups:
        dataset.sequences([group])
    assert len(reads) < len(groups) / 2 and reads[:3] == [1, 4, 16] and sum(reads) == sum(g.rows for g in groups)
    del reads[:]
    other = Dataset.open(root)
    for group in groups[::-1]:
        other.sequences([group])
    assert reads == [group.rows for group in groups[::-1]]


def test_tails_are_the_ends_of_the_rows(root: Path) -> None:
    dataset, rng = Dataset.open(root), np.random.default_rng(0)
    for group in dataset.row_groups("valid"):
        assert isinstance(group, UserGroup)
        heads, whole = dataset.heads(group, SECONDS // 2), dataset.sequences([group])
        assert (heads.lengths == whole.lengths).all() and (heads.target_start == whole.target_start).all()
        assert (heads.before == whole.events_before(SECONDS // 2)).all()
        skipped = rng.integers(0, heads.lengths + 1)
        tails = dataset.tails(group, skipped)
        for row, first in enumerate(skipped.tolist()):
            start, end = tails.offsets[row : row + 2]
            rest = slice(whole.offsets[row] + first, whole.offsets[row + 1])
            assert tails.item_ids[start:end].tolist() == whole.item_ids[rest].tolist()
            assert tails.timestamps[start:end].tolist() == whole.timestamps[rest].tolist()
            if first < heads.lengths[row]:
                one, other = (r.cut(row, first, int(heads.lengths[row]), first) for r in (tails, whole))
                assert one.offset == other.offset and one.item_ids.tolist() == other.item_ids.tolist()
        with pytest.raises(AssertionError, match="events that were not read"):
            dataset.tails(group, heads.lengths).cut(0, 0, 1, 0)


def values_of(batch: HybridBatch) -> str:
    tensors = {name: value.tolist() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return str(tensors | {"features": batch.features.values().tolist(), "lengths": batch.features.lengths().tolist()})


@pytest.mark.parametrize("history", [4, 12])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_loader_that_reads_only_what_its_pieces_need_makes_the_same_batches(
    root: Path, part: str, history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tails, skipped_events = Dataset.tails, []

    def noted(self: Dataset, group: Any, skipped: Any, columns: Any = None) -> Any:
        skipped_events.append(int(skipped.sum()))
        return tails(self, group, skipped, columns)

    monkeypatch.setattr(Dataset, "tails", noted)
    found = []
    for whole in (False, True):
        dataset = Dataset.open(root)
        collator = Collator(dataset, BatchSpec(fusion="late", negatives=4), training=part == "train")
        spec = LoaderSpec(part, 3, history, since=SECONDS - 60 if part == "train" else 0, as_requests=part == "test")
        loader = Loader(dataset, collator, spec)
        if whole:
            monkeypatch.setattr(Dataset, "tails", lambda self, group, skipped: self.sequences([group]))
        found.append([values_of(batch) for batch in loader.batches(0)])
    assert found[0] == found[1] and len(found[0]) > 2
    assert history == 12 or sum(skipped_events) > 100


def test_appends_that_outgrow_their_base_become_one_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "LEAST_EVENTS", 50)
    monkeypatch.setattr(folding, "OUTGROWN", 0.5)
    events = list({(e[0], e[1], e[3]): e for e in random_events(400, seconds=SECONDS)}.values())
    out = prepare(memory_source(tmp_path / "0", events[:100], ITEMS), tmp_path / "out")
    plain = prepare(memory_source(tmp_path / "0b", events[:100], ITEMS), tmp_path / "plain")
    appended = []
    for number, first in enumerate(range(100, 220, 40)):
        day = memory_source(tmp_path / f"{number + 1}", events[first : first + 40], ITEMS)
        added = append_events(day, out)
        assert added is not None
        appended.append((added["version"], len(Dataset.open(out).manifest["appends"])))
        with monkeypatch.context() as unlimited:
            unlimited.setattr(folding, "LEAST_EVENTS", 10**9)
            append_events(day, plain)
    # Before the third append two of 40 (folded into one) events had outgrown the base of 100: version 4 is that base.
    assert appended == [(2, 1), (3, 1), (5, 1)]
    assert append_events(day, out) is None and Dataset.open(out).version == 5
    compact(out)
    compact(plain)
    for version in (1, 2, 3):
        assert contents(Dataset.open(out, version)) == contents(Dataset.open(plain, version))
    assert contents(Dataset.open(out, 4)) == contents(Dataset.open(out, 3))
    assert contents(Dataset.open(out)) == contents(Dataset.open(plain)) == contents(Dataset.open(out, 5))


def contents(dataset: Dataset) -> str:
    parts = {part: [rows_of(dataset, group) for group in dataset.row_groups(part)] for part in ("train", "test")}
    return str((parts, dataset.training_item_counts().tolist(), dataset.items_fingerprint, dataset.manifest["counts"]))
