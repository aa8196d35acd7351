"""A night on two ranks does what a night on one does."""

from pathlib import Path

import pytest

from tests.helpers.processes import run_job
from tests.lifecycle.conftest import World


@pytest.mark.slow
def test_two_ranks_append_once_and_publish_what_one_does(
    after_one: World, after_two: World, tmp_path: Path, root: Path
) -> None:
    world = after_one.copy(tmp_path / "world")
    (said, _), (silent, _) = run_job("hllm_torchrec.launch.nightly", world.words("day-04"), 2, root, tmp_path)
    assert said.count("day-04: ") == 6 and not silent.count("day-04: ")
    found, expected = world.state("day-04"), after_two.state("day-04")
    for facts in (found, expected):
        for step in facts.values():
            step.pop("at")
    same = ("version", "train_since", "train_until")
    assert all(found["append"][name] == expected["append"][name] for name in same)
    assert found["evaluate"]["auc"]["last"] == pytest.approx(expected["evaluate"]["auc"]["last"], abs=1e-6)
    assert found["evaluate"]["rows"] == expected["evaluate"]["rows"]
    for count in ("embedded_items", "embedded_users"):
        assert found["embed"][count] == expected["embed"][count]
    assert (world.nights / "current" / "run" / "config.yaml").is_file()
