"""Fuzz: the token store of a dataset: its facts and its two arrays."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.data.token_store import TokenStore
from tests.fuzz.mutations import FEW, Target, as_json, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures

FILES = ("store.json", "values.arrow", "offsets.arrow")
TYPES = (pa.int64(), pa.int32(), pa.float64(), pa.string(), pa.bool_(), pa.uint8())


@cache
def good() -> tuple[Path, dict[str, bytes]]:
    """A copy of the shop's token store, and its files' bytes."""
    root = fixtures.folder() / "fuzz-tokens"
    shutil.copytree(fixtures.token_store().path, root)
    return root, {name: (root / name).read_bytes() for name in FILES}


def check(mutation: Any) -> None:
    root, whole = good()
    for name, data in whole.items():
        (root / name).unlink()  # an array may still be mapped
        (root / name).write_bytes(data)
    match mutation:
        case ("facts", changes):
            (root / "store.json").write_bytes(as_json(edit(json.loads(whole["store.json"]), changes)))
        case ("bytes", name, changes):
            (root / name).write_bytes(change_bytes(whole[name], changes))
        case ("array", name, kind, place, value):
            _rewrite(root / name, kind, place, value)
    check_reader(lambda: use(root), [str(root)])


def _rewrite(path: Path, kind: pa.DataType, place: int, value: int | None) -> None:
    """An Arrow file with an element replaced, in another type."""
    with pa.ipc.open_file(path.read_bytes()) as reader:
        values = reader.get_batch(0).column(0).to_pylist()
    values[place % len(values)] = value
    try:
        array = pa.array(values, pa.int64()).cast(kind, safe=False)
    except pa.ArrowException:
        array = pa.nulls(len(values), kind)
    with pa.ipc.new_file(str(path), pa.schema([("values", kind)])) as writer:
        writer.write_batch(pa.record_batch({"values": array}))


def use(root: Path) -> None:
    """Open the store and read every item's tokens."""
    store = TokenStore.open(root)
    ids = np.arange(len(store))
    token_ids, cu_seqlens = store.gather(ids)
    assert len(token_ids) == cu_seqlens[-1] == store.facts["tokens"]
    assert token_ids.size == 0 or 0 <= token_ids.min() <= token_ids.max() < store.facts["vocab_size"]
    store.gather_behind_prefix(ids)


TARGET = Target(
    "tokens",
    st.one_of(
        st.tuples(st.just("facts"), edits()),
        st.tuples(st.just("bytes"), st.sampled_from(FILES), byte_changes()),
        st.tuples(
            st.just("array"),
            st.sampled_from(FILES[1:]),
            st.sampled_from(TYPES),
            st.integers(0, 300),
            st.none() | st.sampled_from([0, -1, 2**31 - 1, 2**62]) | st.integers(-(2**62), 2**62),
        ),
    ),
    check,
)


@FEW
@example(("facts", [([], "set", [])]))
@example(("array", "values.arrow", pa.int32(), 3, 10**6))
@example(("array", "values.arrow", pa.int32(), 3, -1))
@example(("array", "values.arrow", pa.string(), 3, 1))
@example(("array", "offsets.arrow", pa.int64(), 3, 2**62))
@example(("array", "offsets.arrow", pa.int64(), 3, None))
@example(("bytes", "values.arrow", [("cut", 0.5, 1)]))
@given(TARGET.inputs)
def test_a_token_store_is_read_or_refused_by_name(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_read() -> None:
    check(())
    assert check_reader(lambda: use(good()[0]), [])
