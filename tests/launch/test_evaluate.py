"""`hllm evaluate` and `hllm report`: a run scored offline is the run as training saw it, beside other models."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from hllm_torchrec.data.predictions import read_predictions
from hllm_torchrec.evaluation.run_loader import training_overlap
from hllm_torchrec.launch.baselines import main as run_baselines
from hllm_torchrec.launch.evaluate import main
from hllm_torchrec.launch.report import main as write_report
from tests.helpers import fixtures
from tests.helpers.processes import run_job
from tests.helpers.training_fixtures import config, lines, train

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"stages": [{"name": "only", "epochs": 2}]},
    "averaged": {"optim__ema": 0.5, "objective__generative_weight": 0.5, "evaluation__retrieval": True},
    "generative": {"objective__fusion": "none", "evaluation__ks": [1, 5]},
}


@cache
def trained(kind: str) -> Path:
    """A run of this process, trained; not to be changed."""
    run = fixtures.folder() / "evaluated" / kind
    train(config(run, **SETTINGS[kind]))
    return run


@cache
def baselines() -> Path:
    output = fixtures.folder() / "evaluated" / "baselines"
    dataset = str(fixtures.dataset().root)
    assert run_baselines(["--dataset", dataset, "--output", str(output), "--only", "item_mean", "running_bias"]) == 0
    return output


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the run `kind` (by default "plain")."""
    kind = getattr(request, "param", "plain")
    return Path(shutil.copytree(trained(kind), tmp_path / kind))


def metrics_of(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


@pytest.mark.slow
def test_a_run_is_compared_with_baselines_on_the_same_exposures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [str(baselines() / name) for name in ("item_mean", "running_bias")]
    assert main(["--run", str(run), "--compare", *others, "--draws", "50"]) == 0
    metrics = metrics_of(run)
    assert metrics["reference"] == "plain" and set(metrics["paired"]) == {"item_mean", "running_bias"}
    own = read_predictions(run / "predictions" / "test")
    assert metrics["models"]["plain"]["auc"] == pytest.approx(roc_auc_score(own.label, own.score))
    assert metrics["rows"] == len(own.label) == sum(p.num_rows for p in map(pq.read_metadata, parts(run)))
    assert metrics["provenance"]["dataset"]["fingerprint"] == fixtures.dataset().fingerprint
    assert len(metrics["provenance"]["weights"]["fingerprint"]) == 16
    events = fixtures.dataset().training_item_counts()[own.item_id]
    rows = [part["rows"] for name, part in metrics["models"]["plain"]["slices"].items() if "item_events" in name]
    assert rows == np.histogram(events, [0, 1, 6, 21, np.inf])[0].tolist()
    exposures = set(zip(own.user_id.tolist(), own.item_id.tolist(), np.asarray(own.timestamp).tolist()))
    assert (metrics["overlap"]["exposures"], metrics["overlap"]["seen"]) == (len(exposures), 0)
    assert metrics["provenance"]["seed"] == 0 and metrics["provenance"]["machine"]["packages"]
    printed = capsys.readouterr().out
    assert "difference to plain" in printed and "running_bias" in printed
    assert f"metrics: {run / 'metrics.json'}" in printed
    assert "running_bias" in (run / "report.html").read_text()


def parts(run: Path, split: str = "test") -> list[Path]:
    return list((run / "predictions" / split).glob("part-*.parquet"))


@pytest.mark.parametrize("run", ["plain", "averaged"], indirect=True)
def test_the_checkpoint_gives_what_training_saw(run: Path) -> None:
    assert main(["--run", str(run), "--split", "valid", "--checkpoint", "latest", "--draws", "10"]) == 0
    metrics, seen = metrics_of(run, "metrics-valid.json"), lines(run, "eval")[-1]
    assert metrics["models"][run.name]["auc"] == pytest.approx(seen["auc"], abs=1e-9)
    assert metrics["models"][run.name]["log_loss"] == pytest.approx(seen["log_loss"], abs=1e-6)
    assert metrics["provenance"]["step"] == seen["step"]
    assert not (run / "metrics.json").exists()
    if run.name == "averaged":
        assert metrics["retrieval"]["recall@10"] == pytest.approx(seen["recall@10"])


@pytest.mark.slow
def test_options_on_columns_act_on_runs_too(run: Path, tmp_path: Path) -> None:
    train, out = tmp_path / "train", tmp_path / "out"
    options = ["--draws", "0", "--no-tensorboard", "--slices", "history_length", "--memory", "64K", "--score"]
    assert main(["--run-dir", str(run), "--draws", "0", "--no-tensorboard"]) == 0
    shutil.copytree(run / "predictions" / "test", train)
    compared = ["--compare", str(baselines() / "item_mean"), "--train", str(train), "--output", str(out)]
    assert main(["--run-dir", str(run), *options, "item_mean=label", "--item-is-cold", "NONE", *compared]) == 0
    metrics, plain = metrics_of(out), metrics_of(run)
    assert metrics["models"]["plain"]["auc"] == plain["models"]["plain"]["auc"]
    assert metrics["models"]["item_mean"]["auc"] == 1.0  # by its labels
    assert any(name.startswith("history_length=") for name in metrics["models"]["plain"]["slices"])
    assert metrics["models"]["plain"]["slices"]["item_warm"]["rows"] == metrics["rows"]  # all items are in `train`
    assert metrics["overlap"]["seen"] == metrics["overlap"]["exposures"] > plain["overlap"]["seen"]
    assert metrics["memory"]["limit"] == 64 << 10
    assert metrics["exposures"] == plain["exposures"]


@pytest.mark.slow
def test_best_latest_and_a_directory_are_the_checkpoints_they_say(run: Path) -> None:
    seen = {line["step"]: line["auc"] for line in lines(run, "eval")}
    assert len(seen) == 2
    best, latest = max(seen, key=lambda step: seen[step]), max(seen)
    directory = str(run / "checkpoints" / f"step-{min(seen):08d}")
    for which, step in (("best", best), ("latest", latest), (directory, min(seen))):
        assert main(["--run", str(run), "--split", "valid", "--checkpoint", which, "--draws", "5"]) == 0
        metrics = metrics_of(run, "metrics-valid.json")
        assert metrics["provenance"]["step"] == step
        assert metrics["models"]["plain"]["auc"] == pytest.approx(seen[step], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["generative"], indirect=True)
def test_a_generative_run_has_retrieval_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run)]) == 0
    metrics = metrics_of(run)
    assert metrics["models"] == {} and metrics["retrieval"]["rows"] > 0
    assert 0 <= metrics["retrieval"]["recall@1"] <= metrics["retrieval"]["recall@5"] <= 1
    assert not (run / "predictions").exists()
    assert "whole catalogue" in capsys.readouterr().out
    assert "recall@5" in (run / "report.html").read_text()


