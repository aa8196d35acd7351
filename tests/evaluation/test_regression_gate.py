import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel
from hllm_torchrec.evaluation.prediction_rows import PredictionRows
from hllm_torchrec.evaluation.regression_gate import compare_with_baseline, judge
from tests.helpers.prediction_rows import columns, write_parquet

LAYOUT = ColumnLayout(user="user_id", item="item_id")


def measured(folder: Path, noise: float, rows: int = 4000, seed: int = 0) -> dict[str, Any]:
    """Two models of the same rows: `new`, and `old` with that much less noise."""
    values = columns(rows, seed)
    random = np.random.default_rng(9)
    values["old"] = (values["score"] + 0.3 * random.normal(size=rows)).astype(np.float32)
    values["new"] = (values["old"] + noise * random.normal(size=rows)).astype(np.float32)
    path = write_parquet(values, folder / f"{noise}-{rows}-{seed}")
    return evaluate_predictions(
        PredictionRows(
            [PredictionModel("new", (path,), "new"), PredictionModel("old", (path,), "old")], LAYOUT, folder
        ),
        EvaluationSettings(),
    )


def alone(metrics: dict[str, Any], name: str, file: Path) -> Path:
    """A metrics.json of one of the models."""
    file.write_text(json.dumps(metrics | {"reference": name, "models": {name: metrics["models"][name]}}))
    return file


def test_a_model_against_itself_passes(tmp_path: Path) -> None:
    metrics = measured(tmp_path, 1.0)
    verdict = compare_with_baseline(metrics, alone(metrics, "new", tmp_path / "base.json"), 0.001)
    assert (verdict.status, verdict.exit_status, verdict.drop) == ("pass", 0, 0)
    assert verdict.text.startswith("PASS: AUC of new 0.") and "cannot rule out a drop of up to" in verdict.text


def test_a_clear_drop_fails_against_a_file_and_paired(tmp_path: Path) -> None:
    metrics = measured(tmp_path, 4.0)
    for baseline in (alone(metrics, "old", tmp_path / "base.json"), "old"):
        verdict = compare_with_baseline(metrics, baseline, 0.001)
        assert (verdict.status, verdict.exit_status) == ("fail", 3)
        assert verdict.drop == metrics["models"]["old"]["auc"] - metrics["models"]["new"]["auc"]
        assert 0 < verdict.low < verdict.drop < verdict.high
        assert "FAIL" in verdict.text and "more than the 0.001 allowed, and the interval lies above 0" in verdict.text


def test_a_drop_that_chance_explains_is_unsure_and_pairing_decides(tmp_path: Path) -> None:
    metrics = measured(tmp_path, 0.45)
    unpaired = compare_with_baseline(metrics, alone(metrics, "old", tmp_path / "base.json"), 0.001)
    assert (unpaired.status, unpaired.exit_status) == ("unsure", 4)
    assert unpaired.low < 0 < 0.001 < unpaired.drop and "the interval contains 0" in unpaired.text
    paired = compare_with_baseline(metrics, "old", 0.001)
    assert paired.status == "fail" and paired.high - paired.low < unpaired.high - unpaired.low
    assert paired.low == metrics["paired"]["old"]["clustered_low"] and "paired on the same rows" in paired.text


def test_an_allowed_drop_passes_and_a_gain_too(tmp_path: Path) -> None:
    metrics = measured(tmp_path, 4.0)
    assert compare_with_baseline(metrics, "old", 0.5).status == "pass"
    turned = metrics | {"reference": "old", "paired": {"new": metrics["paired"]["old"]}}
    assert compare_with_baseline(turned, alone(metrics, "new", tmp_path / "base.json"), 0.0).status == "pass"


def test_gauc_is_judged_on_demand_and_the_worst_verdict_counts(tmp_path: Path) -> None:
    metrics = measured(tmp_path, 0.0)
    for baseline in ("old", str(alone(metrics, "old", tmp_path / "base.json"))):
        assert judge(metrics, baseline, {"auc": 0.5, "gauc": None}).exit_status == 0
        both = judge(metrics, baseline, {"auc": 0.5, "gauc": 0.5})
        assert both.status == "pass" and re.search("^PASS: AUC of new .*; PASS: GAUC of new .*95% ", both.text)
    worse = measured(tmp_path, 4.0)
    drop = worse["models"]["old"]["gauc"] - worse["models"]["new"]["gauc"]
    for baseline in ("old", str(alone(worse, "old", tmp_path / "base.json"))):
        verdict = judge(worse, baseline, {"auc": 0.5, "gauc": drop / 2})
        assert (verdict.status, verdict.exit_status, verdict.max_drop) == ("fail", 3, drop / 2), verdict.text
        assert 0 < verdict.low < verdict.drop < verdict.high and "users as independent" in verdict.text
    earlier = json.loads((tmp_path / "base.json").read_text())
    del earlier["models"]["old"]["gauc_se"]
    (tmp_path / "base.json").write_text(json.dumps(earlier))
    verdict = judge(worse, str(tmp_path / "base.json"), {"auc": 0.5, "gauc": drop / 2})
    assert verdict.status == "unsure" and verdict.as_json()["drop_low"] is None
    assert "but there is no interval: evaluate on more rows" in verdict.text


