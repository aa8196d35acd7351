"""Ids exchanged ahead change no number, and are really exchanged ahead."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import assert_equal_weights, config, losses, train, weights

SETTINGS: dict[str, Any] = {
    "max_steps": 7,
    "optim__accumulate": 2,
    "evaluation__every": 0.5,  # evaluations come between an exchange's beginning and its use
    "stages": [{"name": "two legs", "epochs": 2, "item_embeddings": "cached"}],
}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def both_ways(output: Path) -> dict[str, Any]:
    """Weights of a run without and of one with the option, on this rank."""
    found = {}
    for name, ahead in (("plain", False), ("ahead", True)):
        found[name] = weights(train(config(output / name, parallel__overlap_tables=ahead, **SETTINGS)))
    return found


@pytest.mark.slow
def test_nothing_changes_on_one_rank(tmp_path: Path) -> None:
    found = both_ways(tmp_path)
    assert_equal_weights(found["ahead"], found["plain"])
    assert losses(tmp_path / "ahead") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_nothing_changes_on_two_ranks_of_which_one_may_have_no_users(tmp_path: Path) -> None:
    for found in run_ranks(both_ways, 2, tmp_path):
        assert_equal_weights(found["ahead"], found["plain"])


def test_ids_are_on_their_way_before_their_forward_pass(tmp_path: Path) -> None:
    trainer = build_trainer(config(tmp_path, parallel__overlap_tables=True), init_distributed())
    tables, happened = trainer.hllm.features.tables, []
    plain_dist, plain_lookup = tables.input_dist, tables.compute_and_output_dist

    def dist(context: Any, features: Any) -> Any:
        happened.append(("ids", features.values().data_ptr()))
        return plain_dist(context, features)

    def look_up(context: Any, ids: Any) -> Any:
        happened.append(("rows", None))
        return plain_lookup(context, ids)

    tables.input_dist, tables.compute_and_output_dist = dist, look_up
    steps = trainer._micro_batches(trainer.schedule.segments[0])
    first, second, third = next(steps), next(steps), next(steps)
    trainer.train_step(first, second)
    trainer.train_step(second, third)
    trainer.table_prefetcher.finish()
    steps.close()
    pointers = [batch[0].features.values().data_ptr() for batch in (first, second, third)]
    assert happened == [
        ("ids", pointers[1]),  # of the second, before the first is looked up
        ("ids", pointers[0]),
        ("rows", None),
        ("ids", pointers[2]),
        ("rows", None),
    ]
