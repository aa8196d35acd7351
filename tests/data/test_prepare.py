import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_partitions import hash_strings
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.movielens import movielens_100k
from hllm_torchrec.data.split import Split
from hllm_torchrec.launch.prepare import main
from tests.helpers.source_files import ITEMS, PARTS, memory_source, oracle, random_events, recbole_100k, sequences


@pytest.mark.parametrize("rule", ["time", "leave_one_out", "leave_last"])
@pytest.mark.parametrize("partitions", [1, 5])
def test_sequences_equal_plain_loops_over_the_definition(tmp_path, rule, partitions):
    events = [*random_events(), ("short", "i1", 5, 3), ("short", "i2", 5, 3)]
    source = memory_source(tmp_path, events, ITEMS)
    dataset = Dataset.open(prepare(source, tmp_path / "out", split=rule, partitions=partitions, users_per_row_group=4))
    expected = oracle(events, rule)
    for part in PARTS:
        assert sequences(dataset, part) == expected[part]
        targets = sum(len(history) - start for start, history in expected[part].values())
        assert dataset.manifest["parts"][part]["events"] == targets
        assert dataset.manifest["parts"][part]["users"] == len(expected[part])


def test_the_time_cut_falls_inside_a_second_by_source_row(tmp_path):
    events = [(f"u{n}", "i1", 5, 100) for n in range(10)]
    dataset = Dataset.open(prepare(memory_source(tmp_path, events, ["i1"]), tmp_path / "out", partitions=3))
    users = {part: set(sequences(dataset, part)) for part in PARTS}
    assert users == {"train": {f"u{n}" for n in range(8)}, "valid": {"u8"}, "test": {"u9"}}
    split = dataset.manifest["split"]
    assert (split["cut_timestamps"], split["cut_orders"]) == ([100, 100], [9, 10]), "rows count from 1"


def test_ties_keep_the_order_of_the_source(tmp_path):
    events = [("u", f"i{n % 15}", 5, 7 if n % 3 else 8) for n in range(30)]
    source, policy = memory_source(tmp_path, events, ITEMS), BadRows(largest_share=0.5)
    dataset = Dataset.open(prepare(source, tmp_path / "out", split="leave_one_out", policy=policy))
    _, history = sequences(dataset, "test")["u"]
    assert [e[0] for e in history] == [f"i{n % 15}" for n in [*(n for n in range(30) if n % 3), *range(0, 30, 3)]]


def test_partitions_change_no_sequence_only_the_user_ids(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS)
    one, many = (Dataset.open(prepare(source, tmp_path / str(n), partitions=n)) for n in (1, 9))
    for part in PARTS:
        assert sequences(one, part) == sequences(many, part)
    assert one.items.equals(many.items)
    assert len(many.sequence_files("train")) == 9
    assert np.array_equal(one.training_item_counts(), many.training_item_counts())


def test_hashes_depend_on_the_bytes_alone_and_spread():
    ids = pa.array(["x", *(f"user-{n:05d}" for n in range(5000)), "ü", "user-00000"])
    hashes = hash_strings(ids)
    assert len(set(hashes.tolist())) == 5002
    assert np.array_equal(hash_strings(ids.slice(17, 40)), hashes[17:57])
    assert hashes[1] == hashes[-1]
    counts = np.bincount((hashes % np.uint64(16)).astype(int), minlength=16)
    assert counts.min() > 200
    assert counts.max() < 450


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS)
    first, second = (Dataset.open(prepare(source, tmp_path / n, partitions=3)) for n in ("a", "b"))
    assert first.fingerprint == second.fingerprint
    other = prepare(memory_source(tmp_path / "other", random_events(seed=1), ITEMS), tmp_path / "c", partitions=3)
    assert Dataset.open(other).fingerprint != first.fingerprint


# --- the output directory


