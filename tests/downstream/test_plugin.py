"""The plug-in: stored vectors in every kind of DLRM, both ways, on one and two ranks; unknown ids have a default."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.downstream.plugin import StoredVectors, VectorLookup, append_vectors, plug_into
from hllm_torchrec.store import EmbeddingStore
from tests.helpers.distributed import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "dlrm_plugin.py"
KINDS: list[tuple[type[DLRM], dict[str, Any]]] = [
    (DLRM, {}),
    (DLRM_DCN, {"dcn_num_layers": 1, "dcn_low_rank_dim": 2}),
    (DLRM_Projection, {"interaction_branch1_layer_sizes": [8], "interaction_branch2_layer_sizes": [8]}),
]


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def make_store(path: Path, ids: list[str], width: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(seed))
    store = EmbeddingStore.create(path, width, "fp32")
    with store.writer() as writer:
        writer.upsert(ids, vectors)
        writer.commit()
    return vectors


def test_a_lookup_marks_and_counts_unknown_ids(tmp_path: Path) -> None:
    vectors = make_store(tmp_path / "s", ["a", "b"], 3)
    lookup = VectorLookup(tmp_path / "s")
    found = lookup(["b", "zz", "a"])
    assert torch.equal(found, torch.cat([vectors[[1, 1, 0]] * torch.tensor([[1], [0], [1]]), torch.eye(3)[:, 1:2]], 1))
    assert (lookup.num_requested, lookup.num_unknown) == (3, 1) and lookup.unknown_share == pytest.approx(1 / 3)
    assert append_vectors(torch.ones(3, 2), found, found).shape == (3, 10)
    with pytest.raises(ValueError, match="no embedding store"):
        VectorLookup(tmp_path / "nowhere")


def test_ids_may_be_numbers_in_any_form(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "s", 3, "fp32", "int64")
    ids, vectors = np.array([2**62, -5, 7]), torch.randn(3, 3)
    with store.writer() as writer:
        writer.upsert(torch.from_numpy(ids), vectors)
        writer.commit()
    lookup = VectorLookup(tmp_path / "s")
    expected = torch.cat([torch.stack([vectors[2], torch.zeros(3), vectors[0]]), torch.eye(3)[:, 1:2]], dim=1)
    for asked in (torch.tensor([7, 8, 2**62]), np.array([7, 8, 2**62]), [7, 8, 2**62]):
        assert torch.equal(lookup(asked), expected)
    assert torch.equal(lookup(torch.tensor([7], dtype=torch.int32)), expected[:1])
    with pytest.raises(ValueError, match="keys are float: this store's keys are of type int64"):
        lookup(torch.tensor([7.0]))
    make_store(tmp_path / "texts", ["7"], 3)
    with pytest.raises(ValueError, match="keys are int64: this store's keys are of type string"):
        VectorLookup(tmp_path / "texts")(torch.tensor([7]))


def test_a_lookup_reads_later_commits_and_refuses_vectors_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = EmbeddingStore.create(path, 3, "fp32", facts={"weights": "v1"})
    lookup = VectorLookup(path)
    with store.writer() as writer:
        writer.upsert(["a"], torch.ones(1, 3))
        writer.commit()
    assert lookup(["a"])[0, 3] == 1 and lookup.refresh() and not lookup.refresh()
    assert lookup(["a"]).tolist() == [[1, 1, 1, 0]]
    assert VectorLookup(path, lookup.identity)(["a"])[0, 3] == 0
    shutil.rmtree(path)
    EmbeddingStore.create(path, 3, "fp32", facts={"weights": "v2"})
    refused = rf"s: its vectors were made by another model \(.*\) than the expected one \({lookup.identity}\)"
    with pytest.raises(ValueError, match=refused):
        lookup.refresh()
    assert lookup(["a"])[0, 3] == 0  # still the old ones
    with pytest.raises(ValueError, match=refused):
        VectorLookup(path, lookup.identity)


def test_unknown_ids_have_a_default_that_alone_learns_from_them() -> None:
    module = StoredVectors(4, 2)
    found = torch.cat([torch.randn(3, 4), torch.tensor([[1.0], [0.0], [1.0]])], dim=1)
    out = module(found)
    assert torch.equal(out[0], module.default) and torch.equal(out[2], module.default)
    torch.testing.assert_close(out[1], module.project(module.norm(found[1, :4])))
    out[[0, 2]].sum().backward()
    assert torch.equal(module.default.grad, torch.full((2,), 2.0)) and not module.project.weight.grad.any()


@pytest.mark.parametrize("way", ["dense", "slots"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_of_model_reads_the_vectors(kind: type[DLRM], options: dict[str, Any], way: Any) -> None:
    torch.manual_seed(0)
    tables = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=f"t{f}", embedding_dim=4, num_embeddings=9, feature_names=[f]) for f in ("x", "y")]
    )
    sizes = {"dense_arch_layer_sizes": [4], "over_arch_layer_sizes": [5, 1], **options}
    model = plug_into(kind, tables, 2, [3, 6], way, **sizes)
    sparse = KeyedJaggedTensor(["x", "y"], torch.arange(6), lengths=torch.ones(6, dtype=torch.int32))
    dense = torch.randn(3, 2 + 4 + 7, requires_grad=True)
    with torch.no_grad():
        dense[:, [5, 12]] = 0.0  # all are known
    logits = model(dense, sparse)
    assert logits.shape == (3, 1)
    logits.sum().backward()
    moved = dense.grad.abs().sum(0) > 0
    assert moved[[2, 3, 4]].any() and moved[6:12].any() and not moved[[5, 12]].any()
    used = [p for name, p in model.named_parameters() if "default" not in name]
    assert all(p.grad is not None for p in used)
    slots = model.dlrm.inter_arch.F
    assert slots == (4 if way == "slots" else 2) and isinstance(model.dlrm.inter_arch, nn.Module)


@pytest.mark.parametrize("way", ["dense", "slots"])
def test_an_embedding_collection_is_summed_like_bags(way: Any) -> None:
    names = {name: [name] for name in ("x", "y")}
    bags = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=f"t{f}", embedding_dim=4, num_embeddings=9, feature_names=k) for f, k in names.items()]
    )
    single = EmbeddingCollection(
        [EmbeddingConfig(name=f"t{f}", embedding_dim=4, num_embeddings=9, feature_names=k) for f, k in names.items()]
    )
    with torch.no_grad():
        for name, table in bags.embedding_bags.items():
            single.embeddings[name].weight.copy_(table.weight)
    sizes = {"dense_arch_layer_sizes": [4], "over_arch_layer_sizes": [5, 1]}
    models = []
    for tables in (bags, single):
        torch.manual_seed(0)
        models.append(plug_into(DLRM, tables, 2, [3], way, **sizes))
    # Bags of 0, 2 and 3 ids for x, and of 1, 0 and 1 for y.
    sparse = KeyedJaggedTensor(
        ["x", "y"], torch.tensor([1, 2, 3, 3, 8, 0, 5]), lengths=torch.tensor([0, 2, 3, 1, 0, 1])
    )
    dense = torch.randn(3, 2 + 4)
    expected, found = (model(dense, sparse) for model in models)
    torch.testing.assert_close(found, expected)
    for output in (expected, found):
        output.sum().backward()
    for name, table in bags.embedding_bags.items():
        torch.testing.assert_close(single.embeddings[name].weight.grad, table.weight.grad)


def test_a_way_that_there_is_not_is_refused() -> None:
    tables = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["x"])]
    )
    with pytest.raises(ValueError, match="way='both': give the width of each store, and dense or slots"):
        plug_into(DLRM, tables, 2, [3], "both", dense_arch_layer_sizes=[4], over_arch_layer_sizes=[1])  # type: ignore[arg-type]


def write_world(folder: Path) -> list[str]:
    """Clicks that follow from the vectors, each of a user and an item that come once; the script's options."""
    rows, rng = 2048, np.random.default_rng(0)
    users, items = [f"u{i}" for i in range(rows)], [f"i{i}" for i in range(rows)]
    score = make_store(folder / "users", users, 6, 1)[:, 0] + make_store(folder / "items", items, 5, 2)[:, 0]
    names = [name if i % 8 else f"new{i}" for i, name in enumerate(users)]
    table = {"user": names, "item": items, "label": (score.numpy() > 0).astype(np.int8)}
    pq.write_table(pa.table({**table, "hour": rng.random(rows)}), folder / "clicks.parquet")
    return ["--clicks", str(folder / "clicks.parquet"), "--batch-size", "64"]


