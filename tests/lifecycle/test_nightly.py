"""The night as one job: two nights of a shop; steps alone; a rejected model; what is asked of the configuration."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import nightly, rollback
from hllm_torchrec.lifecycle.releases import read_alias
from tests.lifecycle.conftest import World


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def night(world: World, name: str, *words: str) -> int:
    return nightly.main(["--config", str(world.root / "night.yaml"), "--night", name, *words])


def state(world: World, name: str) -> dict[str, dict]:
    return json.loads((world.nights / "nights" / name / "state.json").read_text())["done"]


@pytest.mark.slow
def test_two_nights_train_each_event_once_and_move_the_alias(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.configure()
    assert night(world, "day-03") == 0 and night(world, "day-04") == 0
    first, second = state(world, "day-03"), state(world, "day-04")
    assert first["append"]["start_from"] is None and second["append"]["start_from"] == first["train"]["run"]
    assert second["append"]["train_since"] == first["append"]["train_until"]
    assert [one["append"]["version"] for one in (first, second)] == [2, 3]
    assert list(first["evaluate"]["auc"]) == ["new"] and list(second["evaluate"]["auc"]) == ["new", "last"]
    assert second["embed"]["items"] == first["embed"]["items"], "the Item LLM is frozen: the same store"
    assert first["embed"]["embedded_items"] == 28 and second["embed"]["embedded_items"] == 2
    assert second["embed"]["users"] != first["embed"]["users"]
    current, previous = (read_alias(world.nights, alias) for alias in ("current", "previous"))
    assert current is not None and previous is not None and (current.name, previous.name) == ("day-04", "day-03")
    assert current.version == 3 and current.trained_until == second["append"]["train_until"]
    capsys.readouterr()
    assert night(world, "day-04") == 0 and capsys.readouterr().out == "", "nothing is done twice"
    assert rollback.main(["--folder", str(world.nights)]) == 0
    assert "current: day-03 (was day-04)" in capsys.readouterr().out
