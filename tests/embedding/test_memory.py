"""Bytes per row of a table: as documented, as allocated by FBGEMM, and as TorchRec's planner is told."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig

from hllm_torchrec.checkpoint.load import latest_checkpoint
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.config.table_optimizers import TABLE_OPTIMIZERS
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.embedding.memory import TableEnumerator, bytes_per_row
from hllm_torchrec.embedding.optimizers import TableSettings, apply_table_optimizer
from hllm_torchrec.embedding.sharding import distribute, plan_table_sharding
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.modules.features.hybrid import HybridFeatures
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config, losses, train

ROWS, WIDTH = 96, 16
PER_ROW = {
    ("sgd", "fp32"): (64, 0),
    ("sgd", "fp16"): (32, 0),
    ("rowwise_adagrad", "fp32"): (64, 4),
    ("rowwise_adagrad", "fp16"): (32, 4),
    ("adagrad", "fp32"): (64, 64),
    ("adagrad", "fp16"): (32, 64),
    ("partial_rowwise_adam", "fp32"): (64, 68),
    ("partial_rowwise_adam", "fp16"): (32, 68),
    ("adam", "fp32"): (64, 128),
    ("adam", "fp16"): (32, 128),
}
"""(weights, state) of a row of 16, written out."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def settings(optimizer: str, dtype: str, shard_from: int = 1) -> Config:
    features = {"shard_from_rows": shard_from, "table_dtype": dtype}
    return fixtures.config(features=features, optim={"table_optimizer": optimizer})


def one_table(rows: int, cfg: Config) -> HybridFeatures:
    """A model of one table, on the meta device, with its in-backward optimizer."""
    half = cfg.features.shard_from_rows if cfg.features.table_dtype == "fp16" else None
    tables = {"item_id": rows}
    model = HybridFeatures(tables, WIDTH, time_depth=0, half_from_rows=half, device=torch.device("meta"))
    assert model.tables is not None
    apply_table_optimizer(model.tables, TableSettings.of(cfg))
    return model


def allocated(rows: int, cfg: Config, device: torch.device) -> np.ndarray:
    """Bytes of (weights, optimizer state) that FBGEMM holds of a table; what it has not got is a few bytes."""
    one = one_table(rows, cfg)
    model = distribute(one, plan_table_sharding(one, TableSettings.of(cfg), device), device, ddp=False)
    found = {"weights": 0, "momentum1": 0, "momentum2": 0}
    sharded = (m for m in model.modules() if isinstance(m, ShardedEmbeddingBagCollection))
    inside = (m for tables in sharded for lookup in tables._lookups for m in lookup.modules())
    (kernel,) = (m for m in inside if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen))
    for name in found:
        for place in ("dev", "host", "uvm"):
            tensor = getattr(kernel, f"{name}_{place}", None)
            found[name] += 0 if tensor is None else tensor.nbytes
    return np.array([found["weights"], found["momentum1"] + found["momentum2"]])


def planned(rows: int, cfg: Config, device: torch.device, sharding: str = "table_wise") -> int:
    """Bytes that the planner counts for the table, batches included."""
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=1, local_world_size=1), kernel_config=KernelConfig(compute_device=device.type)
    )
    kernel = "dense" if sharding == "data_parallel" else "fused"
    constraints = {"item_id": ParameterConstraints(sharding_types=[sharding], compute_kernels=[kernel])}
    enumerator = TableEnumerator(topology, 8, constraints)
    model = one_table(rows, cfg)
    (option,) = enumerator.enumerate(model, [EmbeddingBagCollectionSharder()])
    given = getattr(model.tables.embedding_bags["item_id"].weight, "_optimizer_classes", [])  # type: ignore[union-attr]
    assert given == ([] if sharding == "data_parallel" else [TABLE_OPTIMIZERS[cfg.optim.table_optimizer].optimizer])
    (shard,) = option.shards
    return int(shard.storage.hbm + shard.storage.ddr)


