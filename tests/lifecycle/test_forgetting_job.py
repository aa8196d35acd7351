"""`hllm forget` over a dataset, and runs, stores and predictions of nights: nothing is left, and all else works."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hllm_torchrec.checkpoint.erased_rows import checkpoints_of
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.common.locks import Locked
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import Names
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import evaluate, forget, nightly
from hllm_torchrec.lifecycle.forgetting_job import forget_everywhere
from hllm_torchrec.lifecycle.night_state import hold_nights
from hllm_torchrec.lifecycle.releases import read_alias
from hllm_torchrec.lifecycle.remaining_bytes import files_with
from hllm_torchrec.store.store import EmbeddingStore
from tests.helpers import fixtures
from tests.lifecycle.conftest import World


@pytest.mark.slow
def test_erased_ids_leave_no_byte_and_runs_go_on(
    after_two: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = after_two.copy(tmp_path / "world")
    dataset = Dataset.open(world.dataset)
    user, item = busiest(dataset)
    users, items = user_number(dataset, user), item_number(dataset, item)
    before, vectors = tables(world), [*table_rows(world, items), *stored(world, user, item)]
    folders = [world.dataset, world.nights]
    assert len(vectors) >= 4 and all(has_bytes(folders, row) for row in vectors)
    (world.dataset / "new_items.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in ({"journal": "a"}, {"id": item, "text": {}}, {"id": "other"}))
    )
    words = ["--dataset", str(world.dataset), "--user", user, "--item", item, "--runs", str(world.nights)]

    had = list(files_with(folders, [user, item]))
    assert forget.main([*words, "--erase", "--dry-run"]) == 0
    planned = found_in(capsys.readouterr().out)
    assert list(files_with(folders, [user, item])) == had != [] and Dataset.open(world.dataset).version == 3
    assert forget.main([*words, "--erase"]) == 0
    said = capsys.readouterr().out
    assert {place: found for place, found in found_in(said).items() if found} == {
        place: found for place, found in planned.items() if found
    }
    assert "none is left" in said and "3 versions" in said

    assert not list(files_with(folders, [user, item]))
    assert not [row for row in vectors if has_bytes(folders, row)]
    for path, (old, rows) in before.items():
        new = read_tensors(path)
        assert new.keys() == old.keys()
        for key, value in old.items():
            changed = np.flatnonzero((new[key] != value).reshape(len(value), -1).any(1)) if value.ndim else []
            assert set(changed) <= ({items % rows} if "item_id" in key else set())
            assert "item_id" not in key or not value.ndim or not new[key][items].any()
    for path in (world.nights / "nights").rglob("*.parquet"):
        rows = pq.read_table(path)
        assert len(rows) and users not in rows["user_id"].to_pylist() and items not in rows["item_id"].to_pylist()
    assert '"other"' in (world.dataset / "new_items.jsonl").read_text()

    release = read_alias(world.nights, "current")
    assert release is not None
    try:
        assert evaluate.main(["--run", release.run, "--draws", "0"]) == 0
        assert forget.main([*words, "--erase"]) == 0  # again: nothing is left to do
        assert Dataset.open(world.dataset).version == 4
        assert nightly.main(world.words("day-05")) == 0  # whose files name the user and the item
    finally:
        destroy_distributed()
    after = Dataset.open(world.dataset)
    dropped = after.manifest["added"]["dropped"]
    assert dropped["forgotten_item"] > 0 and after.version == 5
    assert not list(files_with([world.dataset, world.nights], [user, item]))


@pytest.mark.parametrize("given", ["nights", "nights/runs", "."])
def test_nothing_is_forgotten_beside_a_night_that_would_write_it_again(given: str, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(fixtures.dataset().root, tmp_path / "data"))
    (tmp_path / "nights" / "runs").mkdir(parents=True)
    words, version = (dataset, Names(["u3"]), [tmp_path / given]), Dataset.open(dataset).version
    with hold_nights(tmp_path / "nights"):
        with pytest.raises(
            Locked, match=r"nights: another process runs a night here \(process \d+ on .*\): wait for it"
        ):
            forget_everywhere(*words)
        forget_everywhere(*words, dry_run=True)
        assert Dataset.open(dataset).version == version
    assert forget_everywhere(*words).dataset.version == version + 1


def busiest(dataset: Dataset) -> tuple[str, str]:
    """Raw ids of the user and the item with most events."""
    users, lengths, _ = dataset.merged.layout()
    user: str = dataset.users["raw_user_id"][int(users[lengths.argmax()]) - 1].as_py()
    item: str = dataset.items["raw_item_id"][int(dataset.merged.item_counts("train")[1:].argmax())].as_py()
    return user, item


def user_number(dataset: Dataset, raw: str) -> int:
    return int(dataset.users["raw_user_id"].to_pylist().index(raw)) + 1


def item_number(dataset: Dataset, raw: str) -> int:
    return int(dataset.items["raw_item_id"].to_pylist().index(raw)) + 1


def read_tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    import torch.distributed.checkpoint as dcp

    state = {
        key: torch.zeros(one.size, dtype=one.properties.dtype)
        for key, one in SafeReader(checkpoint).read_tensors().items()
    }
    dcp.load(state, storage_reader=SafeReader(checkpoint), no_dist=True)  # type: ignore[no-untyped-call]
    return {key: value.numpy() for key, value in state.items()}


def tables(world: World) -> dict[Path, tuple[dict[str, np.ndarray], int]]:
    """Checkpoint -> its tensors, and the number of rows of its item table."""
    found = {}
    for run in sorted((world.nights / "runs").iterdir()):
        for checkpoint in checkpoints_of(run):
            tensors = read_tensors(checkpoint)
            found[checkpoint] = tensors, next(len(v) for k, v in tensors.items() if k.endswith("item_id.weight"))
    return found


def table_rows(world: World, item: int) -> list[bytes]:
    """Bytes of the item's rows in all checkpoints."""
    return [
        value[item].tobytes()
        for tensors, _ in tables(world).values()
        for key, value in tensors.items()
        if "item_id" in key and value.ndim == 2 and value[item].any()
    ]


def stored(world: World, user: str, item: str) -> list[bytes]:
    """Bytes of the vectors of the ids in all stores, without those that another id has, too (of an equal text)."""
    found = []
    for folder in sorted((world.nights / "stores").iterdir()):
        store = EmbeddingStore.open(folder)
        vectors, known = store.snapshot().gather([user if store.facts["part"] == "users" else item], torch.float16)
        assert known.all()
        rows = [row.numpy().tobytes() for _, some, _ in store.snapshot().rows() for row in some]
        found += [row for row in [vectors.numpy().tobytes()] if rows.count(row) == 1]
    return found


def has_bytes(folders: list[Path], data: bytes) -> bool:
    return any(data in path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


def found_in(text: str) -> dict[str, str]:
    """Place -> what was found in it, of the report's lines."""
    return {line.split(": ")[0]: line.split(": ")[2] for line in text.splitlines() if line.count(": ") >= 2}
