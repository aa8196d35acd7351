"""The meter counts what the transformers really did, and shows which weights moved."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.modules.encoders.backbone import backbone_flops, transformer_flops_per_token
from hllm_torchrec.training import throughput
from hllm_torchrec.training.throughput import (
    StepMeter,
    forward_passes,
    global_matmul_peak,
    snapshot_weights,
    untrained_tasks,
    user_token_counts,
)
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config

CPU = torch.device("cpu")
LLAMA_KEYS = fixtures.LLAMA["hidden_size"] * fixtures.LLAMA["hidden_size"] // 4 * 2
"""Entries of the matrix that makes keys: as wide as two of four heads."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def batch_of(cfg: Config, users: int = 5) -> HybridBatch:
    return fixtures.collator(cfg, training=True)(fixtures.pieces()[:users], 0, 0)


# --- tokens and keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["late", "early", "none"])
def test_user_tokens_and_keys_are_those_of_the_packed_pass(fusion: str) -> None:
    batch = batch_of(fixtures.config(objective={"fusion": fusion}))
    lengths = batch.seq_offsets.diff().tolist()
    tokens = sum(lengths)
    keys = sum(seen for length in lengths for seen in range(1, length + 1))
    if fusion != "none":
        tokens += batch.query_times.numel()
        keys += sum(visible + 1 for visible in batch.query_visible.tolist())
    assert user_token_counts(batch, queries=fusion != "none") == (tokens, keys)


@pytest.mark.parametrize("pooling", ["item", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_item_tokens_and_keys_are_those_of_the_encoded_items(pooling: str, causal: bool) -> None:
    model = fixtures.model(fixtures.config(item_llm={"pooling": pooling, "causal": causal}))
    encoder = ItemEncoder(fixtures.token_store(), CPU)
    ids = torch.tensor([0, 4, 9, 18])  # item 0 and one other have no text
    encoder.encode(model.item_llm, ids)
    text = [int(fixtures.token_store().lengths[i]) for i in ids.tolist()]
    assert 0 in text and max(text) > 1
    lengths = [n + 1 if pooling == "item" else max(n, 1) for n in text]
    assert encoder.work.tokens == sum(lengths)
    expected = sum(sum(range(1, n + 1)) if causal else n * n for n in lengths)
    assert encoder.work.keys == expected


@pytest.mark.parametrize("pooling", ["item", "mean"])
def test_tokens_of_a_shared_prefix_count_once(pooling: str) -> None:
    model = fixtures.model(fixtures.config(item_llm={"pooling": pooling}))
    store = fixtures.token_store()
    encoder = ItemEncoder(store, CPU, share_prefix=True)
    ids = torch.tensor([0, 4, 9, 20])  # item 0 and one other have no text
    shared, begins = len(store.prefix), store.begins_with_prefix[ids.numpy()].tolist()
    assert shared > 1 and sorted(begins) == [False, False, True, True]
    encoder.encode(model.item_llm, ids)
    rests = [int(store.lengths[i]) - shared * has for i, has in zip(ids.tolist(), begins, strict=True)]
    lengths = [n + 1 if pooling == "item" or not n + shared * has else n for n, has in zip(rests, begins, strict=True)]
    assert encoder.work.tokens == shared + sum(lengths)
    keys = [seen + shared * has for n, has in zip(lengths, begins, strict=True) for seen in range(1, n + 1)]
    assert encoder.work.keys == sum(range(1, shared + 1)) + sum(keys)
    assert encoder.costs(ids).tolist() == [n + 1 for n in rests]
    encoder.encode(model.item_llm, ids[:0])
    assert encoder.work.tokens == shared + sum(lengths), "without items there is no prefix either"


# --- operations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [fixtures.LLAMA, fixtures.BERT], ids=["llama", "bert"])
def test_backbone_flops_equal_those_that_torch_counts(shape: dict[str, Any]) -> None:
    """With every token attending to every other, as the stock dense attention computes it."""
    settings = AutoConfig.for_model(**shape, attn_implementation="eager")
    options = {"add_pooling_layer": False} if shape["model_type"] == "bert" else {}
    model = AutoModel.from_config(settings, **options).eval()
    tokens = 11
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=torch.randn(1, tokens, shape["hidden_size"]))
    assert backbone_flops(model, tokens, keys=tokens * tokens) == counter.get_total_flops()


def test_no_tokens_cost_nothing() -> None:
    assert backbone_flops(fixtures.model(fixtures.config()).user.backbone, 0, 0) == 0.0


@pytest.mark.parametrize(
    ("options", "item", "user"),
    [
        ({}, 3, 3),
        ({"item_llm": {"trainable": False}}, 1, 3),
        ({"item_llm": {"freeze_words": True}}, 3, 3),
        ({"user": {"trainable": False}}, 3, 2),
    ],
)
def test_frozen_parts_cost_fewer_passes(options: dict[str, Any], item: int, user: int) -> None:
    sections = {name: dict(values) for name, values in options.items()}
    model = fixtures.model(fixtures.config(**sections))
    assert [forward_passes(part.module) for part in model.named_backbones()] == [item, user]


def test_a_step_is_measured_in_tokens_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 1000.0, 1002.0, 1002.0])
    monkeypatch.setattr("hllm_torchrec.training.throughput.time.perf_counter", lambda: next(clock))
    cfg = fixtures.config(objective={"fusion": "early"})
    model, batches = fixtures.model(cfg), [batch_of(cfg, 2), batch_of(cfg, 3)]
    encoder = model.item_source.encode
    assert isinstance(encoder, ItemEncoder)
    meter = StepMeter(model, {"item_llm": encoder}, peak_flops=1e9)
    for batch in batches:
        model(batch)
    found = meter.tick(batches)
    flops = sum(3 * (naive_item_flops(model, batch) + naive_user_flops(model, batch)) for batch in batches)
    item_tokens = sum(int(fixtures.token_store().lengths[i]) + 1 for b in batches for i in b.unique_items.tolist())
    user_tokens = sum(batch.item_ids.numel() + batch.query_times.numel() for batch in batches)
    assert found == pytest.approx(
        {
            "seconds": 0.5,
            "samples_per_second": sum(batch.num_exposures for batch in batches) / 0.5,
            "item_tokens_per_second": item_tokens / 0.5,
            "user_tokens_per_second": user_tokens / 0.5,
            "mfu": flops / 0.5 / 1e9,
        }
    )
    idle = meter.tick([batches[0]])  # from cached embeddings: no item is encoded
    assert idle["seconds"] == 2.0 and idle["item_tokens_per_second"] == 0.0
    assert idle["mfu"] == pytest.approx(3 * naive_user_flops(model, batches[0]) / 2.0 / 1e9)


