"""bench_loader: both loaders yield samples of the same kind, with the same tokens."""

from itertools import islice
from pathlib import Path

import pytest

from hllm_torchrec.models.assembly import open_token_store
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module, tiny_result

bench_loader, bench_step = bench_module("bench_loader"), bench_module("bench_step")


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for module in (bench_loader, bench_step):
        monkeypatch.setattr(module, "TEXT_KEYS", ("title", "brand"))
    return ["--dataset", str(fixtures.dataset().root), "--tokenizer", str(fixtures.tokenizer_dir())]


def test_the_plain_dataset_makes_the_token_stores_tokens(shop: list[str]) -> None:
    dataset = fixtures.dataset()
    plain = bench_loader.PlainDataset(dataset, fixtures.tokenizer_dir(), history=5)
    _, packed = next(bench_loader.our_batches(dataset, fixtures.tokenizer_dir(), 5))
    assert len(packed) > 0
    sample = plain[0]
    assert len(sample["items"]) == len(sample["negatives"]) == 6
    assert sum(sample["items_lengths"]) == len(sample["items_tokens"])
    assert not set(sample["items"]) & set(sample["negatives"])
    store = open_token_store(bench_loader.our_config(dataset, fixtures.tokenizer_dir(), 5).item_llm, dataset)
    for item in range(1, dataset.num_items):
        assert plain._tokens(item) == [*store.gather([item])[0].tolist(), 0]


def test_batches_go_on_after_an_epoch(shop: list[str]) -> None:
    batches = bench_loader.our_batches(fixtures.dataset(), fixtures.tokenizer_dir(), 20)
    users = [batch.user_ids.numel() for batch, _ in islice(batches, 12)]
    assert users == [bench_loader.USERS] * 12


def test_bench_loader_ends_with_its_json(
    shop: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "loader.json"
    bench_loader.main(["--tiny", "--out", str(out), *shop])
    result = tiny_result("loader", out, capsys.readouterr().out)
    assert result["ratios"]["loader_h50"] > 1
    assert result["shapes"]["loader_h50"]["plain_items"] == 8 * 2 * 51
