"""The plug-in: stored vectors in every kind of DLRM, both ways, on one and two ranks; unknown ids have a default."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
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


def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    stores = ["--items", str(tmp_path / "items"), "--users", str(tmp_path / "users")]
    losses = run_ranks(run_example, 2, [*write_world(tmp_path), *stores])
    assert all(loss < 0.6 for loss in losses)


def test_what_is_added_to_the_script_is_about_twenty_lines() -> None:
    inside, added = False, 0
    for line in EXAMPLE.read_text().splitlines()[10:]:
        if line.strip() in ("# hllm >", "# hllm <"):
            inside = line.strip().endswith(">")
        elif inside or "# hllm" in line:
            added += bool(line.strip())
            inside = inside and "# hllm <" not in line
    assert 15 <= added <= 25