def test_exposures_of_the_training_part_are_found(run: Path) -> None:
    assert main(["--run", str(run), "--draws", "0", "--no-tensorboard", "--split", "train"]) == 0
    predictions, dataset = run / "predictions" / "train", fixtures.dataset()
    found = training_overlap(predictions, dataset)
    assert found.seen == found.exposures > 0 and metrics_of(run, "metrics-train.json")["overlap"] is None


@pytest.mark.slow
def test_the_gate_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--run-dir", str(run), "--draws", "0", "--no-tensorboard"]
    assert main(quick) == 0
    accepted = shutil.copy(run / "metrics.json", tmp_path / "accepted.json")
    assert main([*quick, "--baseline", str(accepted)]) == 0
    assert "gate: PASS: AUC of plain" in capsys.readouterr().out
    better = metrics_of(tmp_path, "accepted.json")
    better["models"]["plain"] |= {"auc": 0.9999, "auc_se": 1e-9, "clustered_se": 1e-9}
    accepted.write_text(json.dumps(better))
    assert main([*quick, "--baseline", str(accepted), "--max-drop", "0.001"]) in (3, 4)
    assert metrics_of(run)["gate"]["drop"] > 0.001


def test_predictions_alone_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = baselines() / "item_mean", baselines() / "running_bias" / "predictions" / "test"
    named = ["--predictions", f"mean={one}", f"running={two}", "--draws", "20"]
    assert main(named) == 0
    assert "difference to mean" in capsys.readouterr().out
    assert main([*named, "--output", str(tmp_path / "both")]) == 0
    metrics = metrics_of(tmp_path / "both")
    assert metrics["reference"] == "mean" and list(metrics["models"]) == ["mean", "running"]
    assert (tmp_path / "both" / "report.html").is_file()


@pytest.mark.slow
def test_new_predictions_replace_those_of_more_ranks(run: Path) -> None:
    assert main(["--run", str(run), "--draws", "5"]) == 0
    (part,) = parts(run)
    part.rename(part.with_name("part-00003.parquet"))
    assert main(["--run", str(run), "--draws", "5"]) == 0
    assert [file.name for file in parts(run)] == ["part-00000.parquet"]


