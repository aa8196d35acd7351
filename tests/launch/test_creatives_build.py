"""`hllm creatives build` by a language model: a server on this machine that a test scripts."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hllm_torchrec.data.creative_table import CreativeTable
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.launch import creatives
from tests.helpers import fixtures
from tests.helpers.completion_server import CompletionServer, completion_server


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures.dataset().root, tmp_path / "shop"))


def build(shop: Path, server: CompletionServer, *more: str, name: str = "mine") -> int:
    given = ["--dataset", str(shop), "--name", name, "--writer", "openai", "--base-url", server.url, "--model", "m"]
    return creatives.main(["build", *given, "--least", "1", *more])


def test_a_table_is_written_by_a_server(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with completion_server() as server:
        assert build(shop, server) == 0
    said = capsys.readouterr().out
    dataset = Dataset.open(shop)
    table = CreativeTable.open(dataset, "mine")
    rows = [row for split in ("train", "valid", "test") for row in table.part(split).rows.to_pylist()]
    dropped = pq.read_table(table.path / "dropped.parquet").to_pylist()
    assert f"{len(rows)} texts (train" in said and f"; {len(dropped)} left out" in said
    assert {row["origin"] for row in rows} == {"llm:m"} and len(rows) > 5
    assert all(json.loads(row["profile"])["summary"] == "summary of this reader" for row in rows)
    titles = dict(
        zip(dataset.items["raw_item_id"].to_pylist(), dataset.text(["title"])["title"].to_pylist(), strict=True)
    )
    for row in rows:
        assert row["response"].startswith(" ".join(reversed(titles[row["raw_item_id"]].split())))
    counts = table.manifest["left_out"]
    assert sum(map(len, (row["reasons"] for row in dropped))) == sum(counts.values()) and set(counts)
    # The writer knows titles, and no ids of users or items.
    sent = json.dumps(server.requests)
    assert not any(f'"{raw}"' in sent or f" {raw} " in sent for raw in dataset.users["raw_user_id"].to_pylist())
    assert set(server.paths) == {"/v1/chat/completions"}
