"""Scores of a loaded run for a user's candidates are those of `hllm evaluate`; appending events equals reading anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.scorer import Scorer, UserHistory, window_start
from tests.helpers import fixtures
from tests.helpers.served_runs import RUNS, rule, settings, trained


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def history(piece: Any, end: int, start: int = 0) -> UserHistory:
    columns = (piece.item_ids, piece.timestamps, piece.labels, piece.actions)
    return UserHistory(piece.user_id, *(column[start:end] for column in columns))


def scorer_without_training(tmp_path: Path, **more: Any) -> Scorer:
    return Scorer(build_experiment(settings("early", tmp_path, **{"optim__ema": 0.0, **more}), init_distributed()), 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_scores_equal_those_of_the_evaluation(kind: str) -> None:
    run, evaluated = trained(kind)
    found = {}
    with Scorer.of_run(run, "latest", micro_batch=2) as scorer:
        for piece in fixtures.pieces("test", rule(kind)):
            exposures = piece.first_target + np.flatnonzero(~np.isnan(piece.labels[piece.first_target :]))
            for time in np.unique(piece.timestamps[exposures]):
                now = exposures[piece.timestamps[exposures] == time]
                end = int(now[0])
                if kind == "early":  # the request's own second is hidden, whatever the history holds of it
                    end = piece.item_ids.size
                scores = scorer.score(history(piece, end), piece.item_ids[now], int(time))
                found |= {(piece.user_id, int(at)): score for at, score in zip(now, scores)}
    assert found.keys() == evaluated.keys() and len(found) > 15
    ours, theirs = (np.array([scores[key] for key in sorted(evaluated)]) for scores in (found, evaluated))
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    assert theirs.std() > 0.01


LONG: dict[str, dict[str, Any]] = {
    "early": {"data__numeric_features": ["user_mean", "history_length"], "optim__ema": 0.0},
    "late": {"data__item_vectors": []},
    "hstu": {"parallel__dense": "ddp"},
    "delayed": {},
    "leave one out": {},
}


@pytest.mark.parametrize("kind", list(LONG))
def test_histories_beyond_the_window_are_scored_as_evaluated_whatever_follows_the_request(
    kind: str, tmp_path: Path
) -> None:
    built = build_experiment(settings(kind, tmp_path, data__max_history=10, **LONG[kind]), init_distributed())
    loader = built.loader("test", 4)
    columns = score_split(built, loader)
    keys = zip(columns["user_id"].tolist(), columns["position"].tolist(), strict=True)
    evaluated = dict(zip(keys, columns["score"].tolist(), strict=True))
    assert loader.pieces.start.max() > 8
    scorer, found, compared = Scorer(built, 7), {}, 0
    for piece in fixtures.pieces("test", rule(kind)):
        for at in piece.exposures.tolist():
            request = piece.item_ids[at : at + 1], int(piece.timestamps[at])
            (found[piece.user_id, at],) = scorer.score(history(piece, at), *request)
            if kind != "leave one out":
                (again,) = scorer.score(history(piece, piece.item_ids.size), *request)
                assert again == pytest.approx(found[piece.user_id, at], abs=2e-5)
            compared += at >= 10
    assert found.keys() == evaluated.keys() and compared > 5
    ours, theirs = (np.array([scores[key] for key in sorted(evaluated)]) for scores in (found, evaluated))
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    assert theirs.std() > 1e-4


def test_appended_events_equal_a_fresh_reading_within_and_beyond_the_window(tmp_path: Path) -> None:
    scorer = scorer_without_training(tmp_path, data__max_history=16)
    piece = max(fixtures.pieces("test"), key=lambda piece: piece.item_ids.size)
    end, candidates, starts = piece.item_ids.size, np.arange(1, 12), set()
    assert end > 24
    time = int(piece.timestamps[-1]) + 100
    state, at = scorer.read(history(piece, 3)), 3
    for step in (1, 2, 5, 1, 4, 7, 2):
        state = scorer.extend(state, history(piece, at + step, at))
        at += step
        fresh = scorer.read(history(piece, at))
        starts.add(state.start)
        assert state.start == fresh.start and state.cache.length == fresh.cache.length < 16
        expected = scorer.score(fresh, candidates, time)
        np.testing.assert_allclose(scorer.score(state, candidates, time), expected, atol=1e-5)
    assert starts == {0, 8, 16}


def test_a_history_is_as_good_as_its_state_and_the_micro_batch_changes_nothing(tmp_path: Path) -> None:
    scorer = scorer_without_training(tmp_path)
    piece = max(fixtures.pieces("test"), key=lambda piece: piece.item_ids.size)
    past, candidates = history(piece, 20), np.arange(20)
    time = int(piece.timestamps[20]) + 5
    expected = scorer.score(past, candidates, time)
    assert expected.dtype == np.float32 and expected.shape == (20,) and expected.std() > 0
    scorer.micro_batch = 64
    np.testing.assert_allclose(scorer.score(scorer.read(past), candidates, time), expected, atol=1e-5)
    assert scorer.score(past, candidates[:0], time).shape == (0,)
    now = scorer.score(past, candidates)  # no time given: now, years after these events
    assert np.abs(now - expected).max() > 1e-4


def test_an_empty_history_is_scored_and_can_be_extended(tmp_path: Path) -> None:
    scorer = scorer_without_training(tmp_path)
    piece = max(fixtures.pieces("test"), key=lambda piece: piece.item_ids.size)
    state = scorer.read(history(piece, 0))
    time = int(piece.timestamps[5]) + 1
    assert np.isfinite(scorer.score(state, np.arange(1, 4), time)).all()
    grown = scorer.extend(state, history(piece, 5))
    expected = scorer.score(history(piece, 5), np.arange(1, 4), time)
    np.testing.assert_allclose(scorer.score(grown, np.arange(1, 4), time), expected, atol=1e-5)


@pytest.mark.parametrize(("events", "start"), [(0, 0), (9, 0), (10, 5), (14, 5), (15, 10), (1000, 995)])
def test_the_window_moves_by_half_its_size(events: int, start: int) -> None:
    assert window_start(events, 10) == start and 5 <= max(events - start, 5) <= 9


def test_wrong_requests_are_errors(tmp_path: Path) -> None:
    scorer = scorer_without_training(tmp_path)
    piece = fixtures.pieces("test")[1]
    past, items = history(piece, 2), scorer.experiment.dataset.num_items
    with pytest.raises(ValueError, match=rf"candidates, entry 1: {items}: the dataset's ids go from 1 to {items - 1}"):
        scorer.score(past, np.array([1, items]), 2_000_000_000)
    with pytest.raises(ValueError, match="item_ids of user 1, entry 0: -3: the dataset's ids"):
        scorer.read(UserHistory(1, [-3], [5], [1.0], [0]))
    with pytest.raises(ValueError, match="user_id, entry 0: 999: "):
        scorer.read(UserHistory(999, [1], [5], [1.0], [0]))
    with pytest.raises(ValueError, match="events of user 1 after those of user 2: give events of one user"):
        scorer.extend(scorer.read(UserHistory(2, [1], [5], [1.0], [0])), UserHistory(1, [1], [6], [1.0], [0]))
    with pytest.raises(ValueError, match="user 4, event 1: time 4 is before that of the previous event .5.: sort"):
        UserHistory(4, [1, 2], [5, 4], [1.0, 1.0], [0, 0])
    with pytest.raises(ValueError, match="user 4: columns of different lengths .*one entry per event"):
        UserHistory(4, [1, 2], [5], [1.0, 1.0], [0, 0])
    with pytest.raises(ValueError, match="micro_batch is 0: must be at least 1"):
        Scorer(scorer.experiment, 0)


def test_a_leave_one_out_request_before_the_last_event_is_an_error(tmp_path: Path) -> None:
    scorer = scorer_without_training(tmp_path, data__dataset=fixtures.dataset("leave_one_out").root)
    with pytest.raises(ValueError, match="user 2: a request at 4, before the last event at 5"):
        scorer.score(UserHistory(2, [1], [5], [1.0], [0]), np.array([1]), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__fusion": "none"}, "objective.fusion: 'none': the model has no head"),
        ({"parallel__dense": "fsdp"}, "1 processes, parallel.dense 'fsdp': .*build it in one, with parallel.dense ddp"),
    ],
)
def test_a_model_that_cannot_serve_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        scorer_without_training(tmp_path, **changes)
