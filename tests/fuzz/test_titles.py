"""Fuzz: clusters of users and titles of items, their hashes kept or written anew."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.creative.clusters import SCHEMA as USERS
from hllm_torchrec.creative.clusters import Centers, write_clusters
from hllm_torchrec.creative.mapped_table import hash_order
from hllm_torchrec.creative.titles import SCHEMA, Creatives, commit, prepare_folder
from tests.fuzz.mutations import FEW, Target, as_json, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures

MANIFESTS = ("clusters/clusters.json", "titles/titles/titles.json")
FILES = ("clusters/centers.npz", "clusters/users.arrow", "clusters/hashes.npy")
FILES += ("titles/titles/titles.arrow", "titles/titles/items.arrow", "titles/titles/hashes.npy")


@cache
def good() -> tuple[Path, dict[str, bytes]]:
    """Three clusters of twenty users, titles of ten items, and the bytes of their files."""
    root, random = fixtures.folder() / "fuzz-titles", np.random.default_rng(0)
    hashes, order = hash_order([f"u{n}" for n in range(20)])
    users = pa.table([[f"u{n}" for n in order], order % 3, random.random(20)], schema=USERS)
    arrays = (random.random(shape).astype(np.float32) for shape in (4, 4, (3, 4), (3, 4)))
    facts = {
        "source": {"part": "users", "weights": "w"},
        "settings": {"clusters": 3, "metric": "cosine", "center": "mean", "least": 2, "seed": 0},
        "users": {"path": "nowhere", "version": 1, "number": 20},
        "mean_distance": 0.5,
        "fitted": {"users": 20, "mean_distance": 0.5},
        "medoids": ["u1"],
    }
    clusters = write_clusters(root / "clusters", facts, Centers("cosine", *arrays), users, hashes)
    prepare_folder(root / "titles")
    rows = [
        {"raw_item_id": f"i{n}", "cluster": k, "match": 0.5, "key": f"{n} {k}", "text": f"title {n}", "log_prob": -1.0}
        | {"tokens": 3, "fallback": False, "reasons": ""}
        for n in range(10)
        for k in (-1, 0, 2)
    ]
    made = {"clusters": "../clusters", "centers": clusters.fingerprint, "origin": {"weights": "w"}}
    commit(root / "titles", pa.Table.from_pylist(rows, SCHEMA), made)
    return root, {name: (root / name).read_bytes() for name in (*MANIFESTS, *FILES)}


def check(mutation: Any) -> None:
    what, *rest = mutation
    root, files = good()
    for name, data in files.items():
        (root / name).unlink(missing_ok=True)  # not written over: an earlier reader may have it mapped
        (root / name).write_bytes(data)
    if what == "json":
        name, changes = rest
        (root / name).write_bytes(as_json(edit(json.loads(files[name]), changes)))
    elif what == "bytes":
        name, changes, agree = rest
        damaged = change_bytes(files[name], changes)
        (root / name).unlink()
        (root / name).write_bytes(damaged)
        if agree and name in FILES:  # as if whoever damaged it had written the manifest, too
            manifest = next(one for one in MANIFESTS if Path(one).parent == Path(name).parent)
            facts = json.loads(files[manifest])
            facts["files"][Path(name).name] = hashlib.sha256(damaged).hexdigest()
            (root / manifest).write_bytes(as_json(facts))
    check_reader(lambda: use(root), [str(root)])


def use(root: Path) -> None:
    """Open the titles and their clusters, and look everything up."""
    creatives = Creatives.open(root / "titles")
    assert creatives.clusters.sizes.sum() == len(creatives.clusters.users["cluster"])
    creatives.clusters.centers.assign(np.zeros((2, creatives.clusters.centers.mean.size), np.float32))
    assert isinstance(creatives.clusters.is_behind, bool)
    for item in (*(f"i{n}" for n in range(10)), "nothing"):
        creatives.of_item(item)
        for user in ("u0", "u7", "nobody", None):
            creatives.find(user, item)


TARGET = Target(
    "titles",
    st.one_of(
        st.tuples(st.just("json"), st.sampled_from(MANIFESTS), edits()),
        st.tuples(st.just("bytes"), st.sampled_from((*FILES, *MANIFESTS)), byte_changes(), st.booleans()),
    ),
    check,
)


@FEW
@example(("json", "clusters/clusters.json", [([], "set", [])]))
@example(("json", "clusters/clusters.json", [([1], "set", "x")]))
@example(("json", "titles/titles/titles.json", [([0], "set", "\0")]))
@example(("json", "titles/titles/titles.json", [([0], "set", "/etc/passwd")]))
@example(("json", "titles/titles/titles.json", [([1], "delete", None)]))
@example(("json", "titles/titles/titles.json", [([3], "set", {})]))
@example(("bytes", "clusters/users.arrow", [("flip", 0.6, 255)], True))
@example(("bytes", "clusters/hashes.npy", [("cut", 0.9, 255)], True))
@example(("bytes", "clusters/centers.npz", [("flip", 0.5, 255)], True))
@example(("bytes", "titles/titles/items.arrow", [("flip", 0.6, 255)], True))
@example(("bytes", "titles/titles/titles.arrow", [("zero", 0.5, 64)], True))
@given(TARGET.inputs)
def test_titles_are_read_or_refused_by_name(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_read() -> None:
    check(("nothing",))
    assert check_reader(lambda: use(good()[0]), [])
    shutil.rmtree(good()[0])
    good.cache_clear()
