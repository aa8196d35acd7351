"""Calibration of a run's probabilities: functions of the logit, fitted to its validation part by `hllm calibrate`.

    platt         p = sigmoid(a z + b)
    temperature   p = sigmoid(z / T)
    isotonic      p is the isotonic regression of the label on z, linear between its steps

The run's calibration.json has one function for each binary task whose labels have both classes, and the fingerprint of
the weights whose logits the functions map. Calibration does not change the scores, and so not the order of the rows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.predictions import PredictionColumns
from hllm_torchrec.evaluation.prediction_layout import RAW

FILE = "calibration.json"
METHODS = ("platt", "isotonic", "temperature")
_LEAST = 1e-7
"""Minimum probability of isotonic regression; the maximum is 1 - _LEAST."""


@dataclass(frozen=True)
class Calibrator:
    """Function from logits to probabilities.

    x, y: for isotonic, the points between which the function is linear; otherwise x is the slope a (1 / T) and y the
    intercept b (0), one number each.
    """

    method: Literal["platt", "isotonic", "temperature"]
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities [n] of logits [n]."""
        z = logits.astype(np.float64)
        if self.method == "isotonic":
            return np.interp(z, self.x, self.y)
        return 1 / (1 + np.exp(-np.clip(self.x[0] * z + self.y[0], -700, 700)))


@dataclass(frozen=True)
class RunCalibration:
    """Calibrators of a run's binary tasks by name; the name of the first label is ""."""

    weights: str
    """Fingerprint of the weights (`run_loader.weights_fingerprint`)."""
    tasks: Mapping[str, Calibrator]

    @classmethod
    def load(cls, run: Path) -> "RunCalibration | None":
        """Load the calibration of a run directory; None if it has none.

        Raises:
            ValueError: the file is damaged.
        """
        path = run / FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tasks = {
                name: Calibrator(one["method"], tuple(map(float, one["x"])), tuple(map(float, one["y"])))
                for name, one in content["tasks"].items()
            }
            if any(one.method not in METHODS or not one.x or len(one.x) != len(one.y) for one in tasks.values()):
                raise ValueError("unknown method, or x and y have different lengths")
            return cls(str(content["weights"]), tasks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); run `hllm calibrate` again, or remove it") from error

    def save(self, run: Path) -> Path:
        """Write the run's calibration.json; returns its path."""
        replace_file(run / FILE, json.dumps(self.to_json(), indent=1) + "\n")
        return run / FILE

    def to_json(self) -> dict[str, Any]:
        """The content of calibration.json."""
        tasks = {name: {"method": one.method, "x": one.x, "y": one.y} for name, one in self.tasks.items()}
        return {"weights": self.weights, "tasks": tasks}

    def applied(self, columns: PredictionColumns) -> PredictionColumns:
        """Predictions with calibrated probabilities, and the uncalibrated ones in columns `raw_probability...`."""
        found = dict(columns)
        for name, calibrator in self.tasks.items():
            column = f"probability{name and '_'}{name}"
            found[f"{RAW}{column}"] = columns[column]
            found[column] = calibrator(columns[f"score{name and '_'}{name}"]).astype(np.float32)
        return found


def fit_calibration(predictions: Path, weights: str, method: str) -> RunCalibration:
    """Fit a calibrator for each binary task to predictions of the validation part.

    Raises:
        ValueError: the labels of the first task are of one class (a further task of one class is left out, with a
            caution), or scikit-learn is not installed.
    """
    table = pq.read_table(predictions)
    names = [name.removeprefix("label") for name in table.column_names if name.startswith("label")]
    own = [name.removeprefix("_") for name in names if f"probability{name}" in table.column_names]
    sample = table["weight"].to_numpy() if "weight" in table.column_names else np.ones(len(table))
    tasks = {}
    for name in own:
        suffix = f"{name and '_'}{name}"
        label, score = table[f"label{suffix}"].to_numpy(), table[f"score{suffix}"].to_numpy().astype(np.float64)
        kept = ~np.isnan(label) & (sample > 0)
        if np.unique(label[kept]).size > 1:
            tasks[name] = _fit(method, score[kept], label[kept] > 0.5, sample[kept])
        elif name:
            say(f"caution: the labels of {name} are of one class: its probabilities are not calibrated")
        else:
            raise ValueError(f"{predictions}: the labels of the first task are of one class: nothing to fit")
    return RunCalibration(weights, tasks)


def _fit(method: str, scores: NDArray[np.float64], labels: NDArray[np.bool_], weights: NDArray[Any]) -> Calibrator:
    """Fit one calibrator to logits [n] and labels [n]."""
    try:  # the import takes a second, and only this job needs it
        from sklearn.isotonic import IsotonicRegression
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValueError(
            "fitting a calibration needs scikit-learn: pip install 'scikit-learn>=1.9,<2', or the extra calibrate of "
            "hllm_torchrec"
        ) from error

    if method == "isotonic":
        fitted = IsotonicRegression(y_min=_LEAST, y_max=1 - _LEAST, out_of_bounds="clip")
        fitted.fit(scores, labels, sample_weight=weights)
        return Calibrator("isotonic", tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))
    model = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-8, max_iter=1000)
    model.fit(scores[:, None], labels, sample_weight=weights)
    intercept = float(model.intercept_[0]) if method == "platt" else 0.0
    kind: Literal["platt", "temperature"] = "platt" if method == "platt" else "temperature"
    return Calibrator(kind, (float(model.coef_[0, 0]),), (intercept,))