def run_example(options: list[str]) -> float:
    spec = importlib.util.spec_from_file_location("dlrm_plugin", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(options)


@pytest.mark.parametrize(("way", "model"), [("dense", "dlrm"), ("slots", "dcn")])
def test_the_example_learns_from_vectors_what_ids_cannot_tell(
    way: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*write_world(tmp_path), "--model", model]
    stores = ["--items", str(tmp_path / "items"), "--users", str(tmp_path / "users"), "--way", way]
    init_distributed()
    plain = run_example(options)
    plugged = run_example([*options, *stores])
    assert plugged < plain - 0.1
    said = capsys.readouterr().out
    assert ": 0.0% of 2048 item ids are not in the store" in said and ": 12.5% of 2048 user ids are not in" in said


@pytest.mark.slow
def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    stores = ["--items", str(tmp_path / "items"), "--users", str(tmp_path / "users"), "--output", str(tmp_path / "out")]
    losses = run_ranks(run_example, 2, [*write_world(tmp_path), *stores])
    assert all(loss < 0.6 for loss in losses)
    # The exported program is that of both ranks' shards, for batches of any size.
    program, ids = torch.export.load(tmp_path / "out" / "model.pt2").module(), torch.arange(14).reshape(2, 7)
    dense = torch.randn(7, 2 + 6 + 7)
    whole, halves = program(dense, ids), [program(dense[cut], ids[:, cut]) for cut in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(whole, torch.cat(halves))
    assert whole.std() > 0.01 and ((whole > 0) & (whole < 1)).all()
    identities = json.loads((tmp_path / "out" / "stores.json").read_text())
    assert VectorLookup(tmp_path / "users", identities["user"]).width == 6


def test_what_is_added_to_the_script_is_about_twenty_lines() -> None:
    inside, added = False, 0
    for line in EXAMPLE.read_text().splitlines()[10:]:
        if line.strip() in ("# hllm >", "# hllm <"):
            inside = line.strip().endswith(">")
        elif inside or "# hllm" in line:
            added += bool(line.strip())
            inside = inside and "# hllm <" not in line
    assert 15 <= added <= 25
