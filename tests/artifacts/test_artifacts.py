"""What an earlier version saved is read, evaluates to the same numbers and trains on as it would have then.

`saved/` holds runs of each kind, stores, a dataset and predictions, made by `make.py`, which says why they are never
made again. Where this machine computes as theirs did (`numerics`), numbers are compared bit for bit; elsewhere within
TOLERANCE, and a warning says so.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock

from tests.artifacts import jobs
from tests.artifacts.numerics import SETTINGS

pytestmark = pytest.mark.slow

SAVED = Path(__file__).parent / "saved"
RECORDED: dict[str, Any] = json.loads((SAVED / "recorded.json").read_text())
REDEFINED: dict[str, Any] = json.loads((SAVED.parent / "redefined.json").read_text())
"""Kind of run -> the recorded numbers that a change of their definition has moved. Retrieval: `evaluation.filter_seen`
leaves out the items of the complete history, no longer those of its latest `max_history` - 1 events alone."""
NEEDS = {"lora": "peft"}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind in NEEDS and find_spec(NEEDS[kind]) is None, reason="no peft"))
    for kind in RECORDED["runs"]
]
TOLERANCE = 1e-5
"""Relative to the larger number, or to 1."""


@pytest.fixture(scope="module")
def scratch(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `replay.py` has done every job on a copy of the artifacts; one for all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "artifacts"
    with FileLock(f"{folder}.lock"):
        if not (folder / "found.json").is_file():
            replay(root, folder)
    return folder


def replay(root: Path, folder: Path) -> None:
    command = [sys.executable, str(root / "tests/artifacts/replay.py"), str(SAVED), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= SETTINGS | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def replayed(scratch: Path) -> dict[str, Any]:
    """Job -> what it gave."""
    return dict(json.loads((scratch / "found.json").read_text()))


@pytest.fixture(scope="module")
def tolerance(replayed: dict[str, Any]) -> float:
    """0 where this machine computes as the artifacts' did, else TOLERANCE."""
    found = found_by(replayed, "numerics")
    unlike = [name for name, numbers in RECORDED["probe"].items() if found["probe"].get(name) != numbers]
    recorded = RECORDED["made_by"]["packages"]
    unlike += [f"{name} {version}" for name, version in found["packages"].items() if recorded.get(name) != version]
    if not unlike:
        return 0.0
    warnings.warn(f"artifacts are compared within {TOLERANCE}, not bit for bit: {', '.join(unlike)}", stacklevel=1)
    return TOLERANCE


def found_by(replayed: dict[str, Any], name: str) -> Any:
    """What a job gave; its traceback, if it failed, fails the test."""
    assert "error" not in replayed[name], replayed[name]["error"]
    return replayed[name]["found"]


