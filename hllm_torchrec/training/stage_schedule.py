"""Schedule of a run: stages, epochs and steps, learning rates, and the steps after which it is evaluated."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hllm_torchrec.config.schema import Config, StageConfig
from hllm_torchrec.training.optim import warmup_cosine


@dataclass(frozen=True)
class EpochSegment:
    """Steps of one epoch, or of a fraction of an epoch, in one stage.

    epoch: index of the epoch in the run, on which the shuffle depends; first_step: index of the segment's first step in
    the run; steps: number of steps; epoch_steps: number of steps of the complete epoch; is_first_of_stage: True for the
    first segment of its stage.
    """

    stage: StageConfig
    epoch: int
    first_step: int
    steps: int
    epoch_steps: int
    is_first_of_stage: bool

    @property
    def end(self) -> int:
        """Index of the first step after the segment."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class RunSchedule:
    """All steps of a run. total_steps, warmup_steps: counts; evaluation_steps: steps after which to evaluate."""

    segments: list[EpochSegment]
    total_steps: int
    warmup_steps: int
    evaluation_steps: frozenset[int]
    min_lr_ratio: float

    @classmethod
    def of(cls, config: Config, epoch_steps: Callable[[StageConfig, int], int]) -> "RunSchedule":
        """Build the schedule of a configuration; epoch_steps: function (stage, epoch) -> steps of the epoch."""
        segments = epoch_segments(config.stages, epoch_steps)
        total = min(segments[-1].end, config.max_steps or segments[-1].end)
        warmup = max(1, round(config.optim.warmup * total))
        evaluated = evaluation_steps(segments, config.evaluation.every, total)
        return cls(segments, total, warmup, evaluated, config.optim.min_lr_ratio)

    def from_step(self, step: int) -> Iterator[EpochSegment]:
        """Return the segments that have steps left after `step` steps."""
        return (segment for segment in self.segments if step < segment.end and segment.first_step < self.total_steps)

    def learning_rate_ratio(self, step: int) -> float:
        """Factor of the learning rates for the update after `step` updates."""
        return warmup_cosine(step, self.warmup_steps, self.total_steps, self.min_lr_ratio)

    def end_to_end_steps(self, step: int) -> int:
        """Number of steps, among the first `step`, in stages with `item_embeddings: trained`."""
        live = (segment for segment in self.segments if segment.stage.item_embeddings == "trained")
        return sum(max(0, min(step, segment.end) - segment.first_step) for segment in live)


def epoch_segments(stages: Sequence[StageConfig], epoch_steps: Callable[[StageConfig, int], int]) -> list[EpochSegment]:
    """Concatenate the epochs of all stages; the last epoch of a stage may be a fraction (at least one step).

    epoch_steps: function (stage, epoch) -> steps of the epoch.
    """
    segments: list[EpochSegment] = []
    first = epoch = 0
    for stage in stages:
        left, opens = stage.epochs, True
        while left > 1e-9:  # not 0: 2.3 - 1.0 - 1.0 leaves a rounding error after the last fraction
            complete = epoch_steps(stage, epoch)
            steps = max(1, round(min(left, 1.0) * complete))
            segments.append(EpochSegment(stage, epoch, first, steps, complete, opens))
            first, epoch, left, opens = first + steps, epoch + 1, left - 1.0, False
    return segments


def evaluation_steps(segments: Sequence[EpochSegment], every: float, total: int) -> frozenset[int]:
    """Numbers of the steps after which to evaluate: every `every` epochs, and at the end.

    every: epochs, counted over all stages; total: steps of the run.
    """
    chosen = {total}
    epochs_done = 0.0
    for segment in segments:
        share = segment.steps / segment.epoch_steps
        nearest = 1e-6 / segment.epoch_steps  # tolerance: sums of fractions miss integers by rounding
        # The first multiple of `every` that is larger than the number of epochs done so far; `within` is the part of
        # it that lies in this segment, in epochs.
        multiple = math.floor((epochs_done + nearest) / every) + 1
        while (within := multiple * every - epochs_done) <= share + nearest:
            chosen.add(segment.first_step + max(1, math.ceil((within - nearest) * segment.epoch_steps)))
            multiple += 1
        epochs_done += share
    return frozenset(step for step in chosen if step <= total)
