"""Larger tables: known rows and their optimizer state come back bit for bit, the others keep their initialization."""

import logging
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from hllm_torchrec.checkpoint.growth import TableRows, saved_table_rows, spread_rowwise
from hllm_torchrec.checkpoint.load import load_checkpoint, save_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.embedding.optimizers import TableOptimizer
from hllm_torchrec.embedding.tables import local_shards
from hllm_torchrec.models.new_rows import read_rows, write_rows
from hllm_torchrec.training.optim import dense_optimizer, materialize_state, named_optimizer_state
from tests.helpers.distributed import run_ranks
from tests.helpers.small_models import ROWS, WIDTH, TwoTables, batch, shard

GROWN = (20, 13)
PLANS = ("table_wise", "column_wise")
TABLE = "ebc.embedding_bags.{}.weight"

# --- replicated tables, one process ----------------------------------------------------------------------


def replicated(rows: int, fill: float) -> dict[str, Any]:
    """State of a replicated table `t` and a layer, filled with a number."""
    table = torch.full((rows, 3), fill)
    moments = {"exp_avg": table + 0.1, "exp_avg_sq": table + 0.2, "step": torch.tensor(fill)}
    return {
        "model": {TABLE.format("t"): table, "layer": torch.full((2,), fill)},
        "dense": {TABLE.format("t"): moments},
        "ema": {TABLE.format("t"): table + 0.3},
    }


def test_replicated_tables_keep_rows_moments_and_averages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_checkpoint(tmp_path, 1, replicated(4, 1.0), {})
    state = replicated(6, 5.0)
    with caplog.at_level(logging.WARNING):
        load_checkpoint(path, state)
    saved, name = replicated(4, 1.0), TABLE.format("t")
    moments = state["dense"][name]
    pairs = [
        (state["model"][name], saved["model"][name], 5.0),
        (moments["exp_avg"], saved["dense"][name]["exp_avg"], 5.1),
        (moments["exp_avg_sq"], saved["dense"][name]["exp_avg_sq"], 5.2),
        (state["ema"][name], saved["ema"][name], 5.3),
    ]
    for grown, known, initial in pairs:
        assert torch.equal(grown[:4], known)
        assert torch.equal(grown[4:], torch.full((2, 3), initial))
    assert moments["step"] == 1.0
    assert "t: 3 of 3 ids kept, 2 new" in caplog.text
    assert saved_table_rows(SafeReader(path).read_tensors()) == {"t": 4}


def test_averages_alone_grow_too(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, replicated(4, 1.0), {})
    state = {"ema": replicated(6, 5.0)["ema"]}
    load_checkpoint(path, state)
    assert state["ema"][TABLE.format("t")][:, 0].tolist() == pytest.approx([1.3] * 4 + [5.3] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.zeros(3, 3), r"model.ebc.embedding_bags.t.weight \(checkpoint \[4, 3\], model \[3, 3\]\)"),
        (torch.zeros(6, 4), r"model.ebc.embedding_bags.t.weight \(checkpoint \[4, 3\], model \[6, 4\]\)"),
    ],
)
def test_fewer_rows_and_another_width_are_refused(tmp_path: Path, change: Tensor, message: str) -> None:
    path = save_checkpoint(tmp_path, 1, replicated(4, 1.0), {})
    state = {"model": replicated(4, 5.0)["model"] | {TABLE.format("t"): change}}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, state)
    assert not change.any()


