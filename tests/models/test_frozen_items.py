"""A table filled from a store holds its vectors on every plan, and training leaves its bytes alone."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardedTensor

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.models.stored_items import fill_from_store
from hllm_torchrec.modules.features.frozen_items import FROZEN_ITEMS, FrozenItems
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks

WIDTH = 8
RAW_IDS = fixtures.dataset().items["raw_item_id"].to_pylist()


class Learner(nn.Module):
    """Item vectors through a linear layer."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = FrozenItems(fixtures.dataset().num_items, WIDTH, device=device)
        self.over = nn.Linear(WIDTH, 1)

    def forward(self, item_ids: Tensor) -> Tensor:
        return self.over(self.items(item_ids))


def stored(path: Path, ids: list[str]) -> EmbeddingStore:
    store = EmbeddingStore.create(path, WIDTH, "fp16")
    with store.writer() as writer:
        writer.upsert(ids, vectors(len(ids)))
        writer.commit()
    return store


def vectors(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).half()


def test_rows_are_the_vectors_of_the_items_and_the_unknown_item_is_zero(tmp_path: Path) -> None:
    model = Learner()
    fill_from_store(model, fixtures.dataset(), stored(tmp_path / "s", RAW_IDS))
    found = model.items(torch.tensor([0, 5, 1, len(RAW_IDS), 5]))
    expected = torch.cat([torch.zeros(1, WIDTH), vectors(len(RAW_IDS)).float()])
    torch.testing.assert_close(found, expected[[0, 5, 1, len(RAW_IDS), 5]], atol=0, rtol=0)
    assert not found.requires_grad and model.items(torch.empty(0, dtype=torch.int64)).shape == (0, WIDTH)


def test_items_that_the_store_lacks_are_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"lacks 3 of the dataset's {len(RAW_IDS)} items: .* `hllm embed`"):
        fill_from_store(Learner(), fixtures.dataset(), stored(tmp_path / "s", RAW_IDS[3:]))


def shard(model: Learner, sharding: str) -> DistributedModelParallel:
    world = dist.get_world_size()
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=world, local_world_size=world), kernel_config=KernelConfig(compute_device="cpu")
    )
    constraints = {FROZEN_ITEMS: ParameterConstraints(sharding_types=[sharding], min_partition=WIDTH // 2)}
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    sharder = EmbeddingBagCollectionSharder()
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, plan=plan, sharders=[sharder], device=torch.device("cpu"))


def contents(model: nn.Module) -> list[Tensor]:
    (value,) = (v for k, v in model.state_dict().items() if FROZEN_ITEMS in k)
    parts = [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    return [part.detach().clone() for part in parts]


def train_ten_steps(path: Path, sharding: str) -> tuple[bool, bool, Tensor]:
    """Whether the table's bytes stayed, whether the layer over it moved, and rows looked up afterwards."""
    model = shard(Learner(torch.device("meta")), sharding)
    fill_from_store(model, fixtures.dataset(), EmbeddingStore.open(path))
    before, layer = contents(model), model.module.over.weight.detach().clone()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if FROZEN_ITEMS not in n], lr=0.1)
    ids = torch.arange(5 + dist.get_rank())
    for _ in range(10):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, contents(model), strict=True))
    return same, not torch.equal(layer, model.module.over.weight), model.module.items(torch.arange(30)).clone()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
def test_ten_steps_on_two_ranks_leave_every_byte_of_the_table(sharding: str, tmp_path: Path) -> None:
    stored(tmp_path / "s", RAW_IDS)
    expected = torch.cat([torch.zeros(1, WIDTH), vectors(len(RAW_IDS)).float()])[:30]
    for same, moved, rows in run_ranks(train_ten_steps, 2, tmp_path / "s", sharding):
        assert same and moved
        torch.testing.assert_close(rows, expected, atol=0, rtol=0)
