"""Fuzz: metrics of predictions of every type, as files of every kind, equal scikit-learn's."""

import contextlib
import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from hllm_torchrec.launch.evaluate import build_parser, run
from hllm_torchrec.metrics.probabilities import PROBABILITY_FLOOR
from tests.fuzz.mutations import FEW, Target
from tests.helpers import fixtures

Draw = np.random.Generator
SCORES: dict[str, Callable[[Draw, int], NDArray]] = {
    "float64": lambda rng, n: rng.normal(size=n),
    "float32": lambda rng, n: rng.normal(size=n).astype(np.float32),
    "float16": lambda rng, n: rng.normal(size=n).astype(np.float16),
    "ties": lambda rng, n: rng.integers(0, 3, n) / 4,
    "int8": lambda rng, n: rng.integers(-128, 128, n, np.int8),
    "int64": lambda rng, n: rng.integers(-(2**63), 2**63, n, np.int64),
    "uint64": lambda rng, n: rng.integers(0, 2**64, n, np.uint64),
    "packed": lambda rng, n: 2**60 + rng.permutation(n),
    "neighbors": lambda rng, n: 1.0 + rng.integers(0, 5, n) * 2.0**-52,
    "tiny": lambda rng, n: rng.integers(-3, 4, n) * 5e-324,
    "huge": lambda rng, n: rng.choice([-math.inf, -1.7e308, -0.0, 0.0, 1.7e308, math.inf], n),
}
USERS: dict[str, Callable[[NDArray], NDArray]] = {
    "numbers": lambda users: users,
    "texts": lambda users: np.array([f"ü{user}" for user in users], object),
    "large": lambda users: users + 2**62,
    "padded": lambda users: np.array([f"{user:03d}" for user in users], object),
}
WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "csv": lambda frame, path: _with_csv(frame, path),
    "pandas": lambda frame, path: frame.to_csv(path, index=False),
    "arrow": lambda frame, path: pa.csv.write_csv(pa.Table.from_pandas(frame), path),
    "gzip": lambda frame, path: path.write_bytes(gzip.compress(frame.to_csv(index=False).encode())),
    "parquet": lambda frame, path: pq.write_table(pa.Table.from_pandas(frame), path, row_group_size=7),
}
ENDINGS = {"gzip": ".csv.gz", "parquet": ".parquet"}


def _with_csv(frame: pd.DataFrame, path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(frame.columns)
        rows.writerows(frame.astype(object).itertuples(index=False))


def check(mutation: Any) -> None:
    seed, n, kind, users, writer, weighted, rate = mutation
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "label": (rng.random(n) < rate).astype(np.int8),
            "score": SCORES[kind](rng, n),
            "probability": rng.random(n) * rng.integers(0, 2, n) if seed % 2 else rng.random(n),
            "user_id": USERS[users](rng.integers(0, 1 + n // 5, n)),
        }
    )
    if weighted:
        frame["weight"] = rng.integers(0, 5, n) / 4
    folder = fixtures.folder() / "fuzz-metrics"
    folder.mkdir(exist_ok=True)
    path = folder / f"rows{ENDINGS.get(writer, '.csv')}"
    WRITERS[writer](frame, path)
    arguments = ["--predictions", f"model={path}", "--draws", "0", "--no-tensorboard", "--split", "valid"]
    args = build_parser().parse_args([*arguments, "--output", str(folder / "out")])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run(args)
    except ValueError as error:
        assert weighted and frame["weight"].sum() == 0 and "weight" in str(error), error
        return
    found = json.loads((folder / "out" / "metrics-valid.json").read_text())["models"]["model"]
    for name, value in expected(frame).items():
        assert_equal(name, found[name], value)


def assert_equal(name: str, found: float | None, value: float) -> None:
    if math.isnan(value):
        assert found is None, f"{name}: {found} for one class only"
    else:
        assert found is not None and math.isclose(found, value, rel_tol=1e-9, abs_tol=1e-9), f"{name}: {found}, {value}"


def expected(frame: pd.DataFrame) -> dict[str, float]:
    """Metrics by scikit-learn; scores as their ranks among Python's numbers, which lose nothing."""
    kept = frame[frame["weight"] > 0] if "weight" in frame else frame
    weight = kept["weight"].to_numpy() if "weight" in frame else np.ones(len(kept))
    label, exact = kept["label"].to_numpy(), kept["score"].tolist()
    order = {value: place for place, value in enumerate(sorted(set(exact)))}
    rank = np.array([order[value] for value in exact], float)
    chance = kept["probability"].to_numpy()
    if not len(kept):
        return {"rows": 0, "auc": math.nan, "log_loss": math.nan}
    both = 0 < label.sum() < len(label)
    within, mass = [], []
    for _, place in kept.reset_index(drop=True).groupby("user_id").groups.items():
        if 0 < label[place].sum() < len(place):
            within.append(roc_auc_score(label[place], rank[place], sample_weight=weight[place]))
            mass.append(weight[place].sum())
    clipped = np.clip(chance, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return {
        "auc": roc_auc_score(label, rank, sample_weight=weight) if both else math.nan,
        "pr_auc": average_precision_score(label, rank, sample_weight=weight) if both else math.nan,
        "gauc": float(np.average(within, weights=mass)) if within else math.nan,
        "log_loss": sklearn_log_loss(label, clipped, sample_weight=weight, labels=[0, 1]),
        "brier": brier_score_loss(label, chance, sample_weight=weight, pos_label=1),
        "rows": len(kept),
    }


TARGET = Target(
    "metrics",
    st.tuples(
        st.integers(0, 2**32 - 1),
        st.integers(2, 40),
        st.sampled_from(list(SCORES)),
        st.sampled_from(list(USERS)),
        st.sampled_from(list(WRITERS)),
        st.booleans(),
        st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ),
    check,
)


@pytest.mark.slow
@FEW
@example((1, 12, "int64", "numbers", "csv", False, 0.5))
@example((2, 12, "uint64", "texts", "parquet", True, 0.5))
@example((3, 12, "packed", "padded", "parquet", False, 0.5))
@example((4, 12, "packed", "padded", "gzip", True, 0.5))
@example((5, 12, "huge", "large", "arrow", False, 0.5))
@given(TARGET.inputs)
def test_metrics_are_those_of_scikit_learn(mutation: Any) -> None:
    check(mutation)