def differences(found: Any, expected: Any, tolerance: float, place: str = "") -> list[str]:
    """Where `found` lacks something of `expected` or has another value; what it has besides is no difference."""
    if isinstance(expected, dict) and isinstance(found, dict):
        missing = [f"{place}.{name} is missing" for name in expected if name not in found]
        both = [name for name in expected if name in found]
        return missing + [d for n in both for d in differences(found[n], expected[n], tolerance, f"{place}.{n}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected))
        return [d for i, pair in pairs for d in differences(*pair, tolerance, f"{place}[{i}]")]
    mine, other = as_number(found), as_number(expected)
    if isinstance(mine, float) and isinstance(other, float):
        same = abs(mine - other) <= tolerance * max(1.0, abs(mine), abs(other))
    else:
        same = type(mine) is type(other) and mine == other
    return [] if same else [f"{place}: {found!r}, it was {expected!r}"]


def as_number(value: Any) -> Any:
    """Text of `float.hex()` as the number it stands for."""
    return float.fromhex(value) if isinstance(value, str) and value.lstrip("-").startswith("0x") else value


def test_a_difference_of_one_bit_is_seen() -> None:
    value = RECORDED["runs"]["late"]["loss"][0]
    other = float(np.nextafter(float.fromhex(value), 9.0)).hex()
    assert differences({"a": [value]}, {"a": [value]}, 0.0) == []
    assert differences({"a": [other]}, {"a": [value]}, 0.0) == [f".a[0]: {other!r}, it was {value!r}"]
    assert differences({"a": [other]}, {"a": [value]}, TOLERANCE) == []
    assert differences({"a": ["0x1p+0"]}, {"a": ["0x1.001p+0"]}, TOLERANCE)
    assert differences({}, {"a": None}, TOLERANCE) == [".a is missing"]
    assert differences({"a": [1]}, {"a": [1, 2]}, 0.0) and differences({"a": None}, {"a": 1.0}, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_configuration_is_read_with_all_its_values(kind: str, replayed: dict[str, Any]) -> None:
    saved = yaml.safe_load((SAVED / "trained" / kind / "config.yaml").read_text())
    found = found_by(replayed, f"configuration {kind}")
    assert differences(found, saved, 0.0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_evaluates_to_the_same_predictions_and_metrics(
    kind: str, replayed: dict[str, Any], tolerance: float
) -> None:
    run = SAVED / "trained" / kind
    expected = {"scores": jobs.scores(run), "metrics": jobs.metrics(run)}
    assert expected["scores"]
    if kind in REDEFINED:
        before, now = expected["scores"]["retrieval"]["rank"], REDEFINED[kind]["rank"]
        assert all(new <= old for new, old in zip(now, before, strict=True)), "fewer candidates"
        expected["scores"]["retrieval"]["rank"] = now
        expected["metrics"]["retrieval"] |= REDEFINED[kind]["retrieval"]
    assert differences(found_by(replayed, f"evaluate {kind}"), expected, tolerance) == []


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_saved_checkpoint_as_it_did(
    kind: str, replayed: dict[str, Any], tolerance: float
) -> None:
    recorded = RECORDED["runs"][kind]
    step = recorded["kept_step"]
    expected = {name: recorded[name][step:] for name in ("loss", "grad_norm")}
    assert len(expected["loss"]) >= 3
    expected["last_evaluation"] = recorded["last_evaluation"] | REDEFINED.get(kind, {}).get("last_evaluation", {})
    assert differences(found_by(replayed, f"resume {kind}"), expected, tolerance) == []


def test_metrics_of_saved_predictions_and_their_comparison_are_the_same(
    replayed: dict[str, Any], tolerance: float
) -> None:
    expected = jobs.metrics(SAVED / "compared")
    assert len(expected["models"]) > 5
    assert differences(found_by(replayed, "compare"), expected, tolerance) == []


@pytest.mark.parametrize("store", list(RECORDED["stores"]))
def test_a_saved_store_has_the_same_vectors(store: str, replayed: dict[str, Any]) -> None:
    assert found_by(replayed, f"read {store}") == RECORDED["stores"][store]


def test_embedding_into_a_saved_store_finds_nothing_new(replayed: dict[str, Any]) -> None:
    """So the marks of weights, tokens and users' events are what they were."""
    assert found_by(replayed, "embed in place") == jobs.digests(SAVED / "stores")


def test_embedding_anew_gives_the_vectors_of_the_saved_store(replayed: dict[str, Any], tolerance: float) -> None:
    half = tolerance and 2**-10  # a last place of float16, which stores have
    assert differences(found_by(replayed, "embed again"), RECORDED["stores"], half) == []


def test_a_saved_dataset_is_what_its_source_is_prepared_to(replayed: dict[str, Any], scratch: Path) -> None:
    saved = jobs.digests(SAVED / "dataset")
    assert found_by(replayed, "prepare in place") == saved  # taken for the same: nothing was written
    found_by(replayed, "prepare again")
    manifest, again = (json.loads((f / "manifest.json").read_text()) for f in (SAVED / "dataset", scratch / "again"))
    own = ("files", "fingerprint")  # of bytes that depend on pyarrow's version
    assert differences(again, {name: value for name, value in manifest.items() if name not in own}, 0.0) == []
    assert again["files"].keys() == manifest["files"].keys()
    for name in manifest["files"]:
        if name.endswith(".parquet"):
            tables = [pq.read_table(folder / name) for folder in (SAVED / "dataset", scratch / "again")]
            assert tables[0].equals(tables[1], check_metadata=True), name
        else:
            assert (scratch / "again" / name).read_bytes() == (SAVED / "dataset" / name).read_bytes(), name


def test_saved_tokens_are_taken_for_what_the_runs_need(replayed: dict[str, Any]) -> None:
    """No job has tokenised anew, or written into the dataset at all."""
    assert found_by(replayed, "files of the dataset") == jobs.digests(SAVED / "dataset")


def test_the_artifacts_are_small_and_name_no_place_outside_of_them() -> None:
    files = [path for path in SAVED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    for path in files:
        if path.suffix in (".yaml", ".json", ".jsonl"):
            assert re.search(r"""["' ]/""", path.read_text()) is None, path
