"""`hllm evaluate` on files of predictions of any origin: what it writes, its gate, ranks, TorchX and its tracker."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchx.tracker.api import AppRun
from torchx.tracker.backend.fsspec import FsspecTracker
from torchx.tracker.backend.fsspec import create as create_tracker

from hllm_torchrec.evaluation.sinks import write_json
from hllm_torchrec.launch import evaluate_options
from hllm_torchrec.launch.evaluate import main
from tests.helpers.prediction_rows import columns, write_csv, write_parquet

QUICK = ["--draws", "0", "--no-tensorboard"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rows = columns()
    del rows["weight"]
    write_parquet(rows, folder / "new", files=2)
    worse = rows | {"score": rows["other"].astype(np.float32)}
    write_csv({name: worse[name] for name in ("label", "score")}, folder / "old.csv")
    return folder


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def test_two_models_in_parquet_and_csv(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_parquet({name: values[:20] for name, values in columns().items()}, tmp_path / "train")
    named = ["--predictions", f"new={files / 'new'}", f"old={files / 'old.csv'}", "--train", str(train)]
    out = tmp_path / "out"
    assert main([*named, "--slices", "country", "--draws", "20", "--output", str(out)]) == 0
    metrics = read(out)
    assert metrics["reference"] == "new" and metrics["paired"]["old"]["bootstrap_high"] < 0
    assert metrics["models"]["new"]["log_loss"] is not None and metrics["models"]["old"]["log_loss"] is None
    assert {"country=de", "item_cold", "history_0", "hour_07"} <= metrics["models"]["old"]["slices"].keys()
    assert metrics["overlap"]["seen"] == 20 and metrics["overlap"]["keys"] == "user, item, time"
    assert metrics["memory"]["limit"] == 1 << 30 and metrics["memory"]["peak"] > 100 << 20
    provenance = metrics["provenance"]
    assert provenance["columns"]["user"] == "user_id" and len(provenance["files"]["old"]["fingerprint"]) == 16
    printed = capsys.readouterr().out
    assert "difference to new" in printed and "caution: Train/test overlap: 20 of" in printed
    page = (out / "report.html").read_text()
    for title in ("Warnings", "AUC over time", "AUC by slice", "Precision-recall curve", "Reliability", "fingerprint"):
        assert title in page, title
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    (scalar,) = events.Scalars("evaluate-test/new/auc")
    assert scalar.value == pytest.approx(metrics["models"]["new"]["auc"])
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_two_scores_in_one_file_with_columns_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"label": "clicked", "score": "mine", "other": "theirs", "user_id": "uid", "probability": "p"}
    values = {names.get(name, name): column for name, column in columns().items()}
    path = write_parquet(values, tmp_path / "both")
    arguments = ["--predictions", f"a={path}", f"b={path}", "--score", "a=mine", "b=theirs", "--label", "clicked"]
    arguments += ["--user", "uid", "--probability", "a=p", "--weight", "NONE", "--timestamp", "NONE"]
    assert main([*arguments, *QUICK, "--memory", "128K", "--output", str(tmp_path)]) == 0
    metrics = read(tmp_path)
    assert metrics["memory"]["limit"] == 128 << 10 and metrics["memory"]["spilled"] > 0
    assert metrics["weighted"] is False and metrics["users"] == 60 and "a" in metrics["models"]
    assert metrics["models"]["a"]["ece"] is not None and metrics["models"]["b"]["ece"] is None
    assert not any(name.startswith("day") for name in metrics["models"]["a"]["slices"])
    capsys.readouterr()
    weighted = [*arguments, "--weight", "weight", "--draws", "9", "--no-tensorboard", "--output", str(tmp_path / "w")]
    assert main(weighted) == 0
    assert read(tmp_path / "w")["weighted"] is True
    assert "caution: No bootstrap over users: rows are weighted" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gate_of_a_model_repository(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = f"new={files / 'new'}", f"old={files / 'old.csv'}"
    accepted, now = tmp_path / "accepted", tmp_path / "now"
    assert main(["--predictions", new, *QUICK, "--output", str(accepted)]) == 0
    baseline = ["--baseline", str(accepted / "metrics.json"), "--max-drop", "0.001"]
    assert main(["--predictions", new, *QUICK, *baseline]) == 0
    assert "gate: PASS: AUC of new" in capsys.readouterr().out
    both = ["--predictions", old.replace(str(files / "old.csv"), str(files / "new")), "--score", "old=item_id"]
    assert main([*both, *QUICK, *baseline, "--output", str(now)]) == 3
    assert "gate: FAIL: AUC of old" in capsys.readouterr().out
    assert read(now)["gate"]["status"] == "fail" and "Regression gate: FAIL" in (now / "report.html").read_text()
    paired = ["--predictions", old, new, *QUICK, "--baseline", "new"]
    assert main([*paired, "--max-drop", "0"]) == 3
    assert main([*paired, "--max-drop", "0.5"]) == 0
    assert main(["--predictions", old, *QUICK, *baseline, "--output", str(tmp_path / "no")]) == 2
    assert "was measured on other rows" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_an_unsure_drop_passes_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = columns(300)
    rows["other"] = rows["score"] + 0.5 * np.random.default_rng(4).normal(size=300)
    path = write_parquet(rows, tmp_path / "rows")
    assert main(["--predictions", f"m={path}", *QUICK, "--output", str(tmp_path / "a")]) == 0
    gate = ["--predictions", f"m={path}", "--score", "other", *QUICK, "--baseline", str(tmp_path / "a/metrics.json")]
    assert main(gate) == 4
    assert "gate: UNSURE" in capsys.readouterr().out
    assert main([*gate, "--on-unsure", "pass"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "a={new}", "--score", "b=x"], r"--score b=x: no model 'b'; there are ['a']"),
        (["--predictions", "a={new}", "--score", "scoer"], "has no column 'scoer' (did you mean 'score'?)"),
        (["--predictions", "a={new}", "--label", "NONE"], "name the column of labels with --label"),
        (
            ["--predictions", "a={new}", "--memory", "much"],
            "argument --memory: 'much' is not a size; write bytes, or 512M",
        ),
        (["--predictions", "a={new}", "--memory", "1K"], "memory is 1024 bytes; at least 65536"),
        (["--predictions", "a={new}", "--baseline", "b"], "--baseline b is neither a file nor a compared model"),
        (["--predictions", "a={new}", "--baseline", "a"], "--baseline a is the judged model itself"),
        (["--predictions", "a={new}", "--train", "nowhere"], "nowhere is not a file"),
        (["--predictions", "a={bad}"], "bad.csv: row 1 (line 3): column 'score' is nan"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: list[str], message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.csv").write_text("label,score\n1,0.5\n0,nan\n1,1\n")
    filled = [text.format(new=files / "new", bad=tmp_path / "bad.csv") for text in arguments]
    try:
        status: object = main([*filled, *QUICK, "--output", str(tmp_path / "out")])
    except SystemExit as left:
        status = left.code
    shown = capsys.readouterr().err.strip()
    assert status == 2 and shown.count("\n") == 0 and shown.startswith("hllm evaluate: error: "), shown
    assert message in shown and not (tmp_path / "out").exists()


def test_sizes_are_read() -> None:
    assert [evaluate_options.size(text) for text in ("70000", "64K", "512M", "4g", "2GiB")] == [
        70000,
        65536,
        512 << 20,
        4 << 30,
        2 << 30,
    ]


def test_a_metrics_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_json({"auc": 0.5}, tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"rows": list(range(10_000)), "auc": float("nan")}, tmp_path / "metrics.json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"auc": 0.5}


def test_the_torchx_tracker_has_run_metrics_and_lineage(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tracker").mkdir()
    (tmp_path / "tracker.conf").write_text(f"protocol=file\nroot_path={tmp_path / 'tracker'}\n")
    monkeypatch.setenv("TORCHX_TRACKERS", "fsspec")
    monkeypatch.setenv("TORCHX_TRACKER_FSSPEC_CONFIG", str(tmp_path / "tracker.conf"))
    monkeypatch.setenv("TORCHX_JOB_ID", "local_cwd://torchx/evaluate-1")
    AppRun.run_from_env.cache_clear()
    out = tmp_path / "out"
    try:
        assert main(["--predictions", f"new={files / 'new'}", *QUICK, "--output", str(out)]) == 0
        (backend,) = AppRun.run_from_env().backends
    finally:
        AppRun.run_from_env.cache_clear()
    assert isinstance(backend, FsspecTracker)
    (job,) = backend.run_ids()
    metrics = read(out)
    assert job == "local_cwd://torchx/evaluate-1"
    assert backend.metadata(job)["new/auc"] == metrics["models"]["new"]["auc"]
    assert {name: artifact.path for name, artifact in backend.artifacts(job).items()} == {
        "metrics": str(out / "metrics.json"),
        "report": str(out / "report.html"),
    }
    source = f"predictions:{metrics['provenance']['files']['new']['fingerprint']}"
    assert [(found.source_run_id, found.artifact_name) for found in backend.sources(job)] == [(source, "predictions")]


@pytest.mark.long
def test_the_torchx_component_starts_ranks_that_agree_with_one(files: Path, root: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    named = f"new={files / 'new'}"
    assert main(["--predictions", named, *QUICK, "--output", str(one)]) == 0
    binaries = Path(sys.executable).parent
    command = [str(binaries / "torchx"), "run", str(root / "launch" / "components.py") + ":evaluate", "--j", "1x2"]
    command += ["--predictions", named, "--", *QUICK, "--output", str(two)]
    env = os.environ | {"PYTHONPATH": str(root), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    (tmp_path / "tracker").mkdir()
    (tmp_path / "tracker.conf").write_text(f"protocol=file\nroot_path={tmp_path / 'tracker'}\n")
    tracker = f"[torchx:tracker]\nfsspec =\n\n[tracker:fsspec]\nconfig = {tmp_path / 'tracker.conf'}\n"
    (tmp_path / ".torchxconfig").write_text(f"[cli:run]\nscheduler = local_cwd\n\n{tracker}")
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    recorded = create_tracker(str(tmp_path / "tracker.conf"))
    (job,) = recorded.run_ids()
    assert job.startswith("local_cwd://torchx/evaluate-") and set(recorded.artifacts(job)) == {"metrics", "report"}
    assert read(two)["provenance"]["world"] == 2
    assert read(two)["models"]["new"]["auc"] == read(one)["models"]["new"]["auc"]
    assert read(two)["models"]["new"]["gauc"] == pytest.approx(read(one)["models"]["new"]["gauc"], abs=1e-12)


def test_the_component_passes_what_it_is_given(root: Path) -> None:
    command = [str(Path(sys.executable).parent / "torchx"), "run", "--dryrun", "-s", "local_cwd"]
    command += [str(root / "launch" / "components.py") + ":evaluate", "--run_dir", "runs/x", "--baseline", "b.json"]
    command += ["--max_drop", "0.002", "--j", "1x4", "--", "--draws", "7"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    shown = re.sub(r"\s*['\"]\n\s*['\"]", " ", result.stdout)  # TorchX breaks long texts
    for part in ("--nproc_per_node 4", "-m hllm_torchrec.launch.evaluate", "--run-dir runs/x", "--draws 7"):
        assert part in shown, shown
    assert "--baseline b.json --max-drop 0.002" in shown
