"""The night as one job: what two nights do, steps alone, a rejected model, and kills anywhere."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import nightly, rollback
from hllm_torchrec.lifecycle.night_state import STEPS
from hllm_torchrec.lifecycle.releases import read_alias
from hllm_torchrec.lifecycle.steps import held_out_split
from hllm_torchrec.store.store import EmbeddingStore
from tests.helpers.distributed import forks
from tests.helpers.schedules import acting_before
from tests.helpers.training_fixtures import lines
from tests.lifecycle.conftest import World


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_held_out_events_are_the_last_and_every_part_has_a_second() -> None:
    def cuts(seconds: list[int], share: float) -> tuple[int | None, int | None]:
        split = held_out_split(np.array(seconds), share)
        return split.train_until, split.valid_until

    assert cuts(list(range(100, 200)), 0.2) == (180, 190)
    assert cuts([1, 1, 1, 1, 1, 1, 2, 3], 0.2) == (2, 3)
    assert cuts([1, 2, 3, 3, 3, 3, 3, 3], 0.5) == (2, 3)
    assert cuts([1, 2, 3], 0.99) == (2, 3) == cuts([1, 2, 3], 0.01)


@pytest.mark.slow
def test_a_night_trains_on_what_came_since_and_moves_the_alias(after_one: World, after_two: World) -> None:
    first, second = after_one.state("day-03"), after_two.state("day-04")
    assert list(first) == list(second) == list(STEPS)
    assert first["append"]["start_from"] is None and Path(second["append"]["start_from"]).name == "day-03"
    assert second["append"]["train_since"] == first["append"]["train_until"]
    assert [one["append"]["version"] for one in (first, second)] == [2, 3]
    assert list(first["evaluate"]["auc"]) == ["new"] and list(second["evaluate"]["auc"]) == ["new", "last"]
    current, previous = (read_alias(after_two.nights, alias) for alias in ("current", "previous"))
    assert current is not None and previous is not None and (current.name, previous.name) == ("day-04", "day-03")
    assert current.version == 3 and current.trained_until == second["append"]["train_until"]
    assert current.auc == second["evaluate"]["auc"]["new"]
    assert read_alias(after_one.nights, "previous") == read_alias(after_one.nights, "current")


@pytest.mark.slow
def test_a_night_trains_every_event_once_and_embeds_what_changed(after_one: World, after_two: World) -> None:
    data = Dataset.open(after_two.dataset)
    cut = after_one.state("day-03")["append"]["train_until"]
    rows = data.sequences(data.row_groups("train"))
    new = int((rows.timestamps >= cut).sum())
    (stage,) = [line for line in lines(after_two.nights / "runs" / "day-04", "epoch")] or [None]
    assert 0 < new < rows.timestamps.size and stage is None
    first, second = after_one.state("day-03")["embed"], after_two.state("day-04")["embed"]
    assert Path(first["items"]).name == Path(second["items"]).name, "the Item LLM is frozen: the same store"
    assert first["embedded_items"] == 28 and second["embedded_items"] == 2
    assert Path(first["users"]).name != Path(second["users"]).name, "another model has another store"
    link = after_two.nights / "current" / "users"
    assert len(EmbeddingStore.open(link).snapshot()) == data.num_users - 1
