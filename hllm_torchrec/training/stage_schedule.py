"""Which steps a run takes: stages of epochs of steps, and after which of them it is evaluated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hllm_torchrec.config.schema import StageConfig


@dataclass(frozen=True)
class EpochSegment:
    """Consecutive steps of one epoch in one stage.

    epoch: number of the epoch in the run, which the shuffle depends on; first_step: number of the segment's first step
    in the run; steps: how many it has; epoch_steps: how many the whole epoch has; is_first_of_stage: whether it is
    its stage's first.
    """

    stage: StageConfig
    epoch: int
    first_step: int
    steps: int
    epoch_steps: int
    is_first_of_stage: bool


def epoch_segments(stages: Sequence[StageConfig], epoch_steps: Callable[[StageConfig, int], int]) -> list[EpochSegment]:
    """Lay the stages' epochs end to end; the last epoch of a stage may be a fraction (of one step at least).

    epoch_steps: steps of (stage, epoch).
    """
    segments: list[EpochSegment] = []
    first = epoch = 0
    for stage in stages:
        left, opens = stage.epochs, True
        while left > 1e-9:
            whole = epoch_steps(stage, epoch)
            steps = max(1, round(min(left, 1.0) * whole))
            segments.append(EpochSegment(stage, epoch, first, steps, whole, opens))
            first, epoch, left, opens = first + steps, epoch + 1, left - 1.0, False
    return segments


def evaluation_steps(segments: Sequence[EpochSegment], every: float, total: int) -> frozenset[int]:
    """Numbers of steps after which to evaluate: each time `every` more epochs are done, and at the end.

    every: epochs, counted over all stages; total: steps of the run.
    """
    chosen = {total}
    epochs_done = 0.0
    for segment in segments:
        share = segment.steps / segment.epoch_steps
        nearest = 1e-6 / segment.epoch_steps  # sums of fractions miss whole numbers by rounding
        multiple = math.floor((epochs_done + nearest) / every) + 1
        while (within := multiple * every - epochs_done) <= share + nearest:
            chosen.add(segment.first_step + max(1, math.ceil((within - nearest) * segment.epoch_steps)))
            multiple += 1
        epochs_done += share
    return frozenset(step for step in chosen if step <= total)
