"""Withdrawn items (`items.active`): history as before, but no candidates and no negatives; an append withdraws them."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from hllm_torchrec.baselines.retrieval_baselines import ItemToItem, RetrievalBaselinesConfig, measure_baseline
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.histories import read_histories
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.sources.values import parse_flags
from hllm_torchrec.metrics.distributed_ranking import CatalogueShard, distributed_target_ranks
from hllm_torchrec.metrics.retrieval_metrics import target_ranks
from tests.helpers import fixtures
from tests.helpers.source_files import PARTS, sequences

GONE = (3, 5, 8)


def withdraw(root: Path, folder: Path, gone: tuple[int, ...] = GONE) -> Dataset:
    """Append the items of the shop of `fixtures` to a copy of its dataset, with some withdrawn; no new events."""
    mapping = fixtures.write_shop(folder)
    rows = list(csv.reader((folder / "items.csv").open()))
    for number, row in enumerate(rows):
        row.append("on_sale" if number == 0 else ("no" if number in gone else ("" if number % 2 else "yes")))
    with (folder / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    facts = yaml.safe_load(mapping.read_text())
    facts["items"]["active"] = "on_sale"
    mapping.write_text(json.dumps(facts))
    (folder / "events.csv").write_text("\n".join((folder / "events.csv").read_text().splitlines()[:2]) + "\n")
    append_events(table(mapping), root)
    return Dataset.open(root)


def everything(dataset: Dataset) -> dict:
    return {part: sequences(dataset, part) for part in PARTS}


def test_an_append_withdraws_and_another_brings_back(tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "data")
    before = Dataset.open(root)
    dataset = withdraw(root, tmp_path / "shop")
    assert dataset.excluded_items.tolist() == list(GONE) and not before.excluded_items.size
    assert dataset.manifest["added"]["changed_items"] == len(GONE)  # nothing said, or yes: as before
    assert everything(dataset) == everything(before)  # history and targets as they were
    assert compact(root) == dataset.version + 1 and Dataset.open(root).excluded_items.tolist() == list(GONE)
    again = fixtures.write_shop(tmp_path / "plain")
    append_events(table(again), root)  # a source that does not say what is active leaves it
    assert Dataset.open(root).excluded_items.tolist() == list(GONE)
    assert withdraw(root, tmp_path / "back", (5,)).excluded_items.tolist() == [5]


def test_a_first_dataset_has_the_column_only_if_the_mapping_names_it(tmp_path: Path) -> None:
    assert "active" not in fixtures.dataset().items.column_names
    mapping = fixtures.write_shop(tmp_path)
    items = (tmp_path / "items.csv").read_text().splitlines()
    (tmp_path / "items.csv").write_text(
        "\n".join([f"{items[0]},on", *(f"{row},{n > 1}" for n, row in enumerate(items[1:]))])
    )
    facts = yaml.safe_load(mapping.read_text())
    facts["items"]["active"] = "on"
    mapping.write_text(json.dumps(facts))
    assert Dataset.open(prepare(table(mapping), tmp_path / "out")).excluded_items.tolist() == [1, 2]
    facts["items"]["text"] = ["active"]
    mapping.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"items.text has 'active', the name of the column that items.active writes"):
        table(mapping)


def test_flags_are_read_from_bools_numbers_and_words() -> None:
    expected = [True, False, None]
    for values in ([True, False, None], [1, 0, None], [1.0, 0.0, None], ["Yes", " no", ""], ["TRUE", "0", None]):
        assert parse_flags(pa.array(values)).to_pylist() == expected
    with pytest.raises(ValueError, match="'maybe' is none of true, false, 1, 0, yes, no"):
        parse_flags(pa.array(["maybe"]))


def test_a_text_column_of_the_name_is_no_flag(tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "data")
    items = pq.read_table(root / "items.parquet")
    items = items.append_column("active", pa.array(["no"] * len(items)))
    dataset = Dataset(root, Dataset.open(root).manifest)
    dataset.__dict__["items"] = items
    assert not dataset.excluded_items.size


def test_negatives_are_drawn_from_the_others(tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "data")
    before, spec = Dataset.open(root), BatchSpec("none", negatives=6)
    dataset = withdraw(root, tmp_path / "shop")
    drawn = [Collator(dataset, spec).negatives(0, step) for step in range(60)]
    every = set(range(1, dataset.num_items)) - set(GONE)
    assert {item for step in drawn for item in step.tolist()} == every
    assert all(np.unique(step).size == 6 for step in drawn)
    whole = Collator(dataset, BatchSpec("none", negatives=dataset.num_items)).negatives(0, 0)
    assert sorted(whole.tolist()) == sorted(every)
    assert any(set(Collator(before, spec).negatives(0, step).tolist()) & set(GONE) for step in range(60))


def test_ranks_count_candidates_only_and_a_withdrawn_target_still_has_one() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = (torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)) for n in (12, 20))
    targets = torch.from_numpy(rng.integers(1, 12, 20))
    excluded = torch.tensor([2, 7, 9])
    found = distributed_target_ranks(queries, CatalogueShard(vectors, 0, 12, excluded), targets, block_size=5)
    scores = queries @ vectors.T
    for row, target in enumerate(targets.tolist()):
        rivals = [item for item in range(1, 12) if item not in (target, 2, 7, 9)]
        assert int(found[row]) == 1 + sum(bool(scores[row, item] >= scores[row, target]) for item in rivals)
    assert not torch.equal(found, target_ranks(scores.clone(), targets))


def test_retrieval_baselines_rank_among_the_candidates() -> None:
    dataset = fixtures.dataset("leave_one_out")
    test = read_histories(dataset, dataset.row_groups("test"))
    size = dataset.num_items
    popular = ItemToItem(np.zeros((size, size), np.float32), np.arange(size)[::-1].astype(np.float32).copy())
    config = RetrievalBaselinesConfig(positive_only=False, filter_seen=False, ks=(1, 10))
    whole, fewer = (measure_baseline(popular, test, config, np.array(gone, np.int64)) for gone in ((), (1, 2, 3)))
    targets = test.item_ids[test.exposures][test.seen[test.exposures] > 0]
    assert whole["recall@10"] == pytest.approx(np.mean(targets <= 10))
    assert fewer["recall@10"] == pytest.approx(np.mean(targets <= 13))
