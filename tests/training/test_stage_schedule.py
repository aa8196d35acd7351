"""The schedule: every epoch in its place, and evaluations where they are due."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm_torchrec.config.schema import StageConfig
from hllm_torchrec.training.stage_schedule import RunSchedule, epoch_segments, evaluation_steps
from tests.helpers.training_fixtures import config


def test_stages_and_epochs_are_laid_end_to_end() -> None:
    stages = [StageConfig("a", epochs=2), StageConfig("b", epochs=1.25), StageConfig("c", epochs=0.01)]
    segments = epoch_segments(stages, lambda stage, epoch: {"a": 10, "b": 4, "c": 6}[stage.name] + epoch % 2)
    assert [
        (
            segment.stage.name,
            segment.epoch,
            segment.first_step,
            segment.steps,
            segment.epoch_steps,
            segment.is_first_of_stage,
        )
        for segment in segments
    ] == [
        ("a", 0, 0, 10, 10, True),
        ("a", 1, 10, 11, 11, False),
        ("b", 2, 21, 4, 4, True),
        ("b", 3, 25, 1, 5, False),  # a quarter of 5, rounded
        ("c", 4, 26, 1, 6, True),  # one step at least
    ]


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [
        ([3], 1, {10, 20, 30}),
        ([3], 2, {20, 30}),
        ([1], 0.25, {3, 5, 8, 10}),
        ([0.5, 0.5, 1], 1, {10, 20}),
        ([0.5, 0.5, 1], 0.5, {5, 10, 15, 20}),
        ([2], 10, {20}),
        ([0.3, 0.3, 0.3, 0.1], 1, {10}),
        ([3], 0.1, set(range(1, 31))),
    ],
)
def test_evaluations_come_every_so_many_epochs_and_at_the_end(
    epochs: list[float], every: float, expected: set[int]
) -> None:
    segments = epoch_segments([StageConfig(str(i), epochs=e) for i, e in enumerate(epochs)], lambda stage, epoch: 10)
    total = segments[-1].first_step + segments[-1].steps
    assert evaluation_steps(segments, every, total) == expected


def test_a_shortened_run_is_evaluated_where_it_ends() -> None:
    segments = epoch_segments([StageConfig("a", epochs=3)], lambda stage, epoch: 10)
    assert evaluation_steps(segments, 1, total=15) == {10, 15}


@given(
    epochs=st.lists(st.floats(0.05, 3), min_size=1, max_size=4),
    every=st.floats(0.05, 4),
    size=st.integers(1, 40),
)
def test_legs_cover_all_steps_and_evaluations_are_evenly_spread(epochs: list[float], every: float, size: int) -> None:
    segments = epoch_segments([StageConfig(str(i), epochs=e) for i, e in enumerate(epochs)], lambda stage, epoch: size)
    for segment, following in zip(segments, segments[1:]):
        assert segment.first_step + segment.steps == following.first_step and segment.epoch + 1 == following.epoch
    assert all(1 <= segment.steps <= segment.epoch_steps == size for segment in segments)
    total = segments[-1].first_step + segments[-1].steps
    chosen = sorted(evaluation_steps(segments, every, total))
    assert chosen[-1] == total and 1 <= chosen[0]
    done = sum(segment.steps for segment in segments) / size
    assert len(chosen) <= math.floor(done / every + 1e-6) + 1
    gaps = [later - earlier for earlier, later in zip([0, *chosen], chosen)]
    assert max(gaps) <= math.ceil(every * size) + 1


def test_a_schedule_counts_steps_from_any_of_them(tmp_path: Path) -> None:
    stages = [{"name": "a", "epochs": 1.5}, {"name": "b", "epochs": 1, "item_embeddings": "cached"}]
    settings = config(tmp_path, stages=stages, optim__warmup=0.1, optim__min_lr_ratio=0.5)
    schedule = RunSchedule.of(settings, lambda stage, epoch: 10)
    assert [segment.end for segment in schedule.segments] == [10, 15, 25]
    assert (schedule.total_steps, schedule.warmup_steps) == (25, 2)
    assert [[segment.first_step for segment in schedule.from_step(step)] for step in (0, 9, 10, 15, 25)] == [
        [0, 10, 15],
        [0, 10, 15],
        [10, 15],
        [15],
        [],
    ]
    assert [schedule.end_to_end_steps(step) for step in (0, 4, 15, 25)] == [0, 4, 15, 15]
    assert [schedule.learning_rate_ratio(step) for step in (0, 1, 25)] == [0.5, 1.0, 0.5]
    shorter = RunSchedule.of(replace(settings, max_steps=12), lambda stage, epoch: 10)
    assert shorter.total_steps == 12 and len(list(shorter.from_step(0))) == 2 and 12 in shorter.evaluation_steps