def naive_item_flops(model: HLLM, batch: HybridBatch) -> float:
    lengths = [int(fixtures.token_store().lengths[i]) + 1 for i in batch.unique_items.tolist()]
    assert model.item_llm is not None
    backbone = model.item_llm.backbone
    layers, key_value = backbone.config.num_hidden_layers, 2 * 2 * LLAMA_KEYS
    every_layer = sum(token_flops(backbone, seen) for n in lengths for seen in range(1, n + 1))
    last = sum(token_flops(backbone, n) / layers + (n - 1) * key_value for n in lengths)  # only [ITEM]'s row is read
    return every_layer * (layers - 1) / layers + last


def naive_user_flops(model: HLLM, batch: HybridBatch) -> float:
    seen = [n for length in batch.seq_offsets.diff().tolist() for n in range(1, length + 1)]
    seen += [visible + 1 for visible in batch.query_visible.tolist()]
    return sum(token_flops(model.user.backbone, n) for n in seen)


def token_flops(backbone: Any, context: int) -> float:
    c = backbone.config
    return transformer_flops_per_token(
        c.hidden_size,
        c.intermediate_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        context,
    )


def test_restarting_leaves_out_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 51.0, 51.0])
    monkeypatch.setattr("hllm_torchrec.training.throughput.time.perf_counter", lambda: next(clock))
    cfg = fixtures.config()
    model, batch = fixtures.model(cfg), batch_of(cfg)
    meter = StepMeter(model, {"item_llm": model.item_source.encode}, peak_flops=1e9)
    model(batch)
    meter.restart()
    found = meter.tick([batch])
    assert found["seconds"] == 1.0 and found["item_tokens_per_second"] == 0.0


