"""Which steps a run takes: stages of epochs of steps, and after which of them it is evaluated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hllm_torchrec.config import StageConfig


@dataclass(frozen=True)
class Leg:
    """Consecutive steps of one epoch in one stage.

    epoch: number of the epoch in the run, which the shuffle depends on; first: number of the leg's first step
    in the run; steps: how many it has; epoch_steps: how many the whole epoch has; opens_stage: whether it is
    its stage's first.
    """

    stage: StageConfig
    epoch: int
    first: int
    steps: int
    epoch_steps: int
    opens_stage: bool


def plan_legs(stages: Sequence[StageConfig], epoch_steps: Callable[[StageConfig, int], int]) -> list[Leg]:
    """Lay the stages' epochs end to end; the last epoch of a stage may be a fraction (of one step at least).

    epoch_steps: steps of (stage, epoch).
    """
    legs: list[Leg] = []
    first = epoch = 0
    for stage in stages:
        left, opens = stage.epochs, True
        while left > 1e-9:
            whole = epoch_steps(stage, epoch)
            steps = max(1, round(min(left, 1.0) * whole))
            legs.append(Leg(stage, epoch, first, steps, whole, opens))
            first, epoch, left, opens = first + steps, epoch + 1, left - 1.0, False
    return legs


def evaluation_steps(legs: Sequence[Leg], every: float, total: int) -> frozenset[int]:
    """Numbers of steps after which to evaluate: each time `every` more epochs are done, and at the end.

    every: epochs, counted over all stages; total: steps of the run.
    """
    chosen = {total}
    epochs_done = 0.0
    for leg in legs:
        share = leg.steps / leg.epoch_steps
        nearest = 1e-6 / leg.epoch_steps  # sums of fractions miss whole numbers by rounding
        multiple = math.floor((epochs_done + nearest) / every) + 1
        while (within := multiple * every - epochs_done) <= share + nearest:
            chosen.add(leg.first + max(1, math.ceil((within - nearest) * leg.epoch_steps)))
            multiple += 1
        epochs_done += share
    return frozenset(step for step in chosen if step <= total)
