"""bench_store: both sides write the same bytes, gather the same vectors and encode the same texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.store import EmbeddingStore
from tests.helpers.scripts import bench_module, tiny_result

bench_store = bench_module("bench_store")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench_store, "BLOCK", 7)
    return bench_store.Rows(40, 3)


def test_the_store_holds_the_bytes_of_the_plain_file(rows: Any, tmp_path: Path) -> None:
    rows.write_plain(tmp_path / "plain.bin")
    rows.write_store(tmp_path / "string", "string")
    (file,) = (tmp_path / "string" / "runs").glob("*/vectors-0000.bin")
    assert file.read_bytes() == (tmp_path / "plain.bin").read_bytes()
    assert len(EmbeddingStore.open(tmp_path / "string").snapshot()) == 40


def test_other_vectors_stop_the_bench(rows: Any, tmp_path: Path) -> None:
    rows.write_plain(tmp_path / "plain.bin")
    rows.vectors[5] += 1
    rows.write_store(tmp_path / "int64", "int64")
    with pytest.raises(AssertionError, match="not those of the plain file"):
        bench_store.Gathers(rows, tmp_path, "int64", 300)


def test_lance_hands_out_and_replaces_the_same_vectors(rows: Any, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance", reason="package pylance is not installed")
    rows.write_lance(tmp_path / "lance")
    table = bench_store.LanceTable(tmp_path / "lance", 3)
    asked = np.array([3, 39, 0, 3])
    assert np.array_equal(table.gather(asked), rows.vectors[asked].numpy())
    table.index_ids()
    table.upsert(np.array([2, 77]), np.ones((2, 3), np.float16))
    now = lance.dataset(str(tmp_path / "lance")).to_table().to_pydict()
    wanted = dict(enumerate(rows.vectors.tolist())) | {2: [1.0, 1.0, 1.0], 77: [1.0, 1.0, 1.0]}
    assert dict(zip(now["id"], now["vector"], strict=True)) == wanted and len(now["id"]) == 41


def test_the_model_alone_encodes_the_texts_of_the_job(tmp_path: Path) -> None:
    init_distributed()
    experiment = bench_store.invented(30, bench_store.SMALL | {"vocab_size": 64}, 6)
    forward = bench_store.Forward(experiment)
    tokens = experiment.item_encoder.tokens
    packed = np.concatenate([token_ids.numpy() for token_ids, _ in forward.packed])
    assert np.array_equal(np.sort(packed), np.sort(tokens.values)) and len(tokens) == 31
    assert sum(len(cu_seqlens) - 1 for _, cu_seqlens in forward.packed) == 30
    destroy_distributed()


@pytest.mark.slow
def test_bench_store_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "store.json"
    bench_store.main(["--tiny", "--out", str(out)])
    result = tiny_result("store", out, capsys.readouterr().out)
    assert {
        "store_write_vs_plain",
        "store_gather_vs_memmap",
        "refresh_vs_full",
        "embed_job_vs_forward",
    } <= set(result["ratios"])
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert len(result["seconds"]["refresh"]["refresh"]) == 9 and 0 < result["matmul_share"]["embed_job"]["job"] < 1
    assert torch.get_num_threads() == result["threads"]
