"""Fuzz: the files of a checkpoint, the marker's hashes kept as they were or made to agree with the damage."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.load import load_checkpoint, load_rank_extra, save_checkpoint, verify_checkpoint
from tests.fuzz.mutations import FEW, Target, as_json, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures

FILES = ("COMPLETE", ".metadata", "extra.json", "extra-rank0.json", "__0_0.distcp")
JSON = ("COMPLETE", "extra.json", "extra-rank0.json")


@cache
def good() -> tuple[Path, dict[str, bytes]]:
    """A checkpoint, and its files' bytes."""
    state = {"model": {"w": torch.randn(6, 4), "b": torch.randn(4).bfloat16()}, "dense": {"step": torch.tensor(3.0)}}
    root = fixtures.folder() / "fuzz-checkpoint"
    path = save_checkpoint(root, 3, state, {"step": 3, "loader": {"epoch": 0}}, rank_extra={"rng": [1, 2]})
    return path, {name: (path / name).read_bytes() for name in FILES}


def check(mutation: Any) -> None:
    path, whole = good()
    shutil.rmtree(path)
    path.mkdir()
    for name, data in whole.items():
        (path / name).write_bytes(data)
    what, *rest = mutation
    if what != "nothing":
        name, changes, agree = rest
        data = as_json(edit(json.loads(whole[name]), changes)) if what == "json" else change_bytes(whole[name], changes)
        (path / name).write_bytes(data)
        if agree:
            _agree(path, name)
    for read in (use, use_verified):
        check_reader(lambda read=read: read(path), [str(path)])


def _agree(path: Path, name: str) -> None:
    """Make the marker's sizes and hashes those of the damaged files, as whoever damages on purpose would."""
    try:
        marker = json.loads((path / "COMPLETE").read_text())
        if name != "COMPLETE":
            marker["files"] |= files.describe_files(path, [name])
        (path / "COMPLETE").write_bytes(as_json(files.with_checksum(marker)))
    except (ValueError, AttributeError, TypeError, OSError):
        return  # the marker itself is what was damaged


def use(path: Path) -> None:
    """Load the weights and all that is kept besides."""
    state = {"model": {"w": torch.zeros(6, 4), "b": torch.zeros(4).bfloat16()}, "dense": {"step": torch.tensor(0.0)}}
    load_checkpoint(path, state)
    load_rank_extra(path)


def use_verified(path: Path) -> None:
    """As a checkpoint that somebody names."""
    verify_checkpoint(path)
    assert not files.find_damage(path)


TARGET = Target(
    "checkpoint",
    st.one_of(
        st.tuples(st.just("json"), st.sampled_from(JSON), edits(), st.booleans()),
        st.tuples(st.just("bytes"), st.sampled_from(FILES), byte_changes(), st.booleans()),
    ),
    check,
)


@FEW
@example(("json", "extra.json", [([], "set", [])], True))
@example(("json", "COMPLETE", [([], "set", [])], True))
@example(("json", "COMPLETE", [([5, 0], "rename", "../x")], True))
@example(("bytes", "extra.json", [("cut", 0.5, 1)], True))
@example(("bytes", "extra-rank0.json", [("set", 0.5, 255)], True))
@example(("bytes", "__0_0.distcp", [("flip", 0.5, 255)], True))
@example(("bytes", "__0_0.distcp", [("cut", 0.5, 255)], True))
@example(("bytes", ".metadata", [("cut", 0.5, 1)], True))
@given(TARGET.inputs)
def test_a_checkpoint_is_loaded_or_refused_by_name(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_loaded() -> None:
    check(("nothing",))
    assert check_reader(lambda: use(good()[0]), [])
