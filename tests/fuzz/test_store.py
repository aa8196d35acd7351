"""Fuzz: the files of an embedding store, their sizes kept or not, of text and of number keys."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.store import EmbeddingStore
from tests.fuzz.mutations import FEW, Target, as_json, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures

RUN_FILES = ("keys.arrow", "marks.npy", "hashes.npy", "rows.npy", "vectors-0000.bin")
KINDS = ("string", "int64")


@cache
def good(kind: str) -> tuple[Path, list[str], dict[str, bytes], list[Any]]:
    """A store of two runs with a deletion, the names of its runs' folders, its files' bytes, its keys."""
    root = fixtures.folder() / f"fuzz-store-{kind}"
    store = EmbeddingStore.create(root, 4, "fp16", keys=kind, facts={"weights": "ab"})  # type: ignore[arg-type]
    keys: list[Any] = [f"item {i}" if kind == "string" else 7 * i for i in range(40)]
    with store.writer() as writer:
        writer.upsert(keys[:30], torch.randn(30, 4))
        writer.commit()
        writer.upsert(keys[20:], torch.randn(20, 4))
        writer.delete(keys[:3])
        writer.commit()
    files = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    return root, [run["name"] for run in json.loads(files["manifest.json"])["runs"]], files, keys


def check(mutation: Any) -> None:
    kind, what, *rest = mutation
    root, runs, files, keys = good(kind)
    shutil.rmtree(root)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    if what == "json":
        name, changes = rest
        (root / name).write_bytes(as_json(edit(json.loads(files[name]), changes)))
    elif what == "bytes":
        name, run, changes, agree = rest
        path = f"runs/{runs[run]}/{name}" if name in RUN_FILES else name
        damaged = change_bytes(files[path], changes)
        (root / path).write_bytes(damaged)
        if agree and name in RUN_FILES:  # as if whoever damaged it had written the manifest, too
            manifest = json.loads(files["manifest.json"])
            manifest["runs"][run]["files"][name][0] = len(damaged)
            (root / "manifest.json").write_bytes(as_json(manifest))
    check_reader(lambda: use(root, keys), [str(root)])


def use(root: Path, keys: list[Any]) -> None:
    """Open the store, look every key up, go over all rows."""
    store = EmbeddingStore.open(root)
    snapshot = store.snapshot()
    absent = "nobody" if store.kind == "string" else 10**9
    wanted = [*keys, absent] if isinstance(keys[0], type(absent)) else [absent]
    vectors, known = snapshot.gather(wanted)
    assert vectors.shape == (len(wanted), store.width) and known.shape == (len(wanted),)
    snapshot.content_hashes(wanted)
    for found, rows, marks in snapshot.rows(batch=7):
        assert isinstance(found, pa.Array) and len(found) == len(rows) == len(marks)
        found.to_pylist()
    store.verify()


TARGET = Target(
    "store",
    st.one_of(
        st.tuples(
            st.sampled_from(KINDS), st.just("json"), st.sampled_from(("store.json", "manifest.json")), edits()
        ),
        st.tuples(
            st.sampled_from(KINDS), st.just("bytes"), st.sampled_from((*RUN_FILES, "store.json", "manifest.json")),
            st.integers(0, 1), byte_changes(), st.booleans(),
        ),
    ),
    check,
)  # fmt: skip


@FEW
@example(("string", "json", "store.json", [([], "set", [])]))
@example(("string", "json", "store.json", [([1], "set", 0)]))
@example(("string", "json", "store.json", [([1], "set", True)]))
@example(("string", "json", "store.json", [([3], "set", "x")]))
@example(("string", "json", "manifest.json", [([0], "set", float("inf"))]))
@example(("string", "json", "manifest.json", [([2, 0, 1], "set", 10**6)]))
@example(("string", "json", "manifest.json", [([2, 0, 0], "set", "..")]))
@example(("string", "bytes", "keys.arrow", 0, [("flip", 0.6, 255)], True))
@example(("string", "bytes", "rows.npy", 0, [("flip", 0.9, 255)], True))
@example(("int64", "bytes", "rows.npy", 1, [("cut", 0.9, 255)], True))
@example(("int64", "bytes", "vectors-0000.bin", 1, [("cut", 0.9, 255)], True))
@example(("int64", "bytes", "hashes.npy", 1, [("flip", 0.1, 3)], False))
@example(("string", "bytes", "marks.npy", 0, [("zero", 0.125, 15)], True))
@example(("string", "json", "manifest.json", [([2, 0, 2], "set", 2**40)]))
@given(TARGET.inputs)
def test_a_store_is_read_or_refused_by_name(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_read() -> None:
    for kind in KINDS:
        check((kind, "nothing"))
        assert check_reader(lambda kind=kind: use(good(kind)[0], good(kind)[3]), [])
