"""The paper's full settings: they build on the meta device, plan for 4 x 8 and step in a fake group of 32 ranks."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.embedding.optimizers import TableSettings
from hllm_torchrec.embedding.sharding import plan_table_sharding
from hllm_torchrec.models.assembly import batch_spec_of
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.planning.model_configs import with_model_configs
from hllm_torchrec.training.optim import dense_optimizer
from tests.helpers.fixtures import dataset, pieces, token_store

FILES = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))
PAPER = [path for path in FILES if not path.stem.endswith("_lora")]
PARAMETERS = {"1b": 2.0e9, "7b": 13.0e9, "base": 1.14e8}


@pytest.fixture
def ranks_32():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=32)
    yield
    dist.destroy_process_group()


def with_random_weights(path: Path, *overrides: str, words: int | None = None) -> Config:
    """The configuration with shapes in the place of weights that are not here; words: of a smaller vocabulary."""
    config = with_model_configs(load_config(["--config", str(path), *overrides]))
    for name in ("item_llm", "user"):
        part = getattr(config, name)
        if words is not None and "vocab_size" in part.shape:
            fewer = dataclasses.replace(part, shape={**part.shape, "vocab_size": words})
            config = dataclasses.replace(config, **{name: fewer})
    return config


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_the_full_model_builds_on_the_meta_device(path):
    config = with_random_weights(path)
    with torch.device("meta"):
        model = build_model(config, {}, base_rate=0.5)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(PARAMETERS[path.stem.rsplit("_", 1)[1]], rel=0.12)
    assert all(p.is_meta for p in model.parameters())
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_table_5_has_bert_of_both_sizes_and_a_sasrec_of_four_million():
    (path,) = (path for path in PAPER if path.stem == "pixel200k_bert_base")
    with torch.device("meta"):
        model = build_model(with_random_weights(path, "--item_llm.pretrained", "models/bert-large-uncased"), {}, 0.5)
    assert sum(p.numel() for p in model.item_llm.parameters()) == pytest.approx(3.4e8, rel=0.02)
    assert sum(p.numel() for p in model.user.parameters()) == pytest.approx(4e6, rel=0.1)


def test_with_adapters_few_of_the_weights_train():
    pytest.importorskip("peft")
    (path,) = set(FILES) - set(PAPER)
    with torch.device("meta"):
        model = build_model(with_random_weights(path), {}, base_rate=0.5)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name in trained if ".backbone." in name}
    assert all(".lora_" in name for name in own) and len(own) == 2 * 32 * 7 * 2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS["7b"], rel=0.12)
    assert sum(trained.values()) < 0.007 * PARAMETERS["7b"]


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_tables_of_the_hybrid_variant_are_planned_for_32_gpus(path, ranks_32, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = with_random_weights(
        path, "--features.item_id", "true", "--features.time_depth", "6", "--features.sharding", "auto"
    )
    with torch.device("meta"):
        model = build_model(config, {"item_id": 700_000}, base_rate=0.5)
    plan = plan_table_sharding(model, TableSettings.of(config), torch.device("cuda"))
    tables = plan.plan["features.tables"]
    assert tables["time_year"].sharding_type != "data_parallel"  # 2,100 rows: above features.shard_from_rows
    assert tables["time_second"].sharding_type == "data_parallel"
    shards = tables["item_id"].sharding_spec.shards
    assert sum(s.shard_sizes[0] * s.shard_sizes[1] for s in shards) == 700_000 * model.user.width
    assert {s.placement.rank() for s in shards} <= set(range(32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["books_hllm_1b", pytest.param("books_hllm_7b", marks=pytest.mark.long), "pixel200k_bert_base"]
)
def test_a_step_at_reduced_depth_runs_in_a_fake_group_of_32(name, ranks_32):
    """Full width, LLMs of one layer, FSDP as configured. Fake collectives move no values, so no table is sharded.

    Few items, and no words that none of them has: at this width each text and each row of the vocabulary tells.
    """
    (path,) = (path for path in PAPER if path.stem == name)
    llms = ["item_llm"] if "bert" in name else ["item_llm", "user"]
    depth = [option for llm in llms for option in (f"--{llm}.layers", "1")]
    few = ["--objective.negatives", "4", "--parallel.precision", "fp32"]
    config = with_random_weights(path, *depth, *few, words=64)
    world, data = torch.device("cpu"), dataset("leave_one_out")
    spec = batch_spec_of(config, data)
    model = build_model(config, spec.tables(data), base_rate=0.5, table_device=torch.device("meta"))
    model.item_source = LiveItems(model.item_llm, ItemEncoder(token_store("leave_one_out"), world))
    wrapped = parallelize(model, config, world)
    optimizer = dense_optimizer(model.named_parameters(), learning_rate=1e-4)
    users = sorted(pieces("train", "leave_one_out"), key=lambda piece: piece.item_ids.size)
    batch = Collator(data, spec, training=True)([u for u in users if u.item_ids.size > 2][:2], epoch=0, step=0)
    output = wrapped(batch)
    assert output.generative is not None and int(output.generative.count) == batch.next_rows.numel() > 0
    (output.generative.loss_sum + output.classification).backward()
    optimizer.step()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    layer = max(model.user.parameters(), key=lambda p: p.numel())
    assert layer.to_local().numel() == layer.numel() // 32  # type: ignore[attr-defined]
