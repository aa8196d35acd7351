"""The store holds what was committed: against a dict, over crashes, collisions, damage and other processes."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.store import segment as run_module
from hllm_torchrec.store import snapshot as snapshot_module
from hllm_torchrec.store import store as store_module
from hllm_torchrec.store.keys import as_keys, hash_keys, raw_keys
from hllm_torchrec.store.segment import DTYPES, all_finite

WIDTH = 4
FACTS = {"weights": "ab12", "tokenizer": "cd34"}


def vectors(*values: float) -> Tensor:
    """A row for each value: the value, and three numbers that follow from it."""
    return torch.tensor(values, dtype=torch.float32)[:, None] * torch.tensor([1.0, -2.0, 0.5, 0.0])


def create(path: Path, **options: object) -> EmbeddingStore:
    return EmbeddingStore.create(path, WIDTH, **{"dtype": "fp32", "facts": FACTS, **options})  # type: ignore[arg-type]


def commit(store: EmbeddingStore, changes: dict[str, float | None]) -> int:
    """One commit; None deletes."""
    with store.writer() as writer:
        if kept := {key: value for key, value in changes.items() if value is not None}:
            writer.upsert(
                list(kept), vectors(*kept.values()), np.array([hash(v) % 97 for v in kept.values()], np.uint64)
            )
        if gone := [key for key, value in changes.items() if value is None]:
            writer.delete(gone)
        return writer.commit()


def contents(store: EmbeddingStore) -> dict[str, float]:
    """Every live key, by going over all rows."""
    return {
        key: float(row[0])
        for keys, rows, _ in store.snapshot().rows(batch=3)
        for key, row in zip(keys.to_pylist(), rows, strict=True)
    }


# --- what it holds ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@pytest.mark.slow
@given(
    commits=st.lists(
        st.one_of(
            st.dictionaries(st.sampled_from("abcdefgh"), st.none() | st.integers(-99, 99).map(float), max_size=6),
            st.just("compact"),
        ),
        max_size=8,
    )
)
def test_any_commits_and_compactions_leave_what_a_dict_would(
    commits: list, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, expected = create(tmp_path_factory.mktemp("store") / "s"), {}
    for change in commits:
        if change == "compact":
            store.compact()
            continue
        commit(store, change)
        expected = {key: value for key, value in (expected | change).items() if value is not None}
        assert contents(store) == expected
    snapshot = store.snapshot()
    assert contents(store) == expected and len(snapshot) == len(expected)
    found, known = snapshot.gather(list("abcdefgh"))
    assert known.tolist() == [key in expected for key in "abcdefgh"]
    torch.testing.assert_close(found, vectors(*(expected.get(key, 0.0) for key in "abcdefgh")), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["string", "int64"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_vectors_and_marks_come_back_in_the_order_asked(kind: str, dtype: str, tmp_path: Path) -> None:
    store = create(tmp_path / "s", dtype=dtype, keys=kind)
    keys = np.array([5, -3, 2**62, 0]) if kind == "int64" else ["é", "", "x" * 2000, "x" * 1999]
    stored = torch.randn(4, WIDTH)
    with store.writer() as writer:
        writer.upsert(keys, stored, np.array([1, 2, 3, 2**64 - 1], np.uint64))
        writer.commit()
    asked = [keys[i] for i in (3, 0, 2, 2, 1)]
    found, known = EmbeddingStore.open(tmp_path / "s").snapshot().gather(asked)
    assert known.all() and found.dtype == torch.float32
    torch.testing.assert_close(found, stored[[3, 0, 2, 2, 1]].to(DTYPES[dtype]).float(), atol=0, rtol=0)
    assert store.snapshot().content_hashes([*asked, *([7] if kind == "int64" else ["none"])])[0].tolist() == [
        *(2**64 - 1, 1, 3, 3, 2),
        0,
    ]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_runs_of_several_files_are_read_as_one(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FILE_BYTES", 3 * WIDTH * DTYPES[dtype].itemsize)
    store = create(tmp_path / "s", dtype=dtype)
    with store.writer() as writer:
        for first in (0, 5, 6):  # batches that fill files, and end in the middle of one
            keys = range(first, {0: 5, 5: 6, 6: 11}[first])
            writer.upsert([str(k) for k in keys], vectors(*map(float, keys)))
        writer.commit()
    assert len(list((tmp_path / "s" / "runs").glob("*/vectors-*.bin"))) == 4
    for wanted in (torch.float32, DTYPES[dtype]):
        found, known = store.snapshot().gather(["10", "0", "2", "3", "8", "3"], wanted)
        assert found.dtype == wanted and known.all()
        torch.testing.assert_close(found, vectors(10, 0, 2, 3, 8, 3).to(wanted), atol=0, rtol=0)
    commit(store, {"2": 20.0, "12": 12.0})
    for wanted in (torch.float32, DTYPES[dtype]):
        found, known = store.snapshot().gather(["10", "2", "0", "nothing", "12", "8"], wanted)
        torch.testing.assert_close(found, vectors(10, 20, 0, 0, 12, 8).to(wanted), atol=0, rtol=0)
        assert known.tolist() == [True] * 3 + [False, True, True]
    assert contents(store) == {str(k): float(k) for k in range(11)} | {"2": 20, "12": 12}


def test_of_equal_keys_in_a_commit_the_last_stands(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    with store.writer() as writer:
        writer.upsert(["a", "b", "a"], vectors(1, 2, 3))
        writer.upsert(["b"], vectors(4))
        writer.commit()
    assert contents(store) == {"a": 3, "b": 4} and len(store.snapshot()) == 2


def test_keys_whose_hashes_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(keys: pa.Array) -> np.ndarray:
        return hash_keys(keys) % np.uint64(3)

    monkeypatch.setattr(run_module, "hash_keys", coarse)
    monkeypatch.setattr(snapshot_module, "hash_keys", coarse)
    store, keys = create(tmp_path / "s"), [f"k{i}" for i in range(20)]
    commit(store, {key: float(i) for i, key in enumerate(keys)})
    commit(store, {"k3": None, "k4": -4.0})
    found, known = store.snapshot().gather([*keys, "k99"])
    assert found[:, 0].tolist() == [*range(3), 0, -4, *range(5, 20), 0]
    assert known.tolist() == [*(i != 3 for i in range(20)), False]


def test_the_hash_is_part_of_the_format() -> None:
    strings = as_keys(["", "a", "item-1", "a longer key of 27 bytes..."], "string")
    assert [hex(h) for h in hash_keys(strings).tolist()] == GOLDEN
    assert hash_keys(strings.slice(2, 1)).tolist() == [int(GOLDEN[2], 16)]  # of a slice, too
    assert hash_keys(as_keys([3, -1], "int64")).tolist() == [3, 2**64 - 1]
    many = hash_keys(as_keys([f"user-{i}" for i in range(200_000)], "string"))
    assert np.unique(many).size == 200_000


GOLDEN = ["0x0", "0xd9e01cc1bacc31e3", "0x9f118f75d5bdb6f", "0x759837b608b610a1"]


# --- snapshots and writers -------------------------------------------------------------------------------


def test_a_snapshot_sees_neither_later_commits_nor_compactions(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    commit(store, {"a": 1.0, "b": 2.0})
    before = store.snapshot()
    commit(store, {"a": 9.0, "b": None, "c": 3.0})
    store.compact()
    assert before.gather(["a", "b", "c"])[0][:, 0].tolist() == [1, 2, 0] and len(before) == 2
    assert contents(store) == {"a": 9, "c": 3}


def test_a_deleted_vector_is_gone_from_the_disk_after_compaction(tmp_path: Path) -> None:
    store, secret = create(tmp_path / "s"), 12345.678
    commit(store, {"a": 1.0, "secret-user": secret})
    commit(store, {"secret-user": None})
    store.compact()
    everything = b"".join(p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert np.float32(secret).tobytes() not in everything and b"secret-user" not in everything
    assert contents(store) == {"a": 1}


def test_without_a_commit_nothing_has_happened(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    commit(store, {"a": 1.0})
    with pytest.raises(RuntimeError, match="stop"), store.writer() as writer:
        writer.upsert(["a", "b"], vectors(5, 6))
        raise RuntimeError("stop")
    assert contents(store) == {"a": 1} and len(list((tmp_path / "s" / "runs").iterdir())) == 1


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    with store.writer(), pytest.raises(ValueError, match="another process is writing to this store"), store.writer():
        pass
    commit(store, {"a": 1.0})
    assert contents(store) == {"a": 1}


# --- damage and mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vectors-0000.bin", "keys.arrow", "hashes.npy", "rows.npy", "marks.npy"])
def test_verify_names_the_file_whose_bytes_changed(name: str, tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    commit(store, {"a": 1.0, "b": 2.0})
    assert store.verify() == []
    (file,) = (tmp_path / "s" / "runs").glob(f"*/{name}")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    (line,) = store.verify()
    assert line == f"{file}: the contents are not what was written"


def test_a_compaction_during_a_verification_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files vanish between a look at their size and the reading of their contents."""
    store = create(tmp_path / "s")
    for number in (1.0, 2.0):
        commit(store, {"a": number})
    read = run_module.crc32_file

    def compact_and_read(path: Path) -> int:
        monkeypatch.setattr(run_module, "crc32_file", read)
        store.compact()
        return read(path)

    monkeypatch.setattr(run_module, "crc32_file", compact_and_read)
    assert store.verify() == [] and contents(store) == {"a": 2.0}


