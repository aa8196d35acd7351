"""Cold start: its trainings are configurations that can be trained, and figures are split by the items' state."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from hllm_torchrec.config.loading import load_config
from tests.helpers.scripts import bench_module


def test_every_training_and_every_variant_of_stage_two_is_a_configuration_of_its_own(root: Path) -> None:
    cold, two = bench_module("cold_start"), bench_module("stage_two")
    files = [
        ["--config", str(root / "configs" / f"{job.config}.yaml"), *job.options] for job in cold.TRAININGS.values()
    ]
    stage_two = ["--config", str(root / "configs" / "stages" / "2.yaml")]
    files += [[*stage_two, *two.options_of(name, 2)] for name in two.VARIANTS]
    found = [repr(load_config(arguments)) for arguments in files]
    assert len(set(found)) == len(found) == len(cold.TRAININGS) + len(two.VARIANTS)


def write_predictions(folder: Path, skill: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels, cold = rng.integers(0, 2, 400).astype(np.float32), rng.random(400) < 0.4
    columns = {
        "user_id": np.arange(400) // 20,
        "position": np.arange(400) % 20,
        "item_id": rng.integers(1, 9, 400),
        "label": labels,
        "score": skill * labels + np.random.default_rng(int(10 * skill)).normal(size=400),
        "probability": np.full(400, 0.5),
        "history_length": np.arange(400) % 20,
        "item_is_cold": cold,
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "part-00000.parquet")
    return columns


def test_cold_and_warm_exposures_are_measured_apart_and_paired_with_the_dlrm(root: Path, tmp_path: Path) -> None:
    script = bench_module("cold_start")
    write_predictions(tmp_path / "dlrm" / "predictions" / "test", 0.2)
    own = write_predictions(tmp_path / "stage3" / "both_nearline" / "predictions" / "test", 2.0)
    found = script.measure_auc(tmp_path)
    assert list(found) == ["dlrm", "dlrm_both"] and "p" not in found["dlrm"]["cold"]
    for kind, rows in (("cold", own["item_is_cold"]), ("warm", ~own["item_is_cold"])):
        one = found["dlrm_both"][kind]
        assert one["auc"] == pytest.approx(roc_auc_score(own["label"][rows], own["score"][rows]))
        assert one["rows"] == rows.sum() and one["p"] < 1e-3 and one["difference_interval"][0] > 0
    table = script.markdown({0: tmp_path})
    assert "| 0 | dlrm_both | " in table and f"p = {found['dlrm_both']['cold']['p']:.1e}" in table