def test_the_same_source_and_options_are_reused(tmp_path, caplog):
    source = memory_source(tmp_path, random_events(), ITEMS)
    path = prepare(source, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    caplog.set_level("INFO")
    assert prepare(source, tmp_path / "out") == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    assert "reused" in caplog.text


def test_another_dataset_is_refused_and_overwritten_only_if_asked(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS)
    path = prepare(source, tmp_path / "out")
    old = Dataset.open(path).fingerprint
    with pytest.raises(ValueError, match=r"out holds another dataset \(memory; different: split\).*--overwrite"):
        prepare(source, path, split="leave_one_out")
    changed = memory_source(tmp_path / "new", random_events(seed=4), ITEMS)
    with pytest.raises(ValueError, match=r"different: source_fingerprint\)"):
        prepare(changed, path)
    assert Dataset.open(path).fingerprint == old
    prepare(source, path, split="leave_one_out", overwrite=True)
    assert Dataset.open(path).manifest["split"]["rule"] == "leave_one_out"


def test_a_folder_that_is_no_dataset_is_never_overwritten(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"exists and is not a prepared dataset; it is not overwritten"):
        prepare(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert Dataset.open(prepare(source, tmp_path / "empty")).num_items == 16


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_dataset_and_nothing_else(tmp_path, error):
    source = memory_source(tmp_path, random_events(), ITEMS)
    path = prepare(source, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    def breaks_off():
        yield from list(source.events())[:3]
        raise error("stop")

    broken = memory_source(tmp_path, random_events(), ITEMS, events=breaks_off, name="broken")
    with pytest.raises(error, match="stop"):
        prepare(broken, path, overwrite=True)
    assert sorted({*tmp_path.rglob("*")} - {path / ".lock"}) == before  # removing a lock would free it for two
    assert Dataset.open(path).name == "memory"


def test_a_damaged_dataset_can_be_overwritten(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS)
    path = prepare(source, tmp_path / "out")
    (path / "items.parquet").unlink()
    with pytest.raises(ValueError, match=r"items\.parquet is missing.*prepare again with --overwrite"):
        prepare(source, path)
    prepare(source, path, overwrite=True)
    assert Dataset.open(path).items.num_rows == 15


def test_extending_appends_ids_and_never_renumbers(tmp_path):
    events = random_events()
    old = Dataset.open(prepare(memory_source(tmp_path / "1", events, ITEMS), tmp_path / "out", partitions=2))
    old_items, old_users = old.items, old.users
    more = [("u-new", "i-new", 5, 39), ("u1", "i-new", 1, 39), *events, ("u-new", "i3", 2, 2)]
    grown = memory_source(tmp_path / "2", more, ["i-new", *reversed(ITEMS)])
    new = Dataset.open(prepare(grown, tmp_path / "out", partitions=3, extend=True))
    assert new.items.slice(0, 15).to_pylist() == old_items.to_pylist()
    assert new.items["raw_item_id"].to_pylist()[15:] == ["i-new"]
    assert new.users.slice(0, old_users.num_rows).to_pylist() == old_users.to_pylist()
    assert new.users["raw_user_id"].to_pylist()[old_users.num_rows :] == ["u-new"]
    for part in PARTS:
        assert sequences(new, part) == oracle(more, "time")[part]


def test_extending_keeps_what_the_new_source_lacks_and_takes_over_new_texts(tmp_path):
    events = [(f"u{n % 4}", f"i{n % 3}", 5, n) for n in range(20)]
    prepare(memory_source(tmp_path / "1", events, ITEMS), tmp_path / "out")
    items = ["i0", ("i1", "NEW"), "i2"]
    source = memory_source(tmp_path / "2", [e for e in events if e[0] != "u2"], items)
    with pytest.raises(ValueError, match=r"the source has 15 events, the dataset 20: .*--append.*--allow-fewer"):
        prepare(source, tmp_path / "out", extend=True)
    dataset = Dataset.open(prepare(source, tmp_path / "out", extend=True, allow_fewer=True))
    assert dataset.items["raw_item_id"].to_pylist() == ITEMS
    assert dataset.items["title"].to_pylist()[:4] == ["title i0", "NEW", "title i2", "title i3"]
    assert dataset.manifest["counts"]["items_with_new_text"] == 1
    assert dataset.users["raw_user_id"].to_pylist() == ["u0", "u1", "u2", "u3"]
    assert "u2" not in sequences(dataset, "train")
    assert (dataset.num_items, dataset.num_users) == (16, 5)


def test_extending_keeps_feature_ids(tmp_path):
    def people(folder, table):
        recbole_100k(folder)
        header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
        (folder / "ml-100k.user").write_text("\n".join([header, *table]) + "\n")
        return movielens_100k(folder)

    split = "leave_one_out"
    old = Dataset.open(
        prepare(people(tmp_path / "1", ["5\t24\tM\tnurse\t1", "3\t24\tF\tcook\t1"]), tmp_path / "out", split=split)
    )
    first = old.users.to_pylist()
    assert [r["feature_occupation"] for r in first] == [[1], [2], []]
    grown = people(tmp_path / "2", ["8\t60\tF\tcook\t1", "5\t24\tM\tpilot\t1"])
    new = Dataset.open(prepare(grown, tmp_path / "out", split=split, extend=True))
    assert [(r["raw_user_id"], r["feature_occupation"]) for r in new.users.to_pylist()] == [
        ("5", [3]),  # changed: pilot gets the next id
        ("3", [2]),  # not in the new file: as before
        ("8", [2]),  # new: cook keeps its id
    ]
    assert new.items["feature_genres"].to_pylist() == old.items["feature_genres"].to_pylist()


def test_extending_what_is_not_there_prepares_it(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS)
    assert Dataset.open(prepare(source, tmp_path / "out", extend=True)).num_items == 16


# --- other mistakes


def test_an_empty_part_is_an_error(tmp_path):
    source = memory_source(tmp_path, [("u", "i1", 5, n) for n in range(4)], ["i1"])
    with pytest.raises(ValueError, match=r"the test part of the time split is empty \(events: {'train': 3"):
        prepare(source, tmp_path / "out")
    source = memory_source(tmp_path, [("u", "i1", 5, 1), ("v", "i1", 5, 2)], ["i1"])
    with pytest.raises(ValueError, match=r"the valid and test part of the leave_one_out split is empty"):
        prepare(source, tmp_path / "out", split="leave_one_out")
    assert not (tmp_path / "out").exists()


def test_no_event_left_is_an_error(tmp_path):
    source = memory_source(tmp_path, random_events(count=20), ITEMS)
    with pytest.raises(ValueError, match=r"memory: no event is left; check the event file, the policy and min_events"):
        prepare(source, tmp_path / "out", min_events=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "random"}, r"split\.rule='random' is not one of time, date, leave_one_out, leave_last"),
        ({"core": "deep"}, r"core='deep' is not one of iterative, published"),
        ({"users_per_row_group": 0}, r"users_per_row_group=0 must be at least 1"),
    ],
)
def test_an_impossible_option_is_an_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(memory_source(tmp_path, random_events(), ITEMS), tmp_path / "out", **options)


