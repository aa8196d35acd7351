"""Stage III end to end: user vectors of exposures in a store, the DLRM's rows with and without them, the table."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.histories import rank_row_groups, read_histories
from hllm_torchrec.data.predictions import read_predictions
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.downstream.comparison import VectorData, check_stores
from hllm_torchrec.downstream.dlrm_config import DLRMConfig, DownstreamConfig
from hllm_torchrec.downstream.plugin import VectorLookup
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.inference.exposure_store import ExposureLookup, exposure_content_hashes, exposure_keys
from hllm_torchrec.inference.exposure_vectors import exposure_vectors
from hllm_torchrec.launch import downstream, embed, exposures
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module
from tests.helpers.training_fixtures import config, train

SMALL = DLRMConfig(width=4, bottom=(8,), top=(8,), batch=64, epochs=2, shard_from_rows=30, user_id=False)


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages I and II on the shop by their commands, the stores of stage III, and the DLRM's rows."""
    root = tmp_path_factory.mktemp("stages")
    options = {"evaluation__batch_users": 24, "features__init_scale": 0.5, "data__history": "all"}
    train(config(root / "1", stages=[{"name": "I", "epochs": 0.5}], **options))
    destroy_distributed()
    assert embed.main(["--run", str(root / "1"), "--items", str(root / "texts")]) == 0
    stored = [{"name": "II", "epochs": 0.5, "item_embeddings": "stored"}]
    more = {"start_from": str(root / "1"), "item_llm__store": str(root / "texts")}
    train(config(root / "2", stages=stored, **more, **options))
    destroy_distributed()
    stores = ["--users", str(root / "users"), "--items", str(root / "items")]
    assert exposures.main(["--run", str(root / "2"), *stores]) == 0
    assert downstream.main(arguments_of(root)) == 0
    return root


def arguments_of(root: Path) -> list[str]:
    stores = [
        "--item_store",
        str(root / "items"),
        "--user_stores",
        f"[{root / 'users' / 'nearline'},{root / 'users' / 'daily'}]",
    ]
    sizes = ["--dlrm.epochs", "1", "--dlrm.batch", "64", "--dlrm.shard_from_rows", "30", "--dlrm.width", "4"]
    return ["--dataset", str(fixtures.dataset().root), "--output", str(root / "3"), *stores, *sizes]


@pytest.mark.slow
def test_every_row_scores_the_same_exposures_and_is_reused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["alone", "items", "users_nearline", "both_nearline", "users_daily", "both_daily"]
    scored = {row: read_predictions(chain / "3" / row / "predictions" / "test") for row in rows}
    for one in scored.values():
        assert np.array_equal(one.position, scored["alone"].position)
        assert np.array_equal(one.label, scored["alone"].label)
    assert len({tuple(one.score) for one in scored.values()}) == len(rows)
    assert downstream.main(arguments_of(chain)) == 0
    printed = capsys.readouterr().out
    assert printed.count("reused, same data and settings") == len(rows)
    assert "difference to alone" in printed


@pytest.mark.slow
def test_the_store_has_the_vector_of_every_exposure_and_marks_those_without(chain: Path) -> None:
    loaded = load_run(chain / "2", "best", init_distributed())
    for mode in ("nearline", "daily"):
        lookup, known = ExposureLookup(chain / "users" / mode), 0
        with loaded.weights:
            parts = list(exposure_vectors(loaded.experiment, "test", mode))
        for part in parts:
            found = lookup(part.user_id, part.position, part.item_id, part.timestamp)
            torch.testing.assert_close(found[:, :-1], part.users, atol=2e-3, rtol=2e-3)  # fp16
            assert torch.equal(found[:, -1] == 0, part.has_user)
            known += int(part.has_user.sum())
        assert known > 20