def test_other_weights_do_not_grow(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, replicated(4, 1.0), {})
    state = {"model": replicated(6, 5.0)["model"] | {"layer": torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"1 key of another shape: model.layer \(checkpoint \[2\], model \[3\]\)"):
        load_checkpoint(path, state)


def test_a_table_that_becomes_a_sharded_one_starts_its_optimizer_anew(tmp_path: Path) -> None:
    path, name = save_checkpoint(tmp_path, 1, replicated(4, 1.0), {}), TABLE.format("t")
    state = {
        "model": replicated(6, 5.0)["model"],
        "dense": {},
        "tables": {name: {"t.momentum1": torch.full((6,), 7.0)}},
    }
    load_checkpoint(path, state)
    assert torch.equal(state["model"][name][:4], torch.ones(4, 3))
    assert state["tables"][name]["t.momentum1"].tolist() == [7.0] * 6
    same_rows = {"model": replicated(4, 5.0)["model"], "dense": {}, "tables": {name: {"t.momentum1": torch.ones(4)}}}
    with pytest.raises(ValueError, match="missing from the checkpoint: tables"):
        load_checkpoint(path, same_rows)


def rowwise_state(saved: Tensor, shards: int) -> Tensor:
    """Row-wise state of a table of two rows, spread over `shards` column shards; saved: a pair per saved shard."""
    targets = [torch.zeros(2) for _ in range(shards)]
    metadata = [ShardMetadata([2 * number], [2], "rank:0/cpu") for number in range(shards)]
    target = ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(*entry) for entry in zip(targets, metadata, strict=True)],
        ShardedTensorMetadata(metadata, torch.Size([2 * shards]), TensorProperties(dtype=torch.float32)),
    )
    spread_rowwise(saved, target, TableRows("t", saved=2, present=2))
    return torch.cat(targets)


def rowwise_states() -> list[list[float]]:
    four = torch.tensor([1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0])
    return [rowwise_state(four, 2).tolist(), rowwise_state(four[:4], 4).tolist(), rowwise_state(four, 4).tolist()]


def test_rowwise_state_follows_the_columns_of_its_shard() -> None:
    """Each pair of numbers is a column shard: neighbors are averaged, or a shard is copied to its parts."""
    fewer, more, equal = run_ranks(rowwise_states, 1)[0]
    assert fewer == [2.0, 20.0, 6.0, 60.0]
    assert more == [1.0, 10.0, 1.0, 10.0, 3.0, 30.0, 3.0, 30.0]
    assert equal == [1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0]


# --- sharded tables, one and two ranks -------------------------------------------------------------------


class Training:
    """A sharded model with its optimizers, always fed the same batch."""

    def __init__(self, plan: str, rows: tuple[int, ...]) -> None:
        self.model = shard(TwoTables(rows), plan)
        self.dense = dense_optimizer(self.model.named_parameters(), learning_rate=0.1)
        self.tables = TableOptimizer(self.model.fused_optimizer)
        materialize_state(self.dense)

    def run(self, steps: int) -> Tensor:
        for _ in range(steps):
            self.dense.zero_grad()
            self.model(batch()).square().sum().backward()
            self.dense.step()
        with torch.no_grad():
            return self.model(batch()).clone()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "dense": named_optimizer_state(self.dense, self.model.named_parameters()),
            "tables": self.tables.state(),
        }


def check_rows(before: dict[str, Any], after: dict[str, Any], path: Path) -> int:
    """Compare this rank's shards with the checkpoint's whole tables; return how many rows were compared.

    before, after: copies of the local shards before and after loading, by table.
    """
    compared = 0
    for number, rows in enumerate(ROWS):
        name, table = TABLE.format(f"t{number}"), torch.empty(rows, WIDTH)
        size = SafeReader(path).read_tensors()[f"tables.{name}.t{number}.momentum1"].size[0]
        momentum = torch.empty(size)
        load_checkpoint(path, {"model": {name: table, **rest_of(path, name)}})
        read_whole(path, f"tables.{name}.t{number}.momentum1", momentum)
        for (values, row, column), (old, _, _) in zip(after.get(name, []), before.get(name, []), strict=True):
            known = max(0, min(len(values), rows - row))
            assert torch.equal(values[:known], table[row : row + known, column : column + values.shape[1]])
            assert torch.equal(values[known:], old[known:])
            compared += known
        by_shard = momentum.view(-1, rows)
        for (values, start, _), (old, _, _) in zip(
            after.get(f"{name}.m", []), before.get(f"{name}.m", []), strict=True
        ):
            column, row = divmod(start, GROWN[number])
            known = max(0, min(len(values), rows - row))
            if len(by_shard) == 1:  # one vector, copied to every column shard
                expected = by_shard[0]
            else:  # as many column shards as before, or their mean
                expected = by_shard[column] if after["columns"] == len(by_shard) else by_shard.mean(0)
            assert torch.equal(values[:known], expected[row : row + known])
            assert torch.equal(values[known:], old[known:])
    return compared