def test_a_feature_of_both_items_and_users_is_an_error(tmp_path):
    source = memory_source(tmp_path, random_events(), ITEMS, item_features=("age",), user_features=("age",))
    with pytest.raises(ValueError, match=r"\['age'\] names features of two kinds \(item, user, context\); rename one"):
        prepare(source, tmp_path / "out")


def test_the_manifest_is_json_with_everything_a_model_needs(tmp_path):
    path = prepare(memory_source(tmp_path, random_events(), ITEMS), tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["split"]["fractions"] == [0.8, 0.1, 0.1]
    assert manifest["text_columns"] == ["title"]
    assert set(manifest["files"]) >= {"items.parquet", "users.parquet", "sequences/train/part-00000.parquet"}


MEMORY_PROBE = """
import sys
from pathlib import Path
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.pixelrec import pixelrec
folder = Path(sys.argv[1])
def peak():  # in MiB; getrusage would count the parent before exec, too
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
items, count = folder / "item_info.csv", sys.argv[2]
prepare(pixelrec(folder / "warm.csv", items), folder / f"warm-{count}", partitions=2)
before = peak()
prepare(pixelrec(folder / "Pixel.csv", items), folder / count, partitions=int(count))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_follows_the_partition_and_not_the_number_of_events(tmp_path, root):
    users, per_user = 200_000, 15
    rng = np.random.default_rng(0)
    header = "item_id,user_id,timestamp\n"
    items, names = (pa.array([f"{kind}{n:07d}" for n in range(size)]) for kind, size in (("i", 500), ("user-", users)))
    with (tmp_path / "Pixel.csv").open("wb") as file:
        file.write(header.encode())
        for _ in range(per_user):
            drawn, times = rng.integers(500, size=users), rng.integers(10**9, size=users)
            table = pa.table({"item_id": items.take(pa.array(drawn)), "user_id": names, "timestamp": times})
            pa.csv.write_csv(table, file, pa.csv.WriteOptions(include_header=False, quoting_style="none"))
    (tmp_path / "warm.csv").write_text(header + "".join(f"i{n % 9:07d},u{n % 7},{n}\n" for n in range(99)))
    lines = ["item_id,title,tag,description", *(f"i{n:07d},t{n},x,d" for n in range(500))]
    (tmp_path / "item_info.csv").write_text("\n".join(lines) + "\n")

    def growth(partitions):
        command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path), str(partitions)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
        return float(printed.split()[-1])

    whole, parted = growth(1), growth(24)
    assert parted < whole / 2, f"{parted} MiB more for 3 million events (in one partition {whole} MiB)"
    assert 0 < parted < whole / 2


# --- items held out of train


@pytest.mark.parametrize("partitions", [1, 5])
def test_held_out_items_have_no_event_in_train_nor_its_history_and_keep_those_of_later_parts(tmp_path, partitions):
    events = random_events()
    split = Split(hold_out_items=0.3, hold_out_seed=1)
    prepared = prepare(memory_source(tmp_path, events, ITEMS), tmp_path / "out", split=split, partitions=partitions)
    dataset, held = Dataset.open(prepared), {i for i, out in zip(ITEMS, split.held_out(ITEMS), strict=True) if out}
    assert 1 < len(held) < 8
    removed = 0
    for part, users in oracle(events, "time").items():
        found = sequences(dataset, part)
        expected = {}
        for user, (start, history) in users.items():
            in_train = oracle(events, "time")["train"].get(user, (0, []))[1]
            kept = [e for n, e in enumerate(history) if n >= len(in_train) or e[0] not in held]
            gone = len(history) - len(kept)
            removed += gone if part == "train" else 0
            if kept:
                expected[user] = (0 if part == "train" else start - gone, kept)
        assert found == expected
    names = dataset.items["raw_item_id"].to_pylist()
    counts = dict(zip(names, dataset.training_item_counts()[1:], strict=True))
    assert all(counts[item] == 0 for item in held) and all(counts[item] for item in set(ITEMS) - held)
    assert dataset.manifest["counts"]["dropped"] == {"held_out_of_train": removed}
    assert dataset.manifest["split"]["hold_out_items"] == 0.3
    assert sum(part["events"] for part in dataset.manifest["parts"].values()) == len(events) - removed


def test_which_items_are_held_out_depends_on_seed_and_raw_id_alone():
    items = [f"i{n}" for n in range(2000)]
    split = Split(hold_out_items=0.2)
    chosen = split.held_out(items)
    assert 330 < chosen.sum() < 470
    assert np.array_equal(split.held_out(items[::-1]), chosen[::-1])
    assert not np.array_equal(Split(hold_out_items=0.2, hold_out_seed=1).held_out(items), chosen)
    assert not Split().held_out(items).any() and "hold_out_items" not in Split().to_dict()
    with pytest.raises(ValueError, match=r"split.hold_out_items=1: must be a share of the items"):
        Split(hold_out_items=1)


def test_the_command_holds_items_out(tmp_path, capsys):
    folder = recbole_100k(tmp_path / "raw")
    arguments = ["--source", "ml-100k", "--path", str(folder), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--hold-out-items", "0.6", "--seed", "3"]) == 0
    assert '"held_out_of_train"' in capsys.readouterr().out
    assert Dataset.open(tmp_path / "out").manifest["split"]["hold_out_seed"] == 3