@pytest.mark.slow
def test_item_features_are_what_the_head_reads(chain: Path) -> None:
    loaded = load_run(chain / "2", "best", init_distributed())
    experiment, lookup = loaded.experiment, VectorLookup(chain / "items")
    raw_ids = experiment.dataset.items["raw_item_id"].to_pylist()
    with loaded.weights, torch.no_grad():
        batch = next(experiment.loader("test", 8).batches(0))
        targets = experiment.hllm.slot_features(batch, experiment.hllm.item_embeddings(batch.unique_items))[2]
    found = lookup([raw_ids[item - 1] for item in batch.target_items.tolist()])
    torch.testing.assert_close(found[:, :-1], targets, atol=2e-2, rtol=2e-3)
    assert lookup.num_unknown == 0


@pytest.mark.slow
def test_the_table_of_the_script_has_every_row_with_its_intervals(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seed-0").mkdir()
    for name in ("3", "users"):
        (tmp_path / "seed-0" / name).symlink_to(chain / name)
    script = bench_module("three_stages")
    assert script.main(["--output", str(tmp_path), "--seeds", "0", "--draws", "20", "--fallback"]) == 0
    found = json.loads((tmp_path / "three_stages.json").read_text())["test"]
    alone = read_predictions(chain / "3" / "alone" / "predictions" / "test")
    assert found["alone"]["auc"] == pytest.approx(script.auc(alone))
    assert found["alone"]["difference"] == 0 and list(found)[:2] == ["alone", "items"]
    low, high = found["both_nearline"]["difference_interval"]
    assert low <= high
    assert "| both_daily |" in capsys.readouterr().out
    scored, rows = script.read_rows(tmp_path, [0], "test")
    (name,) = [row for row in script.fall_back(tmp_path, scored, rows, [0]) if row.startswith("both")]
    own, base, mixed = (scored[row, 0].score for row in ("both_daily", "alone", name))
    _, known = (
        EmbeddingStore.open(chain / "users" / "daily")
        .snapshot()
        .content_hashes(exposure_keys(alone.user_id, alone.position))
    )
    assert known.any() and np.array_equal(mixed, np.where(known, own, base))
    assert found[name]["auc"] == pytest.approx(script.auc(scored[name, 0]))
    assert np.array_equal(script.has_daily_vector(tmp_path, 0, alone), known)
    covered, uncovered = (script.restrict(scored, rows)[name, 0] for rows in (known, ~known))
    assert np.array_equal(covered.score, own[known]) and np.array_equal(uncovered.score, base[~known])
    assert np.array_equal(covered.position, alone.position[known]) and covered.user_id.size == known.sum()
    with pytest.raises(ValueError, match="run scripts/experiments/three_stages.sh for all seeds first"):
        script.main(["--output", str(tmp_path), "--seeds", "0", "1"])


def make_stores(folder: Path, dataset: Dataset, split: str, width: int = 3) -> tuple[torch.Tensor, np.ndarray]:
    """Stores of items and of every second exposure of a split; returns the exposures' vectors and which have one."""
    names = dataset.items["raw_item_id"].to_pylist()
    items = EmbeddingStore.create(folder / "items", 2, "fp32")
    histories = read_histories(dataset, rank_row_groups(dataset, split))
    events = histories.exposures
    users = histories.user_ids[histories.row_of_event[events]]
    vectors = torch.randn(events.size, width, generator=torch.Generator().manual_seed(0))
    known = np.arange(events.size) % 2 == 0
    store = EmbeddingStore.create(folder / "users", width, "fp32", "int64", {"part": "exposures"})
    for target, keys, values, marks in (
        (items, names, torch.arange(2.0 * len(names)).reshape(-1, 2), None),
        (
            store,
            exposure_keys(users, histories.position[events])[known],
            vectors[known],
            exposure_content_hashes(histories.item_ids[events], histories.timestamps[events])[known],
        ),
    ):
        with target.writer() as writer:
            writer.upsert(keys, values, marks)
            writer.commit()
    return vectors, known


def test_batches_have_the_vectors_of_their_own_items_and_exposures(tmp_path: Path) -> None:
    dataset = fixtures.dataset()
    vectors, known = make_stores(tmp_path, dataset, "test")
    data = VectorData(dataset, SMALL, str(tmp_path / "items"), str(tmp_path / "users"))
    (window,) = data.windows("test")
    rows = np.array([4, 1, 0, 7])
    batch = data.batch(window, rows)
    items = window.histories.item_ids[window.histories.exposures[rows]]
    numbers = len(SMALL.numeric_features)
    of_items, of_users = batch.dense_features[:, numbers : numbers + 3], batch.dense_features[:, numbers + 3 :]
    assert data.widths == [2, 3] and torch.equal(
        batch.dense_features[:, :numbers], torch.from_numpy(window.numeric[rows])
    )
    assert of_items.tolist() == [[2.0 * (i - 1), 2.0 * (i - 1) + 1, 0.0] for i in items]
    assert torch.equal(of_users[:, -1] == 0, torch.from_numpy(known[rows]))
    torch.testing.assert_close(of_users[:, :-1], vectors[rows] * torch.from_numpy(known[rows])[:, None])


def test_a_store_of_other_sequences_is_refused(tmp_path: Path) -> None:
    make_stores(tmp_path, fixtures.dataset(), "test")
    split = Split(hold_out_items=0.5)
    other = Dataset.open(prepare(table(fixtures.write_shop(tmp_path / "shop")), tmp_path / "data", split=split))
    data = VectorData(other, SMALL, None, str(tmp_path / "users"))
    (window,) = data.windows("test")
    with pytest.raises(
        ValueError, match=r"users: event \d+ of user \d+ has another item or second: .* from a run on this one"
    ):
        data.batch(window, np.arange(window.exposures))
    with pytest.raises(ValueError, match="items: a store of None, not of exposures"):
        VectorData(other, SMALL, None, str(tmp_path / "items"))


def test_rows_need_their_stores_and_all_problems_are_reported() -> None:
    config = DownstreamConfig(item_store="a/items", user_stores=("a/x", "b/y"))
    assert list(config.possible_rows()) == ["alone", "items", "users_x", "both_x", "users_y", "both_y"]
    assert config.possible_rows()["both_y"] == ("a/items", "b/y")
    with pytest.raises(ConfigError) as raised:
        DownstreamConfig(user_stores=("a/x", "b/x"), rows=("alone", "both_x"), dlrm=DLRMConfig(width=0))
    assert raised.value.problems == [
        "dlrm.width: 0: must be >= 1",
        "rows: 'both_x': not possible with these stores; there are alone, users_x",
        "user_stores: ['a/x', 'b/x']: two folders of one name; rows are named by them: rename one",
    ]


def test_the_packaged_stage_three_is_the_tuned_dlrm(root: Path) -> None:
    settings = downstream.load_settings(["--config", str(root / "configs" / "stages" / "3.yaml")])
    assert not settings.dlrm.user_id and settings.dlrm.item_dropout == 0.1
    assert list(settings.possible_rows())[-1] == "both_daily"


def test_a_store_of_another_kind_is_refused_before_training(tmp_path: Path) -> None:
    dataset, stores = fixtures.dataset(), {}
    for name, part in (("items", None), ("users", None), ("exposures", "exposures")):
        ids = dataset.items["raw_item_id"] if name == "items" else dataset.users["raw_user_id"]
        facts = {"part": part} if part else {"weights": "w"}
        stores[name] = str(tmp_path / name)
        with EmbeddingStore.create(tmp_path / name, 2, facts=facts).writer() as writer:
            writer.upsert(ids.to_pylist(), torch.ones(len(ids), 2))
            writer.commit()

    def check(items: str | None, users: tuple[str, ...] = ()) -> None:
        check_stores(DownstreamConfig(dataset=str(dataset.root), item_store=items, user_stores=users), dataset)

    check(stores["items"])
    with pytest.raises(ValueError, match=r"exposures: a store of exposures, not of items: see hllm embed --items"):
        check(stores["exposures"])
    with pytest.raises(ValueError, match=r"users: it has none of the first 40 items of .*: give the store that"):
        check(stores["users"])
    with pytest.raises(ValueError, match="items: a store of None, not of exposures"):
        check(stores["items"], (stores["items"],))


def test_commands_name_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exposures.main(["--run", "nowhere"]) == 2
    assert "name a store: --users, --items or both" in capsys.readouterr().err
    assert downstream.main(["--dlrm.widht", "3"]) == 2
    assert "did you mean" in capsys.readouterr().err
