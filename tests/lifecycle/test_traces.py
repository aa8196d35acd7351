"""Traces of forgotten ids in stores of all kinds, predictions, journals and fitted statistics of runs."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_log import EventLog, LoggedEvent
from hllm_torchrec.data.evidence import EvidenceModel
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.data.item_factors import ItemFactors
from hllm_torchrec.data.new_item_journal import NewItem, NewItemJournal
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.data.transitions import Transitions
from hllm_torchrec.inference.exposure_store import exposure_content_hashes, exposure_keys
from hllm_torchrec.launch import forget as command
from hllm_torchrec.lifecycle import remaining_bytes
from hllm_torchrec.lifecycle.erased_runs import forget_in_run
from hllm_torchrec.lifecycle.forgetting_job import forget_everywhere
from hllm_torchrec.lifecycle.remaining_bytes import files_with
from hllm_torchrec.lifecycle.traces import Place, Target, forget_in_journal, forget_in_store, places
from hllm_torchrec.store.keys import KeyKind
from hllm_torchrec.store.store import EmbeddingStore
from tests.data.test_forgetting import ITEM, USER, make
from tests.helpers.source_files import memory_source, random_events


def target(root: Path, users: tuple[str, ...] = (), items: tuple[str, ...] = (), erase: bool = True) -> Target:
    names = Names(users, items)
    report = forget(root, names, erase=erase)
    return Target(names, Dataset.open(root), report.ids("users"), report.ids("items"), erase, False)


def store(path: Path, keys: list, part: str | None, kind: KeyKind = "string") -> list[bytes]:
    """A store with a vector of each key; returns the bytes of the vectors."""
    facts = {} if part is None else {"part": part}
    made, vectors = EmbeddingStore.create(path, 8, "fp32", kind, facts), torch.randn(len(keys), 8)
    with made.writer() as writer:
        writer.upsert(keys, vectors)
        writer.commit()
    return [row.numpy().tobytes() for row in vectors]


def keys_in(path: Path) -> set:
    return {key for keys, _, _ in EmbeddingStore.open(path).snapshot().rows() for key in keys.to_pylist()}


@pytest.mark.parametrize("erase", [False, True])
def test_stores_lose_the_ids_of_their_kind(tmp_path: Path, erase: bool) -> None:
    root = make(tmp_path / "a")
    users = store(tmp_path / "users", ["u1", USER, ITEM], "users")
    items = store(tmp_path / "items", ["i1", ITEM, USER], "items")
    store(tmp_path / "own", [USER, ITEM], None)
    what = target(root, (USER,), (ITEM,), erase)
    assert [forget_in_store(tmp_path / name, what).found for name in ("users", "items", "users")] == [1, 1, 0]
    assert keys_in(tmp_path / "users") == {"u1", ITEM} and keys_in(tmp_path / "items") == {"i1", USER}
    for folder, row in (("users", users[1]), ("items", items[1])):
        stays = any(row in path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file())
        assert stays != erase
    assert "hllm store delete" in forget_in_store(tmp_path / "own", what).left


def test_int64_keys_are_those_of_plain_numbers(tmp_path: Path) -> None:
    root = make(tmp_path / "a")
    store(tmp_path / "users", [7, 8, -3], "users", "int64")
    what = target(root, ("007", "8", "-3", "x", "--7", "9" * 19))
    assert forget_in_store(tmp_path / "users", what).found == 2 and keys_in(tmp_path / "users") == {7}


@pytest.mark.parametrize("names", [((USER,), ()), ((), (ITEM,))])
def test_exposures_of_a_user_and_those_that_moved_leave_their_store(tmp_path: Path, names: tuple) -> None:
    root = make(tmp_path / "a")

    def exposures(dataset: Dataset) -> dict[int, int]:
        users, lengths, _ = dataset.merged.layout()
        events, _ = dataset.merged.events_of(users)
        positions = np.concatenate([np.arange(length) for length in lengths])
        keys = exposure_keys(np.repeat(users, lengths), positions)
        return dict(
            zip(keys.tolist(), exposure_content_hashes(events.item_ids, events.timestamps).tolist(), strict=True)
        )

    before = exposures(Dataset.open(root))
    made = EmbeddingStore.create(tmp_path / "made", 2, keys="int64", facts={"part": "exposures"})
    with made.writer() as writer:
        writer.upsert(list(before), torch.zeros(len(before), 2), np.array(list(before.values()), np.uint64))
        writer.commit()
    what = target(root, *names)
    found = forget_in_store(tmp_path / "made", what).found
    after = exposures(Dataset.open(root))
    due = {key for key, mark in after.items() if before[key] == mark}
    assert keys_in(tmp_path / "made") == due and found == len(before) - len(due) > 2


def test_predictions_of_this_library_by_number_and_of_others_by_raw_id(tmp_path: Path) -> None:
    root, folder = make(tmp_path / "a"), tmp_path / "p"
    dataset = Dataset.open(root)
    user = dataset.users["raw_user_id"].to_pylist().index(USER) + 1
    folder.mkdir()
    own = {"user_id": [1, user, user + 1], "item_id": [1, 1, 1], "position": [0, 1, 2], "score": [0.1, 0.2, 0.3]}
    pq.write_table(pa.table(own), folder / "own.parquet")
    pq.write_table(pa.table({"user_id": [USER, "u1"], "score": [0.1, 0.2]}), folder / "texts.parquet")
    pq.write_table(pa.table({"user_id": [user, 7], "score": [0.1, 0.2]}), folder / "numbers.parquet")
    words = ["--dataset", str(root), "--user", USER, "--user", "7", "--erase"]
    assert command.main([*words, "--runs", str(folder)]) == 1  # of which dataset is not known
    assert pq.read_table(folder / "own.parquet")["user_id"].to_pylist() == own["user_id"]
    assert pq.read_table(folder / "texts.parquet")["user_id"].to_pylist() == ["u1"]
    assert pq.read_table(folder / "numbers.parquet")["user_id"].to_pylist() == [user]
    assert command.main([*words, "--predictions", str(folder)]) == 0
    assert pq.read_table(folder / "own.parquet")["user_id"].to_pylist() == [1, user + 1]
    assert sorted(path.name for path in folder.iterdir()) == ["numbers.parquet", "own.parquet", "texts.parquet"]


def test_a_journal_keeps_its_offsets(tmp_path: Path) -> None:
    root = make(tmp_path / "a")
    journal = NewItemJournal(root / "new_items.jsonl")
    journal.append([NewItem("ä", {}), NewItem(ITEM, {"title": "ü"})])
    end = journal.read().end
    journal.append([NewItem("later", {})])
    assert forget_in_journal(journal.path, target(root, (), (ITEM,))).found == 1
    assert [item.id for item in journal.read().items] == ["ä", "later"]
    assert [item.id for item in journal.read(end).items] == ["later"]
    assert list(files_with([root], [ITEM])) == []


def test_what_cannot_be_cleaned_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mail.txt").write_text(f"delete {USER}, please")
    (tmp_path / "notes" / "other.txt").write_text(f"delete {USER}s and not-{USER}")
    words = ["--dataset", str(root), "--user", USER, "--runs", str(tmp_path / "notes")]
    assert command.main([*words, "--erase"]) == 1
    said = capsys.readouterr().out
    assert "mail.txt: one of the ids is STILL THERE" in said and "other.txt" not in said
    assert command.main(["--dataset", str(root), "--user", "nobody"]) == 0
    assert "1 ids it never had, which later appends leave out" in capsys.readouterr().out


def test_statistics_and_records_of_a_run(tmp_path: Path) -> None:
    root, run = make(tmp_path / "a"), tmp_path / "run"
    dataset = Dataset.open(root)
    item, size = dataset.items["raw_item_id"].to_pylist().index(ITEM) + 1, dataset.num_items
    rng = np.random.default_rng(0)
    model = ItemFactors(rng.normal(size=(size, 3)), rng.normal(size=size), 0.5, 1.0)
    factors = RunFactors(model, np.zeros(4), np.ones(4), np.zeros(3), 1.0, 1.0)
    factors.save(run)
    evidence = EvidenceModel(
        rng.normal(size=(6, size, 3)), rng.normal(size=(6, size)), np.zeros(6), np.ones(6), 9, *[np.zeros(1)] * 3, 0.1,
        np.zeros(0),
    )  # fmt: skip
    evidence.save(run)
    (run / "bad_batches").mkdir()
    for name, users in (("one", [1]), ("other", [2])):
        batch = {"user_ids": users, "unique_items": [item] if name == "one" else [], "target_items": []}
        (run / "bad_batches" / f"{name}.json").write_text(json.dumps({"batches": [batch]}))
    what = target(root, (), (ITEM,))
    assert "another dataset" in forget_in_run(Place("run", run, False), what).kind
    transitions = Transitions.of_factors(*rng.normal(size=(2, size, 3)).astype(np.float32))
    transitions.save(run)
    assert forget_in_run(Place("run", run, True), what).found == 4
    left = Transitions.load(run)
    assert left is not None and np.array_equal(left.source[item], transitions.source[0])
    assert np.array_equal(left.target[item], transitions.target[0])
    new, kept = RunFactors.load(run), EvidenceModel.load(run)
    assert new is not None and kept is not None
    for old, now in ((model.loadings[None], new.model.loadings[None]), (evidence.loadings, kept.loadings)):
        assert np.array_equal(now[:, item], old[:, 0])
        assert np.array_equal(np.delete(now, item, 1), np.delete(old, item, 1))
    assert [path.name for path in (run / "bad_batches").iterdir()] == ["other.json"]
    assert forget_in_run(Place("run", run, True), what).found == 0


def test_links_and_other_datasets_are_not_followed(tmp_path: Path) -> None:
    root = make(tmp_path / "a")
    store(tmp_path / "b" / "real", ["u1"], "users")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "b" / "real")
    make(tmp_path / "b" / "shop")
    found = [place.path for place in places(tmp_path / "b", Dataset.open(root))]
    assert found == [tmp_path / "b" / "real"]


def test_words_are_found_whole_also_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remaining_bytes, "_BLOCK", 16)
    long = ["longer-than-a-few", "grün@web.de"]
    cases = {
        b"x,u7,y": ["u7"], b"u7": ["u7"], b"su7 u70 u7-a _u7": [], b"0123456789 u7 x": ["u7"], b"01234567890123u7": [],
        b"0123456789012345u7": [], b"ab \0 u7 ": [], b"ab \0 longer-than-a-few ": long, b"a grun@web.de": [],
        b"padding padding " + "<grün@web.de>".encode(): long, b"\0" * 40 + b"longer-than-a-few\0": long,
        b"another-longer-than-a-few": [],
    }  # fmt: skip
    for number, (data, found) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file.bin").write_bytes(data)
        for ids in (["u7"], long, ["u7", *long]):
            assert bool(list(files_with([folder], ids))) == bool(set(ids) & set(found)), (data, ids)
    (tmp_path / "0" / "file.bin").write_text('{"7": 7, "rows": [7, 17], "id": "70"}')
    assert not list(files_with([tmp_path / "0"], ["7"]))
    (tmp_path / "0" / "file.bin").write_text('{"some": "text", "more": "7"}')
    assert list(files_with([tmp_path / "0"], ["7"]))


def test_events_that_a_service_keeps_are_forgotten_unless_it_has_them_open(tmp_path: Path) -> None:
    root, folder = make(tmp_path / "a"), tmp_path / "serving"
    log = EventLog(folder / "events.sqlite")
    log.append(USER, [LoggedEvent("i1", 5), LoggedEvent(ITEM, 6)])
    log.append("u1", [LoggedEvent(ITEM, 7), LoggedEvent("i2", 8)])
    names = Names([USER], [ITEM])
    with closing(sqlite3.connect(folder / "other.db")) as other:
        other.execute("CREATE TABLE events (user TEXT)")

    def found(**options: bool) -> dict[str, tuple[int, str]]:
        report = forget_everywhere(root, names, [folder], **options)
        return {trace.place.name: (trace.found, trace.left) for trace in report.traces}

    assert found(erase=True)["events.sqlite"] == (
        0,
        "a service has the file open: reload the service (POST /v1/reload), which deletes the events; or stop "
        "the service and run this command again",
    )
    log.close()
    assert found(dry_run=True)["events.sqlite"] == (3, "")
    assert found(erase=True)["events.sqlite"] == (3, "") and found()["events.sqlite"] == (0, "")
    assert found()["other.db"] == (0, "")
    assert not [path for path in folder.iterdir() if USER.encode() in path.read_bytes()]
    with closing(EventLog(folder / "events.sqlite")) as after:
        assert after.is_forgotten(USER) and [event.item for event in after.of_user("u1")[0]] == ["i2"]


def test_an_item_a_feature_and_an_action_of_a_forgotten_users_number_are_no_trace_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = {"u1": "1", "u2": "01", "i1": "1", "i2": "5"}
    events = [(number.get(user, user), number.get(item, item), *rest) for user, item, *rest in random_events(200)]
    root = prepare(memory_source(tmp_path / "0", events, sorted({event[1] for event in events})), tmp_path / "out")
    (tmp_path / "runs").mkdir()
    words = ["--dataset", str(root), "--runs", str(tmp_path / "runs"), "--erase"]
    assert command.main([*words, "--user", "1", "--item", "5"]) == 0
    assert "none is left" in capsys.readouterr().out
    opened = Dataset.open(root)
    assert "1" in opened.items["raw_item_id"].to_pylist() and "01" in opened.users["raw_user_id"].to_pylist()
    pq.write_table(pa.table({"user_id": ["2", "1"]}), tmp_path / "runs" / "export.parquet")
    assert list(files_with([tmp_path / "runs"], ["1"], {"user_id": ["1"]})) == [tmp_path / "runs" / "export.parquet"]
    assert not list(files_with([tmp_path / "runs"], ["1"], {"item_id": ["1"], "user_id": []}))