@pytest.mark.parametrize(("damage", "message"), [("cut", r"has \d+ bytes instead of \d+"), ("gone", "is missing")])
def test_a_cut_or_missing_file_is_an_error_that_names_it(damage: str, message: str, tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    commit(store, {"a": 1.0})
    (file,) = (tmp_path / "s" / "runs").glob("*/vectors-0000.bin")
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"vectors-0000.bin {message}.*: the store is damaged; restore it"):
        store.snapshot()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "KeyError: 'runs': the file is damaged"),
        (
            '{"version": 1, "live": 0, "runs": [{"name": "../../etc", "rows": 0, "deleted": 0, "files": {}}]}',
            "not a plain name",
        ),
    ],
)
def test_a_damaged_manifest_is_an_error_that_names_it(text: str, message: str, tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"manifest.json: .*{message}"):
        store.snapshot()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no embedding store \(no store.json\)"):
        EmbeddingStore.open(tmp_path)
    create(tmp_path / "s")
    with pytest.raises(ValueError, match="already exists: open it, or choose another folder"):
        create(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        EmbeddingStore.open(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(ValueError, match="dtype='fp8', .* dtype one of fp32, fp16, bf16"):
        create(tmp_path / "s", dtype="fp8")
    with pytest.raises(ValueError, match="width=1048576, .* width must be 1 to 1048575"):  # `open` would refuse it
        EmbeddingStore.create(tmp_path / "s", width=1 << 20)


@pytest.mark.parametrize(
    ("keys", "rows", "message"),
    [
        (["a"], vectors(1, 2), r"vectors: shape \(2, 4\): must be \[1, 4\]"),
        (["a", "b"], vectors(1, float("nan")), "row 1 .key 'b'. is not finite in fp16"),
        (["a"], vectors(1e6), "is not finite in fp16: look at the model, or use a store of fp32"),
        (["a", None], vectors(1, 2), "1 of 2 are null: every vector needs a key"),
        (["a", "b"], vectors(1, -float("inf")), "row 1 .key 'b'. is not finite"),
        ([1, 2], vectors(1, 2), "keys are int64: this store's keys are of type string"),
    ],
)
def test_rows_that_do_not_fit_are_refused(keys: list, rows: Tensor, message: str, tmp_path: Path) -> None:
    store = create(tmp_path / "s", dtype="fp16")
    with store.writer() as writer, pytest.raises(ValueError, match=message):
        writer.upsert(keys, rows)
    assert contents(store) == {}


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_infinite_and_undefined_numbers_are_found_by_their_bits(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype)
    fine = torch.tensor([0.0, -0.0, most.max, most.min, most.tiny, -most.tiny / 4, 1.0], dtype=dtype).repeat(40_000)
    assert all_finite(fine) and all_finite(fine[:0])
    for wrong in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        fine[-1] = wrong
        assert not all_finite(fine)


def test_vectors_of_another_model_are_refused_with_the_remedy(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    store.require(dict(FACTS))
    with pytest.raises(
        ValueError, match=r"made by another model \(weights differ\).* embed everything into a new store"
    ):
        store.require(FACTS | {"weights": "ef56"})


@pytest.mark.parametrize(
    "wrong", ["007", "+7", "7.0", "", "-0", "9223372036854775808", "-9223372036854775809", "x7", "1e3"]
)
def test_raw_ids_that_are_no_numbers_are_refused_as_int64_keys(wrong: str) -> None:
    limits = pa.chunked_array([["-9223372036854775808", "9223372036854775807", "0", "-7"]])
    assert raw_keys(limits, "int64").to_pylist() == [-(2**63), 2**63 - 1, 0, -7]
    assert raw_keys(limits, "string").to_pylist() == limits.to_pylist()
    with pytest.raises(ValueError, match=re.escape(f"keys int64: raw id {wrong!r} is not an int64 in its usual")):
        raw_keys(pa.chunked_array([["1", wrong]]), "int64")
