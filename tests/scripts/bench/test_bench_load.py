"""bench_load: the search for the largest rate, and the order of the users that fill its cache."""

import numpy as np
import pytest

from hllm_torchrec.serving.load_test import draw_arrivals, score_bodies
from tests.helpers.scripts import bench_module

bench_load = bench_module("bench_load")


@pytest.mark.parametrize("limit", [3.0, 20.0, 31.0, 170.0, 640.0])
def test_the_largest_good_rate_is_found_to_a_tenth(limit: float) -> None:
    asked = []

    def good(rate: float, seed: int) -> bool:
        asked.append(seed)
        return rate <= limit

    found = bench_load.largest_rate(good)
    assert limit / 1.1 < found <= limit and len(asked) == len(set(asked)) <= 10


def test_a_service_that_answers_no_rate_has_none() -> None:
    assert bench_load.largest_rate(lambda rate, seed: False) < 1


def test_the_cache_is_filled_with_those_who_ask_most() -> None:
    users, items = [f"u{number}" for number in range(50)], ["i1", "i2"]
    arrivals = draw_arrivals(200.0, 20.0, len(users), 1.0, 5)
    bodies = score_bodies(users, items, arrivals, 1, 0)
    asked = [sum(f'"{user}"'.encode() in body for body in bodies) for user in bench_load.active(users)]
    assert np.argmax(asked) == 0 and sum(asked[:5]) > 3 * sum(asked[-25:]) / 2