def test_a_checkpoint_of_another_model_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["objective"]["head_hidden"] = 5
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["--run", str(run)]) == 2
    assert "is not of this model" in capsys.readouterr().err
    assert not (run / "metrics.json").exists() and not (run / "predictions").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: name a run"),
        (["--run", "no-such-run"], "no-such-run is not a run directory: it has no config.yaml"),
        (["--run", "{run}", "--checkpoint", "newest"], "--checkpoint newest: neither best nor latest"),
        (["--run", "{run}", "--compare", "{run}"], "has no predictions"),
        (["--run", "{base}/item_mean", "--compare", "{base}/item_mean"], "another model has the name 'item_mean'"),
        (["--predictions", "mean"], "--predictions mean: must be NAME=PATH"),
        (["--predictions", "a={base}/item_mean", "a={base}/item_mean"], "two models are named 'a'"),
        (["--compare", "{base}"], "no part-*.parquet in"),
        (["--predictions", "a={base}"], "is not a file or a directory with .parquet"),
        (["--predictions", "a={base}/item_mean", "--draws", "-1"], "draws is -1; 0 for no bootstrap"),
        (
            ["--compare", "{base}/item_mean", "--checkpoint", "best"],
            "--checkpoint best applies to a run; name the run with",
        ),
        (
            ["--run", "{run}", "--max-drop", "0.1"],
            "--max-drop belongs to the regression gate; name its reference with --base",
        ),
        (["--run", "{run}", "--on-unsure", "pass"], "--on-unsure belongs to the regression gate"),
        (["--run", "{ranks_items}", "--slices", "country"], "--slices: {ranks_items} ranks items only"),
        (["--run", "{ranks_items}", "--memory", "1G"], "--memory: {ranks_items} ranks items only"),
        (["--run", "{ranks_items}", "--user", "uid"], "--user: {ranks_items} ranks items only"),
        (["--split", "tests"], "argument --split: invalid choice: 'tests'"),
        (["--run", "{run}", "--output", "{run}/config.yaml"], "config.yaml is a file; name a directory"),
        (["--run", "{run}", "--spill", "/no/such/place"], "--spill /no/such/place: no such directory"),
        (["--run", "{run}", "--train", "nowhere"], "--train nowhere is not a file or a directory"),
        (["--run", "{run}", "--predictions", "a={run}/config.yaml"], "config.yaml is a file: a run is compared with"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks_items = trained("generative")
    filled = [text.format(run=run, base=baselines(), ranks_items=ranks_items) for text in arguments]
    message = message.format(ranks_items=ranks_items)
    capsys.readouterr()
    try:
        status: object = main(filled)
    except SystemExit as left:
        status = left.code
    shown = capsys.readouterr().err.strip()
    assert status == 2 and shown.count("\n") == 0, shown
    assert shown.startswith("hllm evaluate: error: ") and message in shown
    assert not (run / "metrics.json").exists()


def test_a_run_without_checkpoints_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert main(["--run", str(run)]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err


def test_the_report_is_written_anew(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_report(["--run-dir", str(run)]) == 0
    assert capsys.readouterr().out.strip() == f"report: {run / 'report.html'}"
    assert "<html" in (run / "report.html").read_text()
    (tmp_path / "empty").mkdir()
    assert write_report(["--run", str(tmp_path / "empty")]) == 2
    assert "has neither metrics.json nor a log.jsonl" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("run", ["averaged"], indirect=True)
def test_two_ranks_score_as_one(run: Path, root: Path, tmp_path: Path) -> None:
    job = run_job("hllm_torchrec.launch.evaluate", ["--run-dir", str(run), "--draws", "10"], 2, root, tmp_path)
    assert [printed.count("AUC [95%]") for printed, _ in job] == [1, 0] and len(parts(run)) == 2
    two, metrics = read_predictions(run / "predictions" / "test"), metrics_of(run)
    assert main(["--run", str(run), "--draws", "10"]) == 0
    one = read_predictions(run / "predictions" / "test")
    assert np.array_equal(one.user_id, two.user_id) and np.array_equal(one.position, two.position)
    assert two.score == pytest.approx(one.score, abs=1e-4)
    for name, value in metrics_of(run)["retrieval"].items():
        assert metrics["retrieval"][name] == pytest.approx(value, abs=1e-6), name