@pytest.mark.parametrize(("optimizer", "dtype"), PER_ROW)
def test_a_row_takes_what_is_documented_and_planned(optimizer: str, dtype: str) -> None:
    weights, state = PER_ROW[optimizer, dtype]
    row = bytes_per_row(WIDTH, optimizer, dtype)  # type: ignore[arg-type]
    assert (row.weights, row.state, row.total) == (weights, state, weights + state)
    init_distributed()
    cfg = settings(optimizer, dtype)
    for device in (torch.device("cpu"), torch.device("cuda")):
        if device.type == "cuda" or not TABLE_OPTIMIZERS[optimizer].cuda_only:
            assert planned(2 * ROWS, cfg, device) - planned(ROWS, cfg, device) == ROWS * row.total


@pytest.mark.parametrize(("optimizer", "dtype"), PER_ROW)
def test_a_row_takes_what_is_allocated(optimizer: str, dtype: str) -> None:
    if TABLE_OPTIMIZERS[optimizer].cuda_only and not torch.cuda.is_available():
        pytest.skip("FBGEMM has this optimizer on CUDA only")
    cfg, device = settings(optimizer, dtype), init_distributed()
    more = allocated(2 * ROWS, cfg, device) - allocated(ROWS, cfg, device)
    assert more.tolist() == [ROWS * number for number in PER_ROW[optimizer, dtype]]


def test_a_replicated_table_is_planned_with_the_state_of_the_dense_optimizer() -> None:
    cfg, device = settings("sgd", "fp16", shard_from=10_000), init_distributed()
    more = planned(2 * ROWS, cfg, device, "data_parallel") - planned(ROWS, cfg, device, "data_parallel")
    assert more == ROWS * WIDTH * (4 + 2 * 4)


def test_the_table_of_the_guide_has_the_numbers_of_the_function() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "retrieval.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (fp32|fp16) \| (\d+) \| (\d+) \| (\d+) \|", guide, re.MULTILINE)
    assert {(name, dtype) for name, dtype, *_ in rows} == set(PER_ROW) and len(rows) == len(PER_ROW)
    for name, dtype, weights, state, total in rows:
        row = bytes_per_row(64, name, dtype)  # type: ignore[arg-type]
        assert (int(weights), int(state), int(total)) == (row.weights, row.state, row.total)


# ------------------------------------------------------------------------------------------ in a run


@pytest.mark.slow
def test_float16_tables_train_nearly_alike_and_are_saved_and_loaded(tmp_path: Path) -> None:
    trainer = train(config(tmp_path / "half", max_steps=4, features__table_dtype="fp16"))
    dtypes = {
        name.split(".")[-2]: value.local_shards()[0].tensor.dtype if hasattr(value, "local_shards") else value.dtype
        for name, value in trainer.model.state_dict().items()
        if ".embedding_bags." in name
    }
    assert dtypes["item_id"] == dtypes["time_year"] == torch.float16
    assert dtypes["action"] == dtypes["time_month"] == torch.float32, "small tables stay as they are"
    kept = trainer.model.state_dict()
    assert latest_checkpoint(tmp_path / "half" / "checkpoints") is not None
    loaded = load_run(tmp_path / "half", "latest", init_distributed()).experiment.model.state_dict()
    for name in kept:
        a, b = (
            state[name].local_shards()[0].tensor if hasattr(state[name], "local_shards") else state[name]
            for state in (kept, loaded)
        )
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    train(config(tmp_path / "whole", max_steps=4))
    half, whole = losses(tmp_path / "half"), losses(tmp_path / "whole")
    assert half == pytest.approx(whole, abs=0.01) and half != whole


def test_betas_reach_the_dense_optimizer_and_are_checked(tmp_path: Path) -> None:
    trainer = train(config(tmp_path / "run", max_steps=1, optim__betas=[0.9, 0.98]))
    assert {group["betas"] for group in trainer.dense_optim.param_groups} == {(0.9, 0.98)}
    with pytest.raises(ConfigError, match=r"optim.betas: \[0.9, 1.0\]: each must be at least 0 and less than 1"):
        fixtures.config(optim={"betas": (0.9, 1.0)})
