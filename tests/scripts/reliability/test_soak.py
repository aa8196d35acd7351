"""A few of the soak script's kills; fifty are its own."""

import json
from pathlib import Path

import pytest

from tests.helpers.distributed import forks
from tests.helpers.scripts import bench_module


@pytest.mark.slow
def test_ranks_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    soak, out = bench_module("soak"), tmp_path / "soak.json"
    forks()  # its ranks are forked from the server that the other tests have
    words = "--launcher fork --kills 3 --steps 16 --seconds 0.5 --asynchronous --seed 1".split()
    assert soak.soak_and_report(soak.soak, soak.parse([*words, "--out", str(out)])) == 0
    (found,) = json.loads(out.read_text())
    assert found["kills"]["injected"] == found["recovered"] == 3
    assert found["lost"] == 0 and found["exit_status"] == 0