def test_a_drop_of_xauc_that_has_no_interval_is_unsure() -> None:
    metrics = {"reference": "new", "models": {"new": {"xauc": 0.6}, "old": {"xauc": 0.7}}, "paired": {}}
    verdict = compare_with_baseline(metrics, "old", 0.01, "xauc")
    assert verdict.status == "unsure" and verdict.text.endswith("but there is no interval of XAUC")


def test_gauc_that_is_undefined_or_a_limit_below_0_is_refused(tmp_path: Path) -> None:
    metrics = measured(tmp_path, 0.0)
    metrics["models"]["old"]["gauc"] = None
    with pytest.raises(ValueError, match=r"'old' has no GAUC to compare: it needs users \(--user\) with rows of both"):
        judge(metrics, "old", {"gauc": 0.1})
    with pytest.raises(ValueError, match="--max-gauc-drop -1: must be 0 or more, in GAUC"):
        judge(metrics, "old", {"gauc": -1})


def test_baselines_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    metrics, file = measured(tmp_path, 1.0), tmp_path / "base.json"
    other = measured(tmp_path, 1.0, seed=1)
    with pytest.raises(ValueError, match="was measured on other rows: (users|exposures) .*evaluate the baseline on"):
        compare_with_baseline(metrics, alone(other, "old", file), 0.001)
    with pytest.raises(ValueError, match="was measured on other rows: rows 3000 there, 4000 here"):
        compare_with_baseline(metrics, alone(measured(tmp_path, 1.0, 3000), "old", file), 0.001)
    file.write_text("{")
    with pytest.raises(ValueError, match="base.json is not JSON .*; evaluate again to replace it"):
        compare_with_baseline(metrics, file, 0.001)
    file.write_text('{"schema_version": 77}')
    with pytest.raises(ValueError, match="base.json has schema_version 77, this program reads 1, 2"):
        compare_with_baseline(metrics, file, 0.001)
    block = {"auc": 0.7, "clustered_se": None}
    file.write_text(json.dumps(metrics | {"reference": "old", "models": {"old": block}}))
    with pytest.raises(ValueError, match="base.json: models.old.auc_se is missing; evaluate again"):
        compare_with_baseline(metrics, file, 0.001)
    with pytest.raises(ValueError, match=r"--baseline olt is neither a file nor a compared model \(did you mean 'old'"):
        compare_with_baseline(metrics, "olt", 0.001)
    with pytest.raises(ValueError, match="--baseline new is the judged model itself"):
        compare_with_baseline(metrics, "new", 0.001)
    with pytest.raises(ValueError, match="--max-drop -0.1: must be 0 or more"):
        compare_with_baseline(metrics, "old", -0.1)
    undefined = json.loads(json.dumps(metrics))
    undefined["models"]["new"]["auc"] = None
    with pytest.raises(ValueError, match="the model 'new' has no AUC to compare"):
        compare_with_baseline(undefined, "old", 0.1)


def test_the_error_of_gauc_is_that_of_resampled_users(tmp_path: Path) -> None:
    metrics, values = measured(tmp_path, 0.5), columns(4000, 0)
    table = pq.read_table(tmp_path / "0.5-4000-0")
    scores = {name: table[name].to_numpy() for name in ("new", "old")}
    within, weights = [], []
    for user in np.unique(values["user_id"]):
        rows = values["user_id"] == user
        if 0 < values["label"][rows].sum() < rows.sum():
            within.append([roc_auc_score(values["label"][rows], scores[name][rows]) for name in scores])
            weights.append(rows.sum())
    aucs, weight, rng = np.array(within), np.array(weights, float), np.random.default_rng(0)
    drawn = [rng.integers(0, len(aucs), len(aucs)) for _ in range(4000)]
    means = np.array([np.average(aucs[rows], axis=0, weights=weight[rows]) for rows in drawn])
    found = [metrics["models"][name]["gauc_se"] for name in scores]
    np.testing.assert_allclose(found, means.std(axis=0), rtol=0.1)
    pair = metrics["paired"]["old"]
    half = 1.96 * (means[:, 1] - means[:, 0]).std()
    assert (pair["gauc_high"] - pair["gauc_low"]) / 2 == pytest.approx(half, rel=0.1)
    assert pair["gauc_difference"] == metrics["models"]["old"]["gauc"] - metrics["models"]["new"]["gauc"]
