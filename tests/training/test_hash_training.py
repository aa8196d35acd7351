"""Models with tables of open vocabularies train, resume, change their number of ranks, and score."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.embedding.hash_tables import take_hash_counts
from hllm_torchrec.embedding.sharding import check_hash_tables
from hllm_torchrec.evaluation.run_loader import load_run, score_run
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.modules.features.hash_tables import HashTable, SetAssociativeIds, start_vector
from hllm_torchrec.serving.scorer import Scorer
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import (
    assert_equal_weights,
    config,
    interrupted,
    lines,
    losses,
    on_rank,
    train,
    weights,
)
from tests.serving.test_scorer import history

HASHED: dict[str, Any] = {
    "features__tables": {
        name: {"kind": "hash", "rows": 1, "evict_after": 3} for name in ("item_id", "genres", "country")
    },
    "features__init_scale": 0.3,
    "evaluation__checkpoint_every": 2,
    "evaluation__keep_last": 100,
    "optim__lr": 0.002,
}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_its_scores_are_those_of_a_scorer(tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole", **HASHED))
    for step in (2, 6):
        run = interrupted(tmp_path / "whole", tmp_path / f"from-{step}", step)
        resumed = train(config(run, resume=True, **HASHED))
        assert losses(run) == losses(tmp_path / "whole")
        assert_equal_weights(weights(resumed), weights(whole))
    counts = lines(tmp_path / "whole", "eval")[-1]["hash_tables"]
    assert counts.keys() == {"item_id", "genres", "country"}
    assert counts["item_id"]["lookups"] > 100 and 20 < counts["item_id"]["filled"] <= fixtures.ITEMS + 1
    assert counts["genres"]["filled"] == counts["genres"]["admitted"] == len(fixtures.GENRES)
    destroy_distributed()
    predictions = score_run(tmp_path / "whole", "test", "latest", init_distributed()).predictions
    assert predictions is not None
    rows = pq.read_table(predictions).to_pylist()[:40]
    by_user = {piece.user_id: piece for piece in fixtures.pieces("test")}
    with Scorer.of_run(tmp_path / "whole", "latest") as scorer:
        for row in rows:
            piece = by_user[row["user_id"]]
            if piece.item_ids.size > 31:
                continue  # longer than the window
            found = scorer.score(history(piece, row["position"]), [row["item_id"]], row["timestamp"])
            assert found[0] == pytest.approx(row["score"], abs=2e-5)


@pytest.mark.slow
def test_the_number_of_ranks_may_change(tmp_path: Path) -> None:
    """2 -> 1 -> 2 ranks, each going on from a checkpoint of the one before: as if they had stayed two."""
    run_ranks(on_rank, 2, config(tmp_path / "whole", data__batch_users=2, **HASHED))
    expected, before = losses(tmp_path / "whole"), tmp_path / "whole"
    rows = filled(before)
    assert len(expected) == 8 and rows["item_id"] > 20
    for step, world in ((2, 1), (4, 2)):
        run = interrupted(before, tmp_path / f"on-{world}", step)
        run_ranks(on_rank, world, config(run, data__batch_users=4 // world, resume=True, **HASHED))
        assert losses(run) == pytest.approx(expected, abs=1e-4), f"{world} ranks from step {step}"
        assert filled(run) == rows
        before = run


def filled(run: Path) -> dict[str, int]:
    return {name: counts["filled"] for name, counts in lines(run, "eval")[-1]["hash_tables"].items()}


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_row_that_changes_hands_begins_anew(optimizer: str, tmp_path: Path) -> None:
    """After training on some ids, others of the same set take their rows: weights and optimizer state begin anew."""
    options = {**HASHED, "optim__table_optimizer": optimizer, "optim__table_lr": 0.5}
    experiment = build_experiment(config(tmp_path / "run", **options), init_distributed())
    tables, hllm = experiment.hllm.features.hashed, experiment.hllm
    assert tables is not None
    (ids,) = (m for name, m in hllm.named_modules() if isinstance(m, SetAssociativeIds) and name.endswith(".item_id"))
    tried = torch.arange(30_000)
    of_set = tried[ids._set_of(ids._hashed(tried)) == 5]
    old, new = of_set[:15], of_set[15:17]

    def read(asked: torch.Tensor) -> torch.Tensor:
        keys = list(HASHED["features__tables"])
        lengths = torch.tensor([1] * asked.numel() + [0] * 2 * asked.numel())
        pooled = tables(KeyedJaggedTensor(keys, asked, lengths=lengths)).to_dict()["item_id"]
        if hllm.training:
            (pooled * torch.arange(1, 1 + pooled.shape[1])).sum().backward()
        return pooled.detach()

    hllm.train()
    start = start_vector("item_id", hllm.user.width, 0.3)
    torch.testing.assert_close(read(old), start.expand(15, -1))
    for _ in range(3):
        moved = read(old[:13])
    assert (moved - start).abs().min() > 0.01
    # Two ids were not read for three steps: they lose their rows to new ids, which begin like every other.
    torch.testing.assert_close(read(new), start.expand(2, -1))
    states = [s for name, s in state_of(experiment).items() if "item_id" in name]
    first_update = read(new) - start
    hllm.eval()
    after = read(torch.cat([old, new]))
    shared = read(of_set[20:21])
    torch.testing.assert_close(after[13:15], shared.expand(2, -1))  # they read the row of all others now
    assert (after[:13] - start).abs().min() > 0.01 and len(states) == (0 if optimizer == "sgd" else 1)
    counts = take_hash_counts(hllm)["item_id"]
    assert (counts["admitted"], counts["evicted"], counts["filled"]) == (17, 2, 15)
    # The optimizer's state began anew, too: the first update is that of an id of a fresh table.
    fresh = build_experiment(config(tmp_path / "fresh", **options), init_distributed()).hllm
    tables, hllm = fresh.features.hashed, fresh.train()
    read(new)
    torch.testing.assert_close(read(new) - start, first_update)


def state_of(experiment: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for table, state in experiment.model.fused_optimizer.state_dict()["state"].items():
        found |= {f"{table}.{name}": value for name, value in state.items()}
    return found


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"item": {"kind": "hash", "rows": 5}},
            r"features.tables.item: no feature of this model.*it has item_id, action",
        ),
        ({"item_id": {"kind": "hsh", "rows": 5}}, "features.tables.item_id.kind: 'hsh': must be one of hash"),
        ({"item_id": {"kind": "hash"}}, "features.tables.item_id.rows: missing: must be an integer"),
        ({"item_id": {"kind": "hash", "rows": 0}}, "features.tables.item_id.rows: 0: must be >= 1"),
        ({"item_id": {"kind": "hash", "rows": 5, "ways": 2}}, "features.tables.item_id.ways: unknown key"),
    ],
)
def test_wrong_tables_are_an_error(tables: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, features__tables=tables)


def test_ranks_that_do_not_divide_the_sets_are_an_error() -> None:
    tables = {"genres": HashTable(1, 1), "item_id": HashTable(10**6, 1)}
    assert check_hash_tables(tables, 7) == [
        "features.tables.genres: 7 ranks: must divide the 960 sets of a table of kind hash; take another number of "
        "ranks",
        "features.tables.item_id: 7 ranks: must divide the 63,360 sets of a table of kind hash; take another number of "
        "ranks",
    ]
    assert not any(check_hash_tables(tables, ranks) for ranks in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 80, 96))


def test_an_id_that_training_has_not_seen_reads_the_shared_row(tmp_path: Path) -> None:
    train(config(tmp_path / "run", max_steps=2, **HASHED))
    destroy_distributed()
    loaded = load_run(tmp_path / "run", "latest", init_distributed())
    tables = loaded.experiment.hllm.eval().features.hashed
    assert tables is not None and json.dumps(take_hash_counts(loaded.experiment.hllm))
    asked = KeyedJaggedTensor(
        ["item_id", "genres", "country"], torch.tensor([10**12, -5]), lengths=torch.tensor([1, 1, 0, 0, 0, 0])
    )
    pooled = tables(asked).to_dict()["item_id"].detach().numpy()
    np.testing.assert_allclose(pooled, np.tile(start_vector("item_id", pooled.shape[1], 0.3), (2, 1)), atol=0.06)
