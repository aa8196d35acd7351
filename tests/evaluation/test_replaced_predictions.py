"""Predictions that another job replaces while they are evaluated, and while they are written."""

import errno
import os
import re
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.common.atomic_files import exchange_folders
from hllm_torchrec.data.predictions import save_predictions
from hllm_torchrec.evaluation.model_comparison import compare
from tests.helpers.schedules import killed_before_access, schedules


def columns(seed: int, users: range) -> dict[str, np.ndarray]:
    """Five exposures of each user; labels and scores differ from seed to seed."""
    rng, rows = np.random.default_rng(seed), 5 * len(users)
    return {
        "user_id": np.repeat(users, 5),
        "position": np.tile(np.arange(5), len(users)),
        "item_id": np.arange(rows) % 7,
        "label": rng.integers(0, 2, rows).astype(np.int8),
        "score": rng.normal(size=rows).astype(np.float32),
        "probability": rng.uniform(size=rows).astype(np.float32),
        "history_length": np.tile(np.arange(5), len(users)),
        "item_is_cold": np.zeros(rows, bool),
        "timestamp": np.arange(rows) + 10**9,
    }


def write(folder: Path, seed: int) -> Path:
    """Predictions of two ranks."""
    folder.mkdir(parents=True)
    for rank in range(2):
        part = columns(10 * seed + rank, range(8 * rank, 8 * rank + 8))
        pq.write_table(pa.table(part), folder / f"part-{rank:05d}.parquet")
    return folder


def auc(folder: Path) -> float:
    return float(compare({"model": folder}, draws=0)["models"]["model"]["auc"])


def test_an_evaluation_sees_one_version_or_says_that_it_was_replaced(tmp_path: Path) -> None:
    right = {seed: auc(write(tmp_path / f"made-{seed}", seed)) for seed in (1, 2)}
    folder = tmp_path / "predictions" / "test"

    def fresh() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "made-1", folder)
        shutil.copytree(tmp_path / "made-2", tmp_path / "predictions" / "next")

    def replace() -> None:
        assert exchange_folders(tmp_path / "predictions" / "next", folder)
        shutil.rmtree(tmp_path / "predictions" / "next")

    results = [result for _, result in schedules(lambda: auc(folder), replace, folder, fresh)]
    assert len(results) > 5 and right[1] != right[2]
    errors = [str(error) for error in results if isinstance(error, Exception)]
    assert set(results) - set(right.values()) <= {error for error in results if isinstance(error, ValueError)}
    said = "was replaced or changed while it was read, by another job: run this job again"
    assert len(errors) > 5 and all(re.search(rf"test/part-0000\d.parquet {said}$", error) for error in errors), errors


def test_an_error_of_the_machine_is_not_called_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "test", 1)

    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a file")

    results = [result for _, result in schedules(lambda: auc(folder), fail, folder) if not isinstance(result, float)]
    assert len(results) > 5 and {getattr(result, "errno", result) for result in results} == {errno.EMFILE}


def test_predictions_are_replaced_without_a_moment_without_them(tmp_path: Path) -> None:
    folder = tmp_path / "predictions" / "test"
    for k in count(1, 3):
        shutil.rmtree(tmp_path / "predictions", ignore_errors=True)
        save_predictions(columns(1, range(3)), folder)
        killed = killed_before_access(k, tmp_path, save_predictions, columns(2, range(3)), folder)
        found = pq.read_table(folder)["score"].to_numpy()
        assert any(np.array_equal(found, columns(seed, range(3))["score"]) for seed in (1, 2)), k
        save_predictions(columns(3, range(3)), folder)
        left = [path.name for path in folder.parent.iterdir()]
        assert [name for name in left if "-new-" not in name] == ["test"], (k, left)
        if not killed:
            break
    assert k > 15
