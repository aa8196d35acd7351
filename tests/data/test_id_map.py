"""IdMap beside a dict, with many collisions of slots and equal hashes."""

import random

import numpy as np
import pyarrow as pa
import pytest

from hllm_torchrec.data import id_map
from hllm_torchrec.data.id_map import IdMap


@pytest.mark.parametrize("bits", [64, 3, 0])
def test_numbers_are_those_of_a_dict_whatever_the_hashes(bits, monkeypatch):
    whole = id_map.hash_strings
    monkeypatch.setattr(id_map, "hash_strings", lambda ids: whole(ids) & np.uint64(2**bits - 1))
    rng, known, ids = random.Random(0), {}, IdMap()
    for _ in range(30 if bits == 64 else 6):
        chunk = [f"{'ü' * rng.randrange(3)}{rng.randrange(3000 if bits == 64 else 60)}" for _ in range(200)]
        unknown = ids.find(pa.array(chunk))
        assert unknown.tolist() == [known.get(raw, -1) for raw in chunk]
        numbers = ids.add(pa.chunked_array([chunk[:50], chunk[50:]]))
        assert numbers.tolist() == [known.setdefault(raw, len(known)) for raw in chunk]
        assert len(ids) == len(known)
    assert ids.ids().to_pylist() == list(known)
    assert ids.ids(5, 9).to_pylist() == list(known)[5:9]


def test_an_empty_map_and_no_ids():
    ids = IdMap()
    assert ids.find(pa.array(["a", "b"])).tolist() == [-1, -1]
    assert ids.add(pa.array([], pa.string())).size == 0 and ids.ids().to_pylist() == []


def test_a_slice_of_an_array_is_numbered_by_its_own_ids():
    ids = IdMap()
    assert ids.add(pa.array(["aa", "b", "aa", "ccc"]).slice(1)).tolist() == [0, 1, 2]
    assert ids.ids().to_pylist() == ["b", "aa", "ccc"]
