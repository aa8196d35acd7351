"""The benchmark of retrieval: budgets of the trials, groups of targets, and what is resumed."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.config.loading import load_config
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module


@pytest.fixture
def script() -> ModuleType:
    return bench_module("benchmark_retrieval")


def test_every_trial_is_a_valid_configuration_and_no_model_has_more_than_four(script: ModuleType) -> None:
    chosen = ("--stages=[{name: one, epochs: 1}]",)
    for trials in script.MODELS.values():
        assert 1 <= len(trials) <= 4
        for options in trials:
            config = load_config(["--config", str(script.RECIPE), *chosen, *options])
            assert config.item_llm.enabled == ("--item_llm.enabled=false" not in options)


def write_ranks(folder: Path, rank: np.ndarray, items: np.ndarray) -> None:
    folder.mkdir(parents=True)
    columns = {"user_id": np.arange(rank.size), "position": np.zeros(rank.size, np.int64), "item_id": items}
    pq.write_table(pa.table({**columns, "rank": rank}), folder / "part-00000.parquet")


def test_what_is_complete_is_tabulated_by_the_items_number_of_events(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, folder = fixtures.dataset("leave_one_out"), tmp_path / "out" / "shop"
    (tmp_path / "shop").symlink_to(dataset.root)
    counts = dataset.training_item_counts()
    items = np.arange(1, dataset.num_items)
    write_ranks(folder / "popularity" / "retrieval" / "test", np.full(items.size, 20), items)
    for seed, rank in ((0, 1), (1, 1)):
        write_ranks(folder / "text_id" / f"seed-{seed}" / "retrieval" / "test", np.full(items.size, rank), items)
    arguments = ["--sets", str(tmp_path / "shop"), "--output", str(tmp_path / "out"), "--done"]
    assert script.main([*arguments, "--references", "popularity"]) == 0
    found = json.loads((tmp_path / "out" / "retrieval.json").read_text())["shop"]
    assert found["models"]["text_id"]["recall@10"]["mean"] == 1 and found["seeds"] == {"popularity": 1, "text_id": 2}
    assert found["minus"]["popularity"]["text_id"]["ndcg@10"]["mean"] == pytest.approx(1)
    groups = found["groups"]["text_id"]
    rare = int(((counts[items] >= 1) & (counts[items] <= 5)).sum())
    assert groups["items with 1-5 training events"]["targets"] == rare
    assert groups["items with 0 training events"]["targets"] == int((counts[items] == 0).sum())
    assert "text_id" in capsys.readouterr().out


def test_users_whose_last_two_events_have_one_second_are_those_of_the_dataset(script: ModuleType) -> None:
    dataset = fixtures.dataset("leave_one_out")
    rows = dataset.sequences(dataset.row_groups("test"), ["user_id", "timestamps"])
    naive = []
    for user, start, end in zip(rows.user_ids, rows.offsets[:-1], rows.offsets[1:], strict=True):
        times = rows.timestamps[start:end]
        if len(times) > 1 and times[-1] == times[-2]:
            naive.append(user)
    assert sorted(script.tie_at_the_end(dataset)) == sorted(naive)


def test_the_validation_figure_of_a_run_is_its_best_evaluation(script: ModuleType, tmp_path: Path) -> None:
    lines = [{"event": "eval", "step": i, "ndcg@10": x, "recall@10": 2 * x} for i, x in enumerate((0.1, 0.3, 0.2))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert script.validation(tmp_path) == {"step": 1, "ndcg@10": 0.3, "recall@10": 0.6}
