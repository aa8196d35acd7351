"""Fuzz: `manifest.json` of a dataset, and opening the dataset by it."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.data.dataset import Dataset
from tests.fuzz.mutations import FEW, Target, as_json, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures


@cache
def good() -> tuple[Path, dict[str, Any]]:
    """A copy of the shop's dataset, and its manifest."""
    root = fixtures.folder() / "fuzz-manifest"
    shutil.copytree(fixtures.dataset().root, root)
    return root, fixtures.dataset().manifest


def use(root: Path) -> None:
    """Open a dataset and read what its manifest decides."""
    data = Dataset.open(root)
    assert data.num_items < 2**31 and data.num_users < 2**31
    _ = data.name, data.fingerprint, data.visibility, data.num_actions
    data.action_values  # noqa: B018
    len(data.items), len(data.users), data.row_groups("train")
    data.text(data.manifest["text_columns"])
    for kind in ("item", "user"):
        for name in data.manifest[f"{kind}_features"]:
            data.feature_ids(kind, name)
    data.training_item_counts()


def check(mutation: tuple[list[Any], list[Any]]) -> None:
    changes, bytes_changed = mutation
    root, manifest = good()
    (root / "manifest.json").write_bytes(change_bytes(as_json(edit(manifest, changes)), bytes_changed))
    check_reader(lambda: use(root), [str(root)])


TARGET = Target("manifest", st.tuples(edits(), byte_changes() | st.just([])), check)
FILE = list(fixtures.dataset().manifest).index("files")


@FEW
@example(([([], "set", [])], []))
@example(([([], "set", 10**400)], []))
@example(([([0], "set", True)], []))
@example(([([0], "set", ["x"] * 5000)], []))
@example(([([FILE, 0], "rename", "../x")], []))
@example(([([FILE, 0], "rename", "/etc/passwd")], []))
@example(([([FILE, 0], "rename", "\x00")], []))
@example(([([FILE, 0, 0], "set", None)], []))
@given(TARGET.inputs)
def test_a_manifest_is_read_or_refused_by_name(mutation: tuple[list[Any], list[Any]]) -> None:
    check(mutation)


def test_what_is_not_mutated_is_read() -> None:
    root, _ = good()
    (root / "manifest.json").write_bytes(as_json(good()[1]))
    assert check_reader(lambda: use(root), [])
