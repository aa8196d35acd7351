"""Predictions of each task from the outputs of a model's head, for serving. Legend: m candidates, O outputs."""

import numpy as np
import torch
from numpy.typing import NDArray

from hllm_torchrec.evaluation.calibration import RunCalibration
from hllm_torchrec.models.hllm import HLLM

_UNSCALED = torch.tensor([[0.0, 1.0]])


def output_shape(hllm: HLLM) -> tuple[int, ...]:
    """Shape of the outputs for one candidate: () if the model has a single logit, else (O,)."""
    return () if hllm.has_one_logit else (sum(task.outputs for task in hllm.tasks),)


def predictions_by_task(
    hllm: HLLM, outputs: NDArray[np.float32], calibration: RunCalibration | None
) -> dict[str, NDArray[np.float32]]:
    """Task name -> predictions [m], from logits [m] or outputs [m, O].

    Probabilities of the tasks that `calibration` has are calibrated.
    """
    sizes = [task.outputs for task in hllm.tasks]
    parts = torch.from_numpy(outputs.reshape(len(outputs), sum(sizes))).split(sizes, dim=1)
    scales = _UNSCALED if hllm.has_one_logit else hllm.task_scales.cpu()
    calibrators = {} if calibration is None else calibration.tasks
    predictions = {}
    for index, (task, part, scale) in enumerate(zip(hllm.tasks, parts, scales, strict=True)):
        calibrator = calibrators.get(task.name if index else "")  # the first task's calibrator has the name ""
        values = task.predictions(part, scale).numpy() if calibrator is None else calibrator(part[:, 0].numpy())
        predictions[task.name] = values.astype(np.float32, copy=False)
    return predictions