def test_rates_are_those_of_all_ranks() -> None:
    found = run_ranks(tick, 2)
    total = sum(exposures for exposures, _ in found)
    assert found[0][0] != found[1][0]
    for _, numbers in found:
        assert numbers["samples_per_second"] * numbers["seconds"] == pytest.approx(total)


def tick() -> tuple[int, dict[str, float]]:
    cfg = fixtures.config(item_llm={"enabled": False})
    batch = batch_of(cfg, users=2 + 3 * torch.distributed.get_rank())
    return batch.num_exposures, StepMeter(fixtures.model(cfg), {}, peak_flops=1e9).tick([batch])


def test_the_peak_is_that_of_all_ranks_together() -> None:
    first, second = run_ranks(peak, 2)
    assert first == second > 1e8
    init_distributed()
    assert global_matmul_peak(CPU, torch.float32) == global_matmul_peak(CPU, torch.float32) > 1e8  # measured once


def peak() -> float:
    throughput._local_peak.cache_clear()  # the server that ranks are forked from has measured it
    return global_matmul_peak(CPU, torch.float32)


# --- weights ---------------------------------------------------------------------------------------------


def test_moved_weights_are_shown_relative_to_their_size(tmp_path: Path) -> None:
    model = fixtures.model(fixtures.config())
    before = snapshot_weights(model)
    assert snapshot_weights(model).relative_change_since(before) == {"item_llm": 0.0, "user": 0.0}
    with torch.no_grad():
        model.user.backbone.layers[0].self_attn.q_proj.weight.mul_(1.25)
    moved = snapshot_weights(model).relative_change_since(before)
    assert moved["item_llm"] == 0.0 and moved["user"] == pytest.approx(0.25, rel=1e-5)


def test_item_embeddings_show_what_moved_before_them() -> None:
    model = fixtures.model(fixtures.config()).train()
    encoder = model.item_source.encode
    assert isinstance(encoder, ItemEncoder)
    before = snapshot_weights(model, encoder)
    assert before.matrices["item_embeddings"].shape == (fixtures.ITEMS, fixtures.LLAMA["hidden_size"])
    assert snapshot_weights(model, encoder).relative_change_since(before)["item_embeddings"] == 0.0
    with torch.no_grad():
        model.item_llm.backbone.norm.weight.mul_(1.5)
    assert snapshot_weights(model, encoder).relative_change_since(before)["item_embeddings"] == pytest.approx(
        0.5, rel=1e-4
    )
    assert model.item_llm.training


def test_the_smallest_change_is_seen() -> None:
    model = fixtures.model(fixtures.config(item_llm={"shape": fixtures.BERT, "causal": False}))
    before = snapshot_weights(model)
    weight = model.item_llm.backbone.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        weight[0, 0] = float(np.nextafter(np.float32(weight[0, 0]), np.float32(9)))
    assert snapshot_weights(model).relative_change_since(before)["item_llm"] > 0


def test_layers_of_any_name_are_seen() -> None:
    shape = {"model_type": "gpt2", "n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    model = fixtures.model(fixtures.config(item_llm={"shape": shape}))
    before = snapshot_weights(model)
    with torch.no_grad():
        model.item_llm.backbone.h[0].attn.c_attn.weight.mul_(1.25)
    assert snapshot_weights(model).relative_change_since(before)["item_llm"] == pytest.approx(0.25, rel=1e-5)


def test_a_model_of_ids_shows_its_user_encoder_only(tmp_path: Path) -> None:
    model = fixtures.model(replace(config(tmp_path, item_llm__enabled=False)))
    assert snapshot_weights(model).matrices.keys() == {"user"}


# --- tasks without labels -----------------------------------------------------------------------------------


def test_a_task_that_no_step_had_labels_for_is_said() -> None:
    names = ["click", "like"]
    (said,) = untrained_tasks(fixtures.config(), names, {0})
    why = "no exposure of these steps had this label and a weight above 0: the task was not trained"
    assert said == f"caution: like: {why}"
    assert untrained_tasks(fixtures.config(), names, {0, 1}) == []
    generative = fixtures.config(objective={"fusion": "none", "generative_weight": 1.0})
    assert untrained_tasks(generative, names, set()) == [], "a model without a head has no tasks"