def rest_of(path: Path, name: str) -> dict[str, Tensor]:
    """Empty tensors for the model's other keys, as the checkpoint has them."""
    saved = SafeReader(path).read_tensors()
    others = {key.removeprefix("model."): entry for key, entry in saved.items() if key.startswith("model.")}
    return {key: torch.empty(entry.size) for key, entry in others.items() if key != name}


def read_whole(path: Path, key: str, target: Tensor) -> None:
    dist.checkpoint.load({key: target}, storage_reader=SafeReader(path))


def shards_of(training: Training) -> dict[str, Any]:
    """Copies of this rank's shards: table -> weights, `<table>.m` -> momentum; columns: number of column shards."""
    found: dict[str, Any] = {"columns": 1}
    for key, value in training.model.state_dict().items():
        if "embedding_bags" in key:
            found[key] = [(values.clone(), row, column) for values, row, column in local_shards(value)]
    for key, states in training.tables.state().items():
        for momentum in states.values():
            found[f"{key}.m"] = [(values.clone(), row, column) for values, row, column in local_shards(momentum)]
            found["columns"] = momentum.metadata().size[0] // GROWN[int(key.split(".t")[1][0])]
    return found


def check_reading_and_writing(training: Training) -> None:
    """Rows written by every rank to its shards are read on every rank."""
    state, rows = training.model.state_dict(), torch.arange(5.0)[:, None].expand(5, WIDTH) + torch.arange(WIDTH) / 10
    for number, size in enumerate(GROWN):
        table = state.get(TABLE.format(f"t{number}"))
        before = read_rows(table, np.arange(size), WIDTH, torch.device("cpu"))
        if table is not None:
            write_rows(table, size - 5, rows)
        after = read_rows(table, np.arange(size)[::-1].copy(), WIDTH, torch.device("cpu")).flip(0)
        assert torch.equal(after, torch.cat([before[:-5], rows])) and before.any(1).all()


def save_each_plan(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Plan -> outputs at the checkpoint, and after two more steps without a break."""
    outputs = {}
    for plan in PLANS:
        training = Training(plan, ROWS)
        saved = training.run(3)
        save_checkpoint(directory / plan, 3, training.state(), {})
        outputs[plan] = saved, training.run(2)
    return outputs


def load_each_plan(directory: Path) -> tuple[int, dict[tuple[str, str], tuple[Tensor, Tensor]]]:
    """Load every saved plan into larger tables of every plan; return the same outputs by (saved, present) plan."""
    compared, outputs = 0, {}
    for saved, present in product(PLANS, PLANS):
        training, path = Training(present, GROWN), directory / saved / "step-00000003"
        training.run(1)
        before = shards_of(training)
        load_checkpoint(path, training.state())
        compared += check_rows(before, shards_of(training), path)
        outputs[saved, present] = training.run(0), training.run(2)
        check_reading_and_writing(training)
    return compared, outputs


@pytest.mark.slow
def test_sharded_tables_grow_at_any_plan_and_world_size(tmp_path: Path) -> None:
    before = run_ranks(save_each_plan, 2, tmp_path)
    for world in (2, 1):
        after = run_ranks(load_each_plan, world, tmp_path)
        # Each table is compared whole, or by its column shards.
        assert sum(compared for compared, _ in after) >= len(PLANS) ** 2 * sum(ROWS)
        for rank, (_, outputs) in enumerate(after):
            for (saved, present), (at_checkpoint, later) in outputs.items():
                expected, undisturbed = before[rank][saved]
                if world == 2 and saved == present:
                    assert torch.equal(at_checkpoint, expected)
                    assert torch.equal(later, undisturbed)
                torch.testing.assert_close(at_checkpoint, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_one_rank_saved_two_grow(tmp_path: Path) -> None:
    run_ranks(save_each_plan, 1, tmp_path)
    assert sum(compared for compared, _ in run_ranks(load_each_plan, 2, tmp_path)) >= 4 * sum(ROWS)
