"""The load test: what arrives, when; a service that stalls is charged for those who would have come meanwhile."""

import asyncio
import json

import numpy as np
import pytest

from hllm_torchrec.serving.load_test import Arrivals, capacity, draw_arrivals, run_load, score_bodies


def test_arrivals_are_a_poisson_process_of_users_with_zipf_shares() -> None:
    found = draw_arrivals(200.0, 50.0, users=100, zipf=1.0, seed=3)
    assert abs(found.seconds.size - 10_000) < 400 and found.seconds.max() < 50 and (np.diff(found.seconds) > 0).all()
    gaps = np.diff(found.seconds)
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # of an exponential distribution
    counts = np.bincount(found.users, minlength=100)
    assert 1.6 < counts[0] / counts[1] < 2.5 and 7 < counts[0] / counts[9] < 14
    again = draw_arrivals(200.0, 50.0, users=100, zipf=1.0, seed=3)
    assert np.array_equal(again.seconds, found.seconds) and np.array_equal(again.users, found.users)
    even = np.bincount(draw_arrivals(200.0, 50.0, 10, 0.0, 3).users, minlength=10)
    assert even.min() > 850


def test_bodies_hold_distinct_candidates_and_the_same_user_for_the_same_rank() -> None:
    arrivals = Arrivals(np.arange(3.0), np.array([0, 1, 0]))
    bodies = [json.loads(body) for body in score_bodies(["a", "b"], ["x", "y", "z"], arrivals, 2, seed=0)]
    assert bodies[0]["user"] == bodies[2]["user"] != bodies[1]["user"]
    assert all(len(set(body["candidates"])) == 2 for body in bodies)
    (body,) = score_bodies(["a"], ["x"], Arrivals(np.zeros(1), np.zeros(1, int)), 1, seed=0, context={"device": None})
    assert json.loads(body) == {"user": "a", "candidates": ["x"], "context": {"device": None}}


def test_latencies_count_from_the_scheduled_arrival() -> None:
    """One request at a time is served, the first takes 0.2 s: the others, 10 ms apart, wait for it."""
    busy = asyncio.Lock()

    async def send(body: bytes) -> int:
        async with busy:
            await asyncio.sleep(0.2 if body == b"0" else 0.0)
        return 503 if body == b"3" else 200

    arrivals = Arrivals(np.array([0.0, 0.01, 0.02, 0.03]), np.zeros(4, int))
    result = asyncio.run(run_load(send, [b"0", b"1", b"2", b"3"], arrivals, rate=100.0))
    assert result.statuses == {"200": 3, "503": 1} and result.requests == 4
    assert 180 < result.latency_ms["p50"] < result.latency_ms["p99.9"]
    assert result.throughput == pytest.approx(3 / 0.2, rel=0.5)


def test_a_request_without_an_answer_is_counted_as_0() -> None:
    async def send(body: bytes) -> int:
        raise EOFError

    result = asyncio.run(run_load(send, [b""], Arrivals(np.zeros(1), np.zeros(1, int)), 1.0))
    assert result.statuses == {"0": 1} and result.throughput == 0
    assert capacity([result], 50.0) is None
