"""The code that builds and shards models, run for ranks that are not there, gives what `hllm plan` says.

torch's fake process groups answer every collective at once, so one process can be any rank of 512; tables are on the
meta device, so 10^9 rows take no memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec.distributed import collective_utils
from torchrec.distributed.planner.types import HardwareConfig, TrainerConfig

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.embedding import optimizers, sharding
from hllm_torchrec.launch import plan as command
from hllm_torchrec.models import parallelize
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.planning.estimate import HARDWARE, Machine, Workload, estimate
from hllm_torchrec.planning.traffic import table_traffic
from tests.helpers import fixtures

INDUSTRIAL = Path(__file__).resolve().parents[2] / "configs" / "plan" / "industrial.yaml"
TABLES = {"item_id": 10**9 + 1, "action": 16, "user": 10**8 + 1}
H100 = HARDWARE["h100"]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes this process a rank of a world that is not there."""
    monkeypatch.setattr(collective_utils, "_INITIALIZED", True)  # a debugging switch that rank 0 would send

    def become(rank: int, world: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def built(config: Config, tables: dict[str, int]) -> HLLM:
    """The model of a configuration, on the meta device."""
    with torch.device("meta"):
        return build_model(config, tables, 0.5, torch.device("meta"))


def local_shards(config: Config, world: int) -> list[tuple[str, int, int]]:
    """(table, rows, columns) of what TorchRec makes on this rank of the tables that it shards."""
    model = built(config, TABLES)
    settings = optimizers.TableSettings.of(config)
    optimizers.apply_table_optimizer(model.features.tables, settings)
    constraints = sharding.table_constraints(model, settings, "cuda")
    hardware = HardwareConfig(hbm_cap_bytes=round(H100["memory"]), ddr_cap_bytes=round(H100["memory"]))
    plan = sharding.plan_sharding(model, constraints, "cuda", TrainerConfig(world, 8), hardware)
    sharded = sharding.distribute(model, plan, torch.device("meta"), ddp=False)
    kernels = [kernel for lookup in sharded.module.features.tables._lookups for kernel in _kernels(lookup)]
    return sorted(
        (table.name, *weight.shape)
        for kernel in kernels
        for table, weight in zip(kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True)
        if weight.device.type == "meta"  # replicated tables are made at once
    )


def _kernels(lookup: Any) -> list[Any]:
    return list(getattr(lookup, "module", lookup)._emb_modules)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        (32, "row_wise"),
        pytest.param(32, "auto", marks=pytest.mark.slow),
        pytest.param(512, "row_wise", marks=pytest.mark.slow),
    ],
)
def test_torchrec_makes_the_shards_that_the_plan_says(world: int, sharding: str, ranks: Any) -> None:
    config = load_config([f"--config={INDUSTRIAL}", f"--features.sharding={sharding}", "--features.time_depth=0"])
    machine = Machine(world // 8, 8, **H100)
    found = estimate(config, Workload(10**9, 10**8, 1.0, 1000.0), machine, TABLES)
    assert sum(rows for name, _, rows, _ in found.shards if name == "item_id") == 10**9 + 1
    for rank in (world // 2 + 3, world - 1) if world < 100 else (world - 1,):
        ranks(rank, world)
        assert dist.get_world_size() == world
        planned = sorted((name, rows, columns) for name, on, rows, columns in found.shards if on == rank)
        assert local_shards(config, world) == planned
    if sharding == "row_wise":
        assert planned, "every rank has rows of both tables"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp_leaves_each_rank_the_weights_that_the_plan_says(ranks: Any) -> None:
    config = fixtures.config(
        item_llm={"shape": {**fixtures.LLAMA, "hidden_size": 64, "vocab_size": 4096}}, parallel={"dense": "fsdp"}
    )
    tables = {"item_id": 1001, "action": 16}
    found = estimate(config, Workload(1000, 1000, 10.0, 32.0), Machine(4, 8, **H100), tables)
    ranks(5, 32)
    model = built(config, tables)
    parallelize._shard_dense(model, torch.device("cpu"))
    own = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert any(name.startswith("item_llm.") for name in own) and any(name.startswith("user.") for name in own)
    here = 4 * sum(p.to_local().numel() for p in own.values())
    assert here == pytest.approx(found.memory["weights"], rel=0.1)  # rows that 32 does not divide are padded


def test_each_kind_of_sharding_sends_what_its_collectives_send() -> None:
    """By hand for W = 4 ranks on 2 nodes, 10 rows of 8 floats on each rank: 320 bytes."""

    def traffic(kind: str, owners: list[int], columns: int) -> tuple[float, float, float]:
        found = table_traffic([("t", _Sharding(kind, owners, columns))], 10, 4, 2, (1.0, 1.0))
        return found.within, found.across, found.held

    # The owner sends 320 bytes to its neighbour and to each of two others; its own gradients stay near.
    assert traffic("table_wise", [0], 8) == (320 + 320, 2 * 320, 3 * 320)
    # Everybody sums 4 x 320 bytes: a quarter of that to each other rank, there and back.
    assert traffic("row_wise", [0, 1, 2, 3], 8) == (2 * 320, 4 * 320, 3 * 320)
    # Two ranks share the sums of 4 x 320 bytes, there and back, and send their halves to the other node's ranks.
    assert traffic("table_row_wise", [0, 1], 8) == (2 * 640 + 320, 320, 3 * 320)
    assert table_traffic([("t", _Sharding("data_parallel", [], 8))], 10, 4, 2, (1.0, 1.0)).within == 0


class _Sharding:
    """What `table_traffic` reads of a ParameterSharding."""

    def __init__(self, kind: str, owners: list[int], columns: int) -> None:
        self.sharding_type = kind
        self.sharding_spec = _Spec([_Shard(owner, columns) for owner in owners]) if owners else None


class _Spec:
    def __init__(self, shards: list["_Shard"]) -> None:
        self.shards = shards


class _Shard:
    def __init__(self, owner: int, columns: int) -> None:
        self.shard_sizes, self.placement = [5, columns], _Placement(owner)


class _Placement:
    def __init__(self, owner: int) -> None:
        self._owner = owner

    def rank(self) -> int:
        return self._owner


@pytest.mark.slow
def test_the_command_plans_an_industrial_machine(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", str(INDUSTRIAL), "--nodes", "4", "--items", "1000000000", "--users", "100000000"]
    assert command.main([*given, "--rows", "user=100000001", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bytes_of_rows = (10**9 + 10**8 + 2) * (64 * 2 + 4)
    by_rank = [sum(rows for _, on, rows, _ in found["shards"] if on == rank) for rank in range(32)]
    assert sum(by_rank) * (64 * 2 + 4) == bytes_of_rows
    assert found["memory"]["tables"] == pytest.approx(max(by_rank) * (64 * 2 + 4), rel=0.05)
    assert command.main([*given, "--rows", "user=100000001"]) == 0
    said = capsys.readouterr().out
    assert "rows x 64 each" in said and "all-reduce" in said and "a step" in said


def test_rows_of_what_is_no_feature_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", str(INDUSTRIAL), "--items", "9", "--users", "9", "--rows"]
    for wrong in ("shop=3", "user=many", "user=0"):
        assert command.main([*given, wrong]) == 2
        assert f"--rows {wrong}: must be FEATURE=N; features are user" in capsys.readouterr().err
