from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.evaluation.prediction_layout import ColumnLayout
from hllm_torchrec.evaluation.sanity_checks import Overlap, count_overlap, file_overlap, metric_warnings
from tests.helpers.distributed import run_ranks
from tests.helpers.prediction_rows import columns, write_csv, write_parquet


def metrics(**changes: Any) -> dict[str, Any]:
    block = {"auc": 0.7, "auc_se": 0.01, "clustered_se": 0.01, "slices": {}}
    return {"reference": "m", "models": {"m": block | changes}, "users": 500, "rows_without_weight": 0}


def test_nothing_suspicious_gives_no_warning() -> None:
    assert metric_warnings(metrics(), Overlap(100, 0, "user, item", 1.0)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auc": 0.995}, "m: AUC 0.9950 is above 0.99: look for leakage"),
        ({"auc": None}, "m: no AUC, the rows are of one class only"),
        ({"clustered_se": 0.02}, "DeLong's (rows as independent), by these factors: m 2.0. Trust the wider intervals."),
        (
            {"slices": {"big": {"rows": 100, "positives": 50}, "tiny": {"rows": 1000, "positives": 4}}},
            "Tiny slices, with fewer than 30 rows of a class: tiny (1,000); do not",
        ),
    ],
)
def test_each_suspicion_is_said(changes: dict[str, Any], message: str) -> None:
    (found,) = metric_warnings(metrics(**changes))
    assert message in found


def test_what_is_said_of_the_first_label_is_said_of_every_task() -> None:
    off = {"auc": 0.7, "rows": 10_000, "positives": 2000, "brier": 0.1, "calibration": 2.0}
    tasks: dict[str, Any] = {
        "like": {"kind": "binary", "models": {"m": off, "n": off | {"calibration": 1.0, "auc": None}}},
        "seen": {"kind": "number", "models": {"m": {}}, "rows": 9_000, "rows_ranked": 4_000},
    }
    assert [text.partition(" [")[0] for text in metric_warnings(metrics() | {"tasks": tasks})] == [
        "task like, m: calibration 2.000 is outside its interval around 1",
        "task like, n: no AUC, the rows are of one class only.",
        "task seen: Spearman and XAUC are of 4,000 random rows of 9,000, as many as --memory holds.",
    ]


def test_overlaps_few_users_and_left_out_rows_are_said() -> None:
    found = metric_warnings(metrics() | {"users": 12, "rows_without_weight": 7}, Overlap(100, 3, "user, item", 1.0))
    assert found[0].startswith("Train/test overlap: 3 of 100 exposures (user, item) are in the training part")
    assert found[1:] == ["Only 12 users: intervals over users are rough.", "7 rows of weight 0 were left out."]


@pytest.mark.slow
def test_overlaps_are_counted_across_kinds_of_files(tmp_path: Path) -> None:
    rows = columns(400) | {"user_id": np.char.add("u", np.arange(400).astype(str))}
    test = write_parquet(rows, tmp_path / "test")
    shared = {name: values[390:] for name, values in rows.items()}
    new = {name: values[:50] for name, values in rows.items()} | {"user_id": np.full(50, "nobody")}
    train = write_csv(
        {name: np.concatenate([shared[name], new[name], shared[name]]) for name in rows}, tmp_path / "t.csv"
    )
    layout = ColumnLayout(user="user_id", item="item_id")
    with pytest.raises(ValueError, match="--train needs columns of users and items"):
        file_overlap([test], [train], ColumnLayout(user="user_id"), 1 << 30, tmp_path)
    found = file_overlap([test], [train], layout, 1 << 30, tmp_path)
    assert found == Overlap(400, 10, "user, item", 1.0)
    moved = write_csv(
        {name: np.concatenate([shared[name], new[name]]) for name in rows} | {"timestamp": np.arange(60)},
        tmp_path / "m.csv",
    )
    timed = ColumnLayout(user="user_id", item="item_id", timestamp="timestamp")
    assert file_overlap([test], [train], timed, 1 << 30, tmp_path) == Overlap(400, 10, "user, item, time", 1.0)
    assert file_overlap([test], [moved], timed, 1 << 30, tmp_path).seen == 0
    assert (
        run_ranks(file_overlap, 2, [test], [train], timed, 1 << 30, tmp_path)
        == [Overlap(400, 10, "user, item, time", 1.0)] * 2
    )


def test_little_memory_looks_at_a_sample() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 40_000).astype(np.uint64)
    found = count_overlap([keys], [keys[:10_000], keys[:10_000]], len(keys), 32 * 10_000, "k")
    assert found.share == 0.25 and found.exposures == pytest.approx(10_000, rel=0.05)
    assert found.seen / found.exposures == pytest.approx(0.25, abs=0.02)
