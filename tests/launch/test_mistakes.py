"""Every subcommand, given what is missing, cut short or misspelt: status 2, one line, no traceback."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.config.loading import save_config
from hllm_torchrec.evaluation.regression_gate import EXIT_STATUS
from hllm_torchrec.launch.cli import COMMANDS, main
from hllm_torchrec.launch.entry import STATUSES
from tests.helpers import fixtures

HALF = "half-"
"""Files of this beginning are whole ones, cut in the middle."""


@cache
def folder() -> Path:
    """What the command lines name: a plain file, an empty folder, halves of files, a run with half a configuration."""
    root = fixtures.folder() / "mistakes"
    root.mkdir()
    (root / "file").write_text("nothing of use\n")
    (root / "empty").mkdir()
    shutil.copytree(fixtures.dataset().root, root / "dataset")
    shutil.copytree(root / "dataset", root / "half-dataset")
    _halve(root / "dataset" / "manifest.json", root / "half-dataset" / "manifest.json")
    for name in ("run", "half-run"):
        save_config(fixtures.config(output=str(root / name)), root / name / "config.yaml")
    whole = (root / "run" / "config.yaml").read_text()
    # In the middle of a key: where half of the bytes end depends on the folder's name, and it may be a whole model.
    (root / "half-run" / "config.yaml").write_text(whole[: whole.index("hidden_size", whole.index("user:")) + 6])
    shutil.copy(root / "half-run" / "config.yaml", root / "half.yaml")
    pq.write_table(pa.table({"label": [0.0, 1.0] * 50, "score": [0.5, 0.7] * 50}), root / "rows.parquet")
    _halve(root / "rows.parquet", root / "half.parquet")
    (root / "half.csv").write_text("label,score\n1,0.5\n0")
    (root / "half.json").write_text('{"schema_version": 2, "mod')
    (root / "half-report").mkdir()
    shutil.copy(root / "half.json", root / "half-report" / "metrics.json")
    (root / "half-store").mkdir()
    (root / "half-store" / "store.json").write_text('{"format": 1, "wid')
    mapping = fixtures.write_shop(root / "shop").read_text()
    pq.write_table(pa.table({"sku": ["s1"] * 50}), root / "shop" / "items.parquet")
    _halve(root / "shop" / "items.parquet", root / "shop" / "half.parquet")
    (root / "shop" / "half.yaml").write_text(mapping.replace("items.csv", "half.parquet"))
    return root


def _halve(file: Path, target: Path) -> None:
    data = file.read_bytes()
    target.write_bytes(data[: len(data) // 2])


MODEL = "--checkpoint {file} --item-llm {empty} --user-llm {empty} --output {new}"
LINES = {
    "fetch": ["nothing", "ml-100k --local {missing}", "ml-100k --local {file}", "ml-100k --local {empty}", "--what"],
    "prepare": [
        "--source table --output {new}",
        "--source table --path {missing} --output {new}",
        "--source table --path {empty} --output {new}",
        "--source table --path {root}/half.yaml --output {new}",
        "--source table --path {root}/shop/half.yaml --output {new}",
        "--source table --path {root}/shop/mapping.yaml --output {file}",
        "--source ml-100k --path {empty} --output {new}",
        "--source pixelrec --path {file} --items {missing} --output {new}",
        "--source amazon --path {file} --items {file} --output {new}",
        "--source table --path {root}/shop/mapping.yaml --output {new} --bad-rows bad_tmie=drop",
        "--source table --path {root}/shop/mapping.yaml --output {new} --fractions 1 1 1",
        "--source table --path {root}/shop/mapping.yaml --output {missing} --append",
        "--source table --path {root}/shop/mapping.yaml --output {root}/half-dataset --append",
        "--source shop --output {new}",
    ],
    "dataset": [
        "info {missing}",
        "info {file}",
        "compact {empty}",
        "compact {root}/half-dataset",
        "prune {missing}",
        "prune {root}/half-dataset",
        "look {empty}",
        "info",
    ],
    "seal": ["{missing}", "{file}", "{empty}", "{root}/dataset", "--what"],
    "init": [
        "",
        "--data {missing}",
        "--data {root}/half-dataset",
        "--data {root}/dataset --task shopping",
        "--data {root}/dataset --output {file}",
    ],
    "train": [
        "--recipe ranking --data.dataset {missing}",
        "--config {missing}",
        "--config {empty}",
        "--config {root}/half.yaml",
        "--config {root}/run/config.yaml --seed x",
        "--config {root}/run/config.yaml --output {new} --data.dataset {missing}",
        "--config {root}/run/config.yaml --output {new} --data.dataset {root}/half-dataset",
        "--config {root}/run/config.yaml --output {file}",
        "--sede 1",
    ],
    "evaluate": [
        "",
        "--run-dir {missing}",
        "--run-dir {file}",
        "--run-dir {root}/half-run",
        "--run-dir {root}/run",
        "--run-dir {root}/run --checkpoint {missing}",
        "--run-dir {root}/run --checkpoint {empty}",
        "--predictions a={missing}",
        "--predictions a={empty}",
        "--predictions a={root}/half.parquet",
        "--predictions a={root}/half.csv",
        "--predictions a={root}/rows.parquet --score points",
        "--predictions a={root}/rows.parquet --train {missing} --item-id x",
        "--predictions a={root}/rows.parquet --baseline {root}/half.json --no-tensorboard --draws 0",
        "--predictions a={root}/rows.parquet --baseline {empty} --no-tensorboard --draws 0",
        "--predictions a",
        "--compare {file}",
        "--memory much",
    ],
    "baselines": [
        "--dataset {missing}",
        "--dataset {file}",
        "--dataset {root}/half-dataset",
        "--dataset {root}/dataset --config {missing}",
        "--dataset {root}/dataset --config {empty}",
        "--dataset {root}/dataset --dlrm.lr x",
        "--dataset {root}/dataset --output {file} --only item_mean",
        "--only nothing",
    ],
    "embed": [
        "--run {missing} --items {new}",
        "--run {file} --items {new}",
        "--run {root}/half-run --items {new}",
        "--run {root}/run --items {new}",
        "--run {root}/run",
        "--run {root}/run --since yesterday --items {new}",
    ],
    "nightly": [
        "",
        "--config {missing}",
        "--config {empty}",
        "--config {root}/half.parquet",
        "--config {root}/half.parquet --steps sleep",
    ],
    "adopt": ["", "--run {missing} --dataset {root}/dataset", "--run {root}/run --dataset {missing}"],
    "check-model": ["", "--model {missing}", "--model {empty}", "--model {root}/dataset --max-text-length 0"],
    "forget": [
        "",
        "--dataset {root}/dataset",
        "--dataset {missing} --user a",
        "--dataset {root}/half-dataset --user a",
        "--dataset {root}/dataset --users-file {missing}",
        "--dataset {root}/dataset --user a --runs {missing} --dry-run",
    ],
    "rollback": ["", "--folder {missing}", "--folder {empty} --to x"],
    "exposures": [
        "--run {missing} --users {new}",
        "--run {root}/half-run --users {new}",
        "--run {root}/run --users {new}",
        "--run {root}/run",
        "--run {root}/run --users {new} --modes weekly",
    ],
    "downstream": [
        "--config {missing}",
        "--config {empty}",
        "--dataset {missing} --output {new}",
        "--dataset {root}/half-dataset --output {new}",
        "--dataset {root}/dataset --output {new} --item_store {missing}",
        "--dlrm.lr x",
        "--what 1",
    ],
    "store": [
        "info {missing}",
        "info {file}",
        "verify {empty}",
        "verify {root}/half-store",
        "export {missing} --parquet {new}",
        "delete {root}/half-store --ids {missing}",
        "look {empty}",
        "info",
    ],
    "creatives": [
        "",
        "build --dataset {missing} --name x",
        "build --dataset {root}/half-dataset --name x",
        "build --dataset {root}/dataset --name x --feature color",
        "build --dataset {root}/dataset --name x --fractions 1 1 1",
        "build --dataset {root}/dataset",
        "info --dataset {root}/dataset --name {new}",
        "show --dataset {root}/dataset --name x",
        "evaluate --run {missing}",
        "evaluate --run {root}/run",
        "evaluate",
        "titles --creatives {missing} --item a",
        "titles --creatives {empty} --item a",
        "titles --creatives {empty}",
    ],
    "cluster": [
        "",
        "--users {missing} --clusters 2 --output {new}",
        "--users {root}/half-store --clusters 2 --output {new}",
        "--users {empty} --output {new} --clusters 0",
        "--users {empty} --output {new} --metric dot",
    ],
    "create": [
        "",
        "--run {missing} --clusters {empty} --output {new}",
        "--run {root}/run --clusters {empty} --output {new}",
        "--run {root}/run --clusters {missing} --output {new} --top many",
        "--run {root}/run --clusters {missing} --output {new} --above 2",
    ],
    "index": ["--run {missing} --output {new}", "--run {root}/run --output {file}", "--run {root}/run --output {new}"],
    "retrieval": [
        "--dataset {missing}",
        "--dataset {root}/half-dataset",
        "--dataset {root}/dataset",
        "--dataset {root}/dataset --ease_l2 x",
    ],
    "report": ["--run {missing}", "--run {file}", "--run {empty}", "--run {root}/half-report", ""],
    "plan": [
        "--config {missing}",
        "--config {empty}",
        "--config {root}/half.yaml",
        "--config {root}/run/config.yaml --nodes 0",
        "--config {root}/run/config.yaml --data.dataset {missing}",
        "--config {root}/run/config.yaml --data.dataset {root}/half-dataset",
        "--config {root}/run/config.yaml --hardware abacus",
    ],
    "serve": [
        "--run {missing}",
        "--run {root}/half-run",
        "--run {root}/run",
        "--run {root}/run --host 0.0.0.0",
        "--run {root}/run --token-file {missing}",
        "--run {root}/run --token-file {file}",
        "--run {root}/run --deadline 0",
        "--run {root}/run --items {empty} --state {empty}",
        "--run {root}/run --creatives {empty}",
    ],
    "loadtest": [
        "--dataset {missing}",
        "--dataset {root}/half-dataset",
        "--dataset {root}/dataset --url http://127.0.0.1:1",
        "--dataset {root}/dataset --url nowhere",
        "--dataset {root}/dataset --rates 1,0",
        "--dataset {root}/dataset --context device=phone",
    ],
    "calibrate": [
        "--run {missing}",
        "--run {root}/half-run",
        "--run {root}/run --checkpoint {missing}",
        "--run {root}/run --method plat",
    ],
    "recommend": ["--run {missing} --user u1", "--run {root}/half-run --user u1", "--run {root}/run --user u1", ""],
    "import-hllm": [
        MODEL,
        MODEL.replace("{file}", "{missing}"),
        MODEL.replace("{file}", "{empty}"),
        MODEL.replace("{file}", "{root}/half.parquet"),
        MODEL.replace("{new}", "{file}"),
        f"{MODEL} --dataset {{missing}}",
        f"{MODEL} --max-history many",
    ],
    "export-tower": [
        "--run {missing} --output {root}/tower.pt2",
        "--run {root}/half-run --output {root}/tower.pt2",
        "--run {root}/run --output {root}/tower.pt2",
        "--run {root}/run --output {file}",
    ],
    "export-hf": [
        "--run {missing} --output {new}",
        "--run {root}/half-run --output {new}",
        "--run {root}/run --output {new}",
        "--run {root}/run --output {file}",
    ],
}


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[list[str]], tuple[int, list[str]]]:
    """Runs a command line in this process; its exit status and the lines on stderr that are not progress."""

    def run(words: list[str]) -> tuple[int, list[str]]:
        try:
            found = main(words)
        except SystemExit as left:
            found = int(left.code or 0)
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return found, [line for line in errors.splitlines() if "error:" in line or line.startswith(" ")]

    return run


def test_no_subcommand_is_forgotten() -> None:
    assert LINES.keys() == COMMANDS.keys()


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, lines in LINES.items() for line in lines])
def test_a_mistake_is_one_line_and_status_2(
    command: str, line: str, status: Callable[[list[str]], tuple[int, list[str]]], tmp_path: Path
) -> None:
    root = folder()
    names = {"root": root, "file": root / "file", "empty": root / "empty", "missing": root / "missing"}
    found, said = status([command, *line.format(**names, new=tmp_path / "new").split()])
    assert (found, len(said)) == (2, 1), said
    assert len(said[0]) < 1500
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").rglob("*.json"))
    assert not names["missing"].exists(), "the command made what is missing"


@pytest.mark.parametrize("words", [["nothing"], ["--nothing"], ["trian", "--config", "x"]])
def test_an_unknown_subcommand_is_one_line(
    words: list[str], status: Callable[[list[str]], tuple[int, list[str]]]
) -> None:
    found, said = status(words)
    assert (found, len(said)) == (2, 1) and "hllm: error:" in said[0]


def test_the_help_and_the_document_have_every_exit_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out.partition("exit status:")[2]
    document = (root / "docs" / "reliability.md").read_text().partition("## Exit statuses")[2].partition("\n## ")[0]
    for number, meaning in STATUSES.items():
        assert f"{number}" in printed and meaning in printed
        assert f"| {number} |" in document
    assert set(EXIT_STATUS.values()) <= STATUSES.keys()


def test_a_gate_that_fails_has_its_own_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label, noise = np.tile([0.0, 1.0], 300), np.random.default_rng(0).normal(size=600)
    rows = {"label": label, "good": label + noise, "bad": noise}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    named = ["--predictions", f"new={tmp_path / 'rows.parquet'}", f"old={tmp_path / 'rows.parquet'}"]
    quick = ["--draws", "0", "--no-tensorboard", "--output", str(tmp_path / "out")]
    worse = ["--score", "new=bad", "old=good", "--baseline", "old"]
    assert main(["evaluate", *named, *quick, *worse]) == 3
    assert main(["evaluate", *named, *quick, "--score", "new=good", "old=bad", "--baseline", "old"]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["gate"]["status"] == "pass"
    assert "FAIL" in capsys.readouterr().out
