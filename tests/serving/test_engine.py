"""Histories of the service: events that are appended, late, repeated, forgotten; bounds of the cache."""

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import UnavailableError
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.event_log import EventLog, LoggedEvent
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.inference.item_index import normalize_rows
from hllm_torchrec.inference.user_embedder import history_request
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine, RawEvents, RecommendRequest, ScoreRequest, Scores
from hllm_torchrec.serving.retrieval import Retrieval
from tests.helpers import fixtures
from tests.helpers.served_runs import settings

NOW = fixtures.START + 10**7
CANDIDATES = ["s1", "s2", "s9", "s30"]


@pytest.fixture(scope="module", autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    built.cache_clear()
    destroy_distributed()


@cache
def built(kind: str, folder: Path, **more: Any) -> BatchScorer:
    changed = settings(kind, folder, **{"optim__ema": 0.0, **more})
    return BatchScorer(build_experiment(changed, init_distributed()), journal=folder / f"{kind}.jsonl")


def engine(tmp_path: Path, kind: str = "early", **more: Any) -> Engine:
    return Engine(built(kind, fixtures.folder()), EventLog(tmp_path / "events.sqlite"), **more)


def only(found: list[Scores | Exception]) -> Scores:
    assert isinstance(found[0], Scores), found
    return found[0]


def scores(of: Engine, user: str | None, time: int = NOW, history: RawEvents | None = None) -> np.ndarray:
    return only(of.score([ScoreRequest(user, CANDIDATES, time, history)])).logits


def longest_user() -> tuple[str, Any]:
    piece = max(fixtures.pieces("test"), key=len)
    return fixtures.dataset().users["raw_user_id"][piece.user_id - 1].as_py(), piece


def as_given(piece: Any, *more: LoggedEvent) -> RawEvents:
    items = fixtures.dataset().items["raw_item_id"]
    names = fixtures.dataset().manifest["actions"]["names"]
    rows = [
        LoggedEvent(items[int(item) - 1].as_py(), int(time), float(label), names.get(str(int(action))))
        for item, time, label, action in zip(*piece.columns.values())
    ]
    events = sorted([*rows, *more], key=lambda event: event.timestamp)
    return RawEvents(
        [event.item for event in events],
        [event.timestamp for event in events],
        [np.nan if event.label is None else event.label for event in events],
        [event.action for event in events],
    )


def test_appended_events_are_seen_from_the_next_second_on_and_after_a_restart(tmp_path: Path) -> None:
    first, (user, piece) = engine(tmp_path), longest_user()
    before = scores(first, user)
    event = LoggedEvent("s5", NOW, 1.0, "5")
    first.append(user, [event])
    assert np.array_equal(scores(first, user), before)  # of the request's own second
    after = scores(first, user, NOW + 1)
    expected = scores(first, user, NOW + 1, as_given(piece, event))
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert np.abs(after - scores(first, user, NOW + 1, as_given(piece))).max() > 1e-4
    np.testing.assert_allclose(scores(first, user), before, atol=1e-5)  # an earlier second again
    first.log.close()  # type: ignore[union-attr]
    np.testing.assert_allclose(scores(engine(tmp_path), user, NOW + 1), after, atol=1e-5)


def test_a_late_event_is_put_where_it_belongs(tmp_path: Path) -> None:
    of, (user, piece) = engine(tmp_path), longest_user()
    scores(of, user)
    late = LoggedEvent("s7", int(piece.timestamps[4]), 0.0, "1")
    of.append(user, [late])
    np.testing.assert_allclose(scores(of, user), scores(of, user, NOW, as_given(piece, late)), atol=1e-5)


def test_an_event_that_the_dataset_has_as_well_counts_once(tmp_path: Path) -> None:
    of, (user, piece) = engine(tmp_path), longest_user()
    expected = scores(of, user)
    of.forget_state(user)
    raw = as_given(piece)
    of.append(user, [LoggedEvent(raw.items[3], raw.timestamps[3], raw.labels[3], raw.actions[3])])
    assert only(of.score([ScoreRequest(user, CANDIDATES, NOW)])).events == len(piece)
    np.testing.assert_allclose(scores(of, user), expected, atol=1e-5)


def test_a_new_user_has_the_history_that_was_appended(tmp_path: Path) -> None:
    of, event = engine(tmp_path), LoggedEvent("s5", NOW - 9, 1.0, "5")
    of.append("newcomer", [event])
    given = RawEvents([event.item], [event.timestamp], [1.0], ["5"])
    np.testing.assert_allclose(scores(of, "newcomer"), scores(of, None, NOW, given), atol=1e-5)
    assert np.abs(scores(of, "newcomer") - scores(of, "another")).max() > 1e-4


def test_a_forgotten_user_is_a_new_one_and_leaves_no_trace_in_the_file(tmp_path: Path) -> None:
    of, (user, _) = engine(tmp_path), longest_user()
    of.append(user, [LoggedEvent("s5", NOW - 9, 1.0, "5")])
    stranger = scores(of, None)
    assert np.abs(scores(of, user) - stranger).max() > 1e-4
    of.log.append("a-name-to-find", [LoggedEvent("s5", NOW, None, None)])  # type: ignore[union-attr]
    for name in (user, "a-name-to-find"):
        assert of.log.forget(name) == 1  # type: ignore[union-attr]
        of.forget_state(name)
    np.testing.assert_allclose(scores(of, user), stranger, atol=1e-5)
    of.log.close()  # type: ignore[union-attr]
    assert b"a-name-to-find" not in b"".join(path.read_bytes() for path in tmp_path.glob("events.sqlite*"))
    np.testing.assert_allclose(scores(engine(tmp_path), user), stranger, atol=1e-5)


def test_the_cache_keeps_its_bound_and_scores_do_not_depend_on_it(tmp_path: Path) -> None:
    large = engine(tmp_path)
    users = fixtures.dataset().users["raw_user_id"].to_pylist()
    expected = [scores(large, one) for one in users]
    bound = large.states.nbytes // 4
    small = Engine(large.scorer, large.log, bound)
    for _ in range(2):
        for one, logits in zip(users, expected, strict=True):
            np.testing.assert_allclose(scores(small, one), logits, atol=1e-5)
            assert small.states.nbytes <= bound
    assert small.states.counts.evictions > 10 and 0 < len(small.states) < len(users)
    assert large.states.counts.misses == len(users) and large.states.counts.evictions == 0


def test_one_wrong_request_does_not_spoil_its_batch(tmp_path: Path) -> None:
    of, (user, _) = engine(tmp_path), longest_user()
    requests = [ScoreRequest(user, CANDIDATES, NOW), ScoreRequest(user, ["nope"], NOW), ScoreRequest("x", ["s3"], NOW)]
    first, wrong, last = of.score(requests)
    assert isinstance(first, Scores) and isinstance(last, Scores)
    assert isinstance(wrong, ValueError) and "'nope'" in str(wrong)
    np.testing.assert_allclose(first.logits, scores(of, user), atol=1e-5)


def test_unknown_items_and_actions_are_not_appended(tmp_path: Path) -> None:
    of = engine(tmp_path)
    with pytest.raises(ValueError, match="events: 1 of 2 are not in the dataset: 'nope'"):
        of.append("u1", [LoggedEvent("s1", NOW), LoggedEvent("nope", NOW)])
    with pytest.raises(ValueError, match="actions of events: 1 of 1 are not in the dataset: 'flew'"):
        of.append("u1", [LoggedEvent("s1", NOW, None, "flew")])
    assert len(of.log) == 0  # type: ignore[arg-type]


def test_a_log_belongs_to_one_service(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.sqlite")
    with pytest.raises(ValueError, match="another service has it open: stop that one, or give --state another file"):
        EventLog(tmp_path / "events.sqlite")
    log.close()
    (tmp_path / "text").write_text("no database, but long enough to be taken for a header of one" * 9)
    with pytest.raises(ValueError, match="give --state another file"):
        EventLog(tmp_path / "text")
    with sqlite3.connect(tmp_path / "events.sqlite") as connection:
        connection.execute("UPDATE facts SET value = '9' WHERE name = 'format'")
    connection.close()
    with pytest.raises(ValueError, match="format 9, not 1: give --state another file"):
        EventLog(tmp_path / "events.sqlite")


def recommended(of: Engine, **request: Any) -> list[str]:
    found = only(of.score([RecommendRequest(**{"user": longest_user()[0], "top": 5, "time": NOW, **request})]))
    assert (np.diff(found.logits) <= 0).all()
    return [raw for raw, _ in found.items]


@pytest.mark.parametrize("kind", ["early", "late"])
def test_recommendations_are_the_best_of_all_items(kind: str, tmp_path: Path) -> None:
    of, (user, piece) = engine(tmp_path, kind), longest_user()
    every = fixtures.dataset().items["raw_item_id"].to_pylist()
    logits = only(of.score([ScoreRequest(user, every, NOW)])).logits
    by_score = [every[item] for item in np.argsort(-logits, kind="stable")]
    assert recommended(of, top=40, seen_too=True) == by_score
    seen = {every[item - 1] for item in piece.item_ids}
    assert recommended(of) == [item for item in by_score if item not in seen][:5]
    rows = fixtures.dataset().items.to_pylist()
    names = fixtures.dataset().feature_values("genres").to_pylist()
    noir = {row["raw_item_id"] for row in rows if names.index("noir") + 1 in row["feature_genres"]}
    found = recommended(of, top=40, seen_too=True, filters={"genres": ["noir", "unheard of"]})
    assert found == [item for item in by_score if item in noir] and 3 < len(found) < 40
    assert recommended(of, filters={"genres": []}) == []
    wrong = of.score([RecommendRequest(user, 5, NOW, filters={"genre": ["noir"]})])[0]
    assert isinstance(wrong, ValueError) and "filters.genre: no item feature (did you mean 'genres'?)" in str(wrong)


@pytest.mark.parametrize("index", ["flat", "ivf"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"user__actions": "interleaved", "features__action_gate": False},
        {"objective__transitions": 0.4},
        {"objective__transitions": 0.4, "objective__text_similarity": 0.5},
    ],
    ids=["plain", "interleaved", "transitions", "transitions and texts"],
)
def test_retrieved_items_are_nearest_to_the_predicted_next_item(
    index: Any, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hllm_torchrec.serving.retrieval.NPROBE", 1000)
    generative = {"objective__generative_weight": 0.5, "optim__ema": 0.0, "objective__item_space": "features"}
    experiment = build_experiment(settings("early", tmp_path, **generative, **changes), init_distributed())
    scorer = BatchScorer(experiment, journal=tmp_path / "j.jsonl")
    of, (_, piece) = Engine(scorer, index=index, index_folder=tmp_path / "index"), longest_user()
    kept = list(tmp_path.glob("index/*"))
    assert len(kept) == (index == "ivf")
    state = of.scorer.read(of.histories.read(longest_user()[0]).events)
    request = history_request(piece, len(piece), NOW, 64)
    batch = Collator(experiment.dataset, experiment.batch_spec, item_vectors=experiment.item_vectors)([request], 0, 0)
    with torch.no_grad():
        predicted = experiment.model(batch, want_next=True).next_items
    assert predicted is not None

    def nearest(allowed: np.ndarray, number: int) -> list[int]:
        vectors = normalize_rows(catalogue_vectors(experiment).numpy())
        cosines = np.where(allowed, vectors @ predicted[0].numpy(), -np.inf)
        return [int(item) for item in np.argsort(-cosines, kind="stable")[:number] if allowed[item]]

    allowed = of.retrieval.allowed(piece.item_ids, {})
    assert of.retrieval.candidates(state, allowed, 6).tolist() == nearest(allowed, 6)
    of.add_items(["n1", "n2"], {"title": ["word1", "word9 word4"]}, {"genres": [["noir"], ["drama"]]})
    allowed = of.retrieval.allowed(np.arange(30), {})
    found = of.retrieval.candidates(state, allowed, 30).tolist()
    assert found == nearest(allowed, 30) and {experiment.dataset.num_items - 1} < set(found)
    only_noir = of.retrieval.allowed(np.empty(0, np.int64), {"genres": ["noir"]})
    assert only_noir[-2:].tolist() == [True, False]
    new = of.scorer.read(of.histories.read("nobody").events)
    assert of.retrieval.candidates(new, allowed, 3).size == allowed.sum()
    monkeypatch.setattr("hllm_torchrec.serving.retrieval.RANKED", 5)  # a large catalogue
    again = Retrieval(scorer, index, tmp_path / "index")
    assert list(tmp_path.glob("index/*")) == kept  # read, and not built again
    assert again.candidates(state, allowed, 30).tolist() == found
    counts = np.where(allowed, experiment.dataset.training_item_counts(), -1)
    assert again.candidates(new, allowed, 3).tolist() == np.argsort(-counts, kind="stable")[:3].tolist()
    many = again.candidates(new, allowed, 1000)
    assert many.size == allowed.sum() and (np.diff(counts[many]) <= 0).all()


def test_an_event_counts_once_whenever_it_is_read(tmp_path: Path) -> None:
    of, (user, piece) = engine(tmp_path), longest_user()
    raw = as_given(piece)
    known = LoggedEvent(raw.items[3], raw.timestamps[3], raw.labels[3], raw.actions[3])
    new = LoggedEvent("s5", NOW - 9, 1.0, "5")
    scores(of, user)
    for events in ([new], [known], [new]):  # the state is in the cache, and has events of the log from the first on
        of.append(user, events)
        in_cache = only(of.score([ScoreRequest(user, CANDIDATES, NOW)]))
        of.forget_state(user)
        anew = only(of.score([ScoreRequest(user, CANDIDATES, NOW)]))
        assert in_cache.events == anew.events
        np.testing.assert_allclose(in_cache.logits, anew.logits, atol=1e-5)
    assert anew.events == len(piece) + 2  # what was sent twice is twice in the log


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """No file can grow beyond the size of this one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size if path.exists() else 0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_is_not_kept_and_the_service_goes_on(tmp_path: Path) -> None:
    of, user = engine(tmp_path), longest_user()[0]
    before, event = scores(of, user), LoggedEvent("s5", NOW - 9, 1.0, "5")
    with full_disk(tmp_path / "events.sqlite-wal"), pytest.raises(UnavailableError, match="events.sqlite: .*disk"):
        of.append(user, [event] * 99)
    assert len(of.log) == 0 and np.array_equal(scores(of, user), before)  # type: ignore[arg-type]
    of.append(user, [event])
    after = scores(of, user)
    assert np.abs(after - before).max() > 1e-4
    of.forget_state(user)
    np.testing.assert_allclose(scores(of, user), after, atol=1e-5)


def test_events_that_could_not_be_read_are_read_by_the_next_request(tmp_path: Path) -> None:
    of, user = engine(tmp_path), longest_user()[0]
    assert of.log is not None
    before = scores(of, user)
    of.append(user, [LoggedEvent("s5", NOW - 9, 1.0, "5")])
    of.log.close()
    (failed,) = of.score([ScoreRequest(user, CANDIDATES, NOW)])
    assert isinstance(failed, UnavailableError)
    of.log._connection = sqlite3.connect(tmp_path / "events.sqlite")
    assert np.abs(scores(of, user) - before).max() > 1e-4
