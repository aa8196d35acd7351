"""`hllm baselines`: predictions that `compare` reads, reuse of what is there, and mistakes in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from hllm_torchrec.data.predictions import Predictions, read_predictions
from hllm_torchrec.launch.baselines import NAMES, load_settings, main
from tests.helpers import fixtures
from tests.helpers.processes import run_job

TINY = ["--dlrm.width=4", "--dlrm.bottom=[4]", "--dlrm.top=[4]", "--dlrm.epochs=1", "--dlrm.user_features=[country]"]


def arguments(output: Path, *more: str) -> list[str]:
    return ["--dataset", str(fixtures.dataset().root), "--output", str(output), *TINY, *more]


def read(output: Path, name: str, split: str = "test") -> Predictions:
    return read_predictions(output / name / "predictions" / split)


def test_every_baseline_scores_the_same_exposures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path)) == 0
    for split in ("valid", "test"):
        first, *others = (read(tmp_path, name, split) for name in NAMES)
        for other in others:
            for column in ("user_id", "position", "item_id", "label", "history_length", "item_is_cold"):
                assert np.array_equal(getattr(first, column), getattr(other, column))
    printed = capsys.readouterr().out
    assert "valid: " in printed and "test: " in printed and "AUC [95%]" in printed
    record = json.loads((tmp_path / "dlrm" / "baseline.json").read_text())
    assert record["config"]["width"] == 4 and record["fitted"]["epoch"] == 1
    assert record["dataset"] == fixtures.dataset().fingerprint


def test_a_second_run_reuses_what_has_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "item_mean", "running_bias"]
    assert main(arguments(tmp_path, *only)) == 0
    before = read(tmp_path, "running_bias").score
    capsys.readouterr()
    assert main(arguments(tmp_path, *only, "--running_bias.user_shrinkage=50")) == 0
    printed = capsys.readouterr().out
    assert "item_mean: reused" in printed and "running_bias: predictions written" in printed
    assert not np.array_equal(read(tmp_path, "running_bias").score, before)


def test_an_interrupted_run_is_not_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "item_mean"]
    assert main(arguments(tmp_path, *only)) == 0
    (tmp_path / "item_mean" / "baseline.json").unlink()  # it is written last
    stale = tmp_path / "item_mean" / "predictions" / "test" / "part-00007.parquet"
    (stale.parent / "part-00000.parquet").rename(stale)  # left by a run on more ranks
    capsys.readouterr()
    assert main(arguments(tmp_path, *only)) == 0
    assert "item_mean: predictions written" in capsys.readouterr().out
    assert [file.name for file in stale.parent.iterdir()] == ["part-00000.parquet"]


def test_packaged_settings_are_the_start_and_options_override_files(tmp_path: Path) -> None:
    packaged = load_settings([], [])
    (tmp_path / "mine.yaml").write_text("dlrm: {width: 8, lr: 0.5}\n")
    mine = load_settings([str(tmp_path / "mine.yaml")], ["--dlrm.lr", "0.25"])
    assert (mine.dlrm.width, mine.dlrm.lr, mine.dlrm.table_lr) == (8, 0.25, packaged.dlrm.table_lr)
    assert mine.running_bias == packaged.running_bias


@pytest.mark.parametrize("name", NAMES)
def test_packaged_settings_name_their_baseline(name: str, root: Path) -> None:
    content = yaml.safe_load((root / "configs" / "baselines" / f"{name}.yaml").read_text())
    assert list(content) == [name]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dlrm.widht=3"], "--dlrm.widht: unknown option (did you mean 'dlrm.width'?)"),
        (["--dlrm.batch=0"], "dlrm.batch: 0: must be >= 1"),
        (["--config", "no.yaml"], "--config: no.yaml: no such file"),
        (["--only", "dlm"], "argument --only: invalid choice: 'dlm'"),
        (["--dlrm.user_features=[contry]", "--only", "dlrm"], "dlrm.user_features: 'contry': unknown"),
        (["--dataset", "no-such-folder"], "no-such-folder is not a prepared dataset"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(arguments(tmp_path, *more))
    except SystemExit as left:
        status = left.code
    shown = capsys.readouterr().err.strip()
    assert status == 2 and shown.count("\n") == 0
    assert shown.startswith("hllm baselines: error: ") and message in shown
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.slow
def test_two_ranks_write_the_predictions_of_one(tmp_path: Path, root: Path) -> None:
    names = ["--only", "running_bias", "dlrm"]
    job = run_job("hllm_torchrec.launch.baselines", arguments(tmp_path / "two", *names), 2, root, tmp_path)
    assert main(arguments(tmp_path / "one", *names)) == 0
    for name in ("running_bias", "dlrm"):
        two, one = read(tmp_path / "two", name), read(tmp_path / "one", name)
        assert np.array_equal(two.user_id, one.user_id) and np.array_equal(two.position, one.position)
    one, two = (read(tmp_path / folder, "running_bias") for folder in ("one", "two"))
    assert two.score == pytest.approx(one.score, abs=1e-6)
    assert [printed.count("AUC [95%]") for printed, _ in job] == [2, 0]  # rank 0 alone prints
