"""bench_many_items: a service of a store is ready, and recommends."""

import json
from pathlib import Path

import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed
from tests.helpers.scripts import bench_module

bench_many_items = bench_module("bench_many_items")


@pytest.mark.slow  # a dataset, a step of training, a store
def test_bench_many_items_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--tiny", "--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    bench_many_items.main(given)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["shapes"] == {"items": 2000, "users": 200, "width": 16, "index": "ivf"}
    assert found["recommend_ms"]["p50"] > 0 and found["ready"]["seconds"] > found["ready"]["scorer"] > 0
    assert len(list((tmp_path / "index").glob("index-*.faiss"))) == 1
    destroy_distributed()
