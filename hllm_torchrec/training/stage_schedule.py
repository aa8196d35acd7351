"""The steps of a run: stages of epochs of steps, their learning rates, and after which of them it is evaluated."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hllm_torchrec.config.schema import Config, StageConfig
from hllm_torchrec.training.optim import warmup_cosine


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

    @property
    def end(self) -> int:
        """Number of the first step behind it."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class RunSchedule:
    """All steps of a run. total_steps, warmup_steps: how many; evaluation_steps: those after which to evaluate."""

    segments: list[EpochSegment]
    total_steps: int
    warmup_steps: int
    evaluation_steps: frozenset[int]
    min_lr_ratio: float

    @classmethod
    def of(cls, config: Config, epoch_steps: Callable[[StageConfig, int], int]) -> "RunSchedule":
        """The schedule of a configuration; epoch_steps: steps of (stage, epoch)."""
        segments = epoch_segments(config.stages, epoch_steps)
        total = min(segments[-1].end, config.max_steps or segments[-1].end)
        warmup = max(1, round(config.optim.warmup * total))
        evaluated = evaluation_steps(segments, config.evaluation.every, total)
        return cls(segments, total, warmup, evaluated, config.optim.min_lr_ratio)

    def from_step(self, step: int) -> Iterator[EpochSegment]:
        """The segments with steps left after `step` steps."""
        return (segment for segment in self.segments if step < segment.end and segment.first_step < self.total_steps)

    def learning_rate_ratio(self, step: int) -> float:
        """Share of the full learning rates for the update after `step` updates."""
        return warmup_cosine(step, self.warmup_steps, self.total_steps, self.min_lr_ratio)

    def end_to_end_steps(self, step: int) -> int:
        """Of the first `step` steps, those in which item embeddings come from the Item LLM, with gradients."""
        live = (segment for segment in self.segments if segment.stage.item_embeddings == "trained")
        return sum(max(0, min(step, segment.end) - segment.first_step) for segment in live)


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
