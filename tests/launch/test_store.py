"""`hllm store`: what it prints, what it leaves, and one line for a mistake."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hllm_torchrec.inference.item_index import ItemIndex
from hllm_torchrec.launch.store import main
from hllm_torchrec.store import EmbeddingStore

faiss = pytest.importorskip("faiss")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    made = EmbeddingStore.create(tmp_path / "s", 3, "fp16", facts={"weights": "ab12"})
    with made.writer() as writer:
        writer.upsert(["a", "b", "c"], torch.tensor([[3.0, 4, 0], [0, 2, 0], [0, 0, 1]]))
        writer.commit()
        writer.delete(["c"])
        writer.commit()
    return made


def test_info_says_what_it_holds_and_what_made_it(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert "vectors    2 of 3 x fp16, keys string" in out and "in 2 segments, version 2" in out
    assert store.fingerprint[:16] in out and "weights  ab12" in out


def test_compact_leaves_one_run(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", str(store.root)]) == 0
    assert "in 1 segments, version 3" in capsys.readouterr().out


def test_verify_fails_on_damage_and_names_it(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store.root)]) == 0
    assert "every file is intact" in capsys.readouterr().out
    (file,) = store.root.glob("runs/*/vectors-0000.bin")
    file.write_bytes(b"x" * file.stat().st_size)
    assert main(["verify", str(store.root)]) == 1
    assert capsys.readouterr().out == f"{file}: the contents are not what was written\n"


def test_parquet_has_every_live_vector(store: EmbeddingStore, tmp_path: Path) -> None:
    assert main(["export", str(store.root), "--parquet", str(tmp_path / "p")]) == 0
    table = pq.read_table(tmp_path / "p")
    assert table["id"].to_pylist() == ["a", "b"] and table["embedding"].to_pylist() == [[3, 4, 0], [0, 2, 0]]


def test_faiss_finds_by_cosine(store: EmbeddingStore, tmp_path: Path) -> None:
    assert main(["export", str(store.root), "--faiss", str(tmp_path / "f")]) == 0
    index, ids = (
        faiss.read_index(str(tmp_path / "f" / "index.faiss")),
        pq.read_table(tmp_path / "f" / "ids.parquet")["id"],
    )
    scores, found = index.search(np.array([[0, 1, 0]], np.float32), 2)
    assert [ids[int(i)].as_py() for i in found[0]] == ["b", "a"]
    np.testing.assert_allclose(scores[0], [1, 0.8], atol=1e-3)
    opened = ItemIndex.open(tmp_path / "f")
    assert opened.search(np.array([[0, 7, 0]], np.float32), 2, [["b"]])[0] == [["a"]]


def test_delete_takes_ids_away_for_good(
    store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone.txt").write_text("b\nnobody\n\n")
    assert main(["delete", str(store.root), "--ids", str(tmp_path / "gone.txt")]) == 1, "one was not found"
    said = capsys.readouterr().out
    assert "1 of 2 ids had a vector; all are deleted\n1 had none: 'nobody'\n" in said
    raw = b"".join(path.read_bytes() for path in store.root.rglob("*.bin"))
    assert raw == np.array([3, 4, 0], np.float16).tobytes()


def test_ids_that_the_store_cannot_have_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EmbeddingStore.create(tmp_path / "numbers", 3, keys="int64")
    assert main(["delete", str(tmp_path / "numbers"), "--id", "4711", "--id", "u4711"]) == 2
    assert "delete: id 'u4711': the ids of " in capsys.readouterr().err
    for data, problem in (
        (b"\xff\x00", "ids.bin: 'utf-8' codec"),
        (b"\xff\xfe\x00", "ids.bin, after line 1: not utf-16"),
    ):
        (tmp_path / "ids.bin").write_bytes(data)
        assert main(["delete", str(tmp_path / "numbers"), "--ids", str(tmp_path / "ids.bin")]) == 2
        err = capsys.readouterr().err
        assert problem in err and "UTF-8" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "compact", "verify", "delete"])
def test_a_damaged_store_is_one_line_that_names_the_file(
    command: str, store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(store.root.glob("runs/*/vectors-0000.bin"))
    file.unlink()
    assert main([command, str(store.root), *(["--id", "a"] if command == "delete" else [])]) == 1 + (
        command != "verify"
    )
    captured = capsys.readouterr()
    said = captured.out if command == "verify" else captured.err
    assert f"{file} is missing" in said and said.count("\n") == 1
    assert len(list(store.root.glob("runs/*"))) == 2, "nothing else was touched"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "nowhere: no embedding store"),
        (["delete", "STORE"], "no ids: give --id or --ids FILE"),
        (["delete", "STORE", "--ids", "nowhere.txt"], "nowhere.txt"),
        (["export", "STORE", "--parquet", "STORE"], "already exists: choose another folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(store.root) if word == "STORE" else word for word in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hllm store: error: ") and message in err and err.count("\n") == 1
