#!/usr/bin/env python3
"""Kills the writers of a dataset at random file accesses, and checks that nothing is lost or duplicated.

    python scripts/reliability/kills.py                               # 50 kills: some ten minutes
    python scripts/reliability/kills.py --kills 8 --only append forget
    python scripts/reliability/kills.py --seed 1

The writers are an append, an append that first merges large earlier appends into a new base, a compaction,
`hllm forget --erase` (of a user and an item, with a store and predictions), and a night. Each kill ends the process
before a random file access, without any cleanup. Afterwards every version of the dataset must be complete, in its state
before or after the call. Then the same call is repeated (half of the time it is killed once more), and its result must
equal that of an undisturbed call: the same events in the same order in every version, the same counts, no leftover
files.

Prints a JSON line. Exit status: 0 if all checks passed, else 1.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hllm_torchrec.data import folding  # noqa: E402
from hllm_torchrec.data.append import append_events  # noqa: E402
from hllm_torchrec.data.dataset import Dataset  # noqa: E402
from hllm_torchrec.data.dataset_compaction import compact  # noqa: E402
from hllm_torchrec.data.forgetting import Names  # noqa: E402
from hllm_torchrec.data.prepare import prepare  # noqa: E402
from hllm_torchrec.data.versions import kept_versions  # noqa: E402
from hllm_torchrec.lifecycle.forgetting_job import forget_everywhere  # noqa: E402
from hllm_torchrec.store.store import EmbeddingStore  # noqa: E402
from tests.helpers.distributed import forks  # noqa: E402
from tests.helpers.schedules import acting_before  # noqa: E402
from tests.helpers.source_files import ITEMS, PARTS, memory_source, random_events, sequences  # noqa: E402

KILLED = 9
USER, ITEM = "u3", "i4"
SHARES = {"append": 10, "outgrown": 8, "compact": 10, "forget": 14, "nightly": 8}
"""Writer -> its number of kills if the total is 50."""
NIGHT = "day-04"


@dataclass(frozen=True)
class Writer:
    """A writer to kill. begin: makes the folder in which `act` writes, with the dataset data/; state: folder -> the
    state that is compared with that of an undisturbed call."""

    begin: Callable[[Path], None]
    act: Callable[[Path], None]
    state: Callable[[Path], Any]


# ------------------------------------------------------------------ writers


def begin_shop(folder: Path) -> None:
    """Make a dataset with a base and two appends, a store of users, and predictions of its exposures."""
    events = list({(e[0], e[1], e[3]): e for e in random_events(240)}.values())
    root = prepare(memory_source(folder / "0", events[:120], ITEMS), folder / "data")
    for number, some in enumerate((events[120:160], events[160:200]), 1):
        append_events(memory_source(folder / str(number), some, ITEMS), root)
    raw = Dataset.open(root).users["raw_user_id"].to_pylist()
    store = EmbeddingStore.create(folder / "made" / "users", 4, facts={"part": "users"})
    with store.writer() as writer:
        writer.upsert(raw, torch.arange(4.0 * len(raw)).view(-1, 4))
        writer.commit()
    ids = np.arange(1, len(raw) + 1)
    rows = {"user_id": ids, "item_id": ids % len(ITEMS) + 1, "position": ids, "score": ids / 7}
    (folder / "made" / "predictions").mkdir()
    pq.write_table(pa.table(rows), folder / "made" / "predictions" / "part-00000.parquet")


def append(folder: Path) -> None:
    """Append a day with known, late and new events."""
    day = [("u1", "new", 5, 60), ("u2", "i1", 5, 3), ("fresh", "i2", 4, 61), *random_events(40, seed=5)]
    append_events(memory_source(folder / "day", day, [*ITEMS, "new"]), folder / "data")


def outgrown(folder: Path) -> None:
    """Append the day to a dataset whose earlier appends are so large that they are first merged into a new base."""
    with patch.multiple(folding, LEAST_EVENTS=50, OUTGROWN=0.5):
        append(folder)


def forget(folder: Path) -> None:
    """Erase a user and an item from the dataset, the store and the predictions."""
    made = folder / "made"
    report = forget_everywhere(folder / "data", Names([USER], [ITEM]), [made], [made / "predictions"], erase=True)
    assert not report.remaining, report.remaining


def shop_state(folder: Path) -> Any:
    """Content of every version of the dataset, of the store and of the predictions."""
    snapshot = EmbeddingStore.open(folder / "made" / "users").snapshot()
    pairs = ((keys.to_pylist(), vectors.tolist()) for keys, vectors, _ in snapshot.rows())
    rows = sorted(row for keys, vectors in pairs for row in zip(keys, vectors))
    return versions_of(folder / "data"), rows, pq.read_table(folder / "made" / "predictions").to_pylist()


def begin_nights(folder: Path) -> None:
    """Make the folder of nightly training, after its first night."""
    from tests.lifecycle import conftest as worlds

    worlds.begin(folder)
    worlds.World(folder).configure()
    in_process(lambda: worlds.World(folder).run("day-03"))


def night(folder: Path) -> None:
    """Run the next night."""
    from tests.lifecycle import conftest as worlds

    worlds.World(folder).configure()
    worlds.World(folder).run(NIGHT)


def night_state(folder: Path) -> Any:
    """State of the night, and the versions of the dataset."""
    from tests.lifecycle.conftest import World
    from tests.lifecycle.test_nightly import comparable

    return comparable(World(folder).state(NIGHT)), versions_of(folder / "data")


def versions_of(root: Path) -> dict[int, Any]:
    """Version -> its events in order, and its counts."""
    found = {}
    for version in kept_versions(root):
        dataset = Dataset.open(root, version)
        parts = {part: sequences(dataset, part) for part in PARTS}
        found[version] = parts, {name: dataset.manifest["counts"][name] for name in ("events", "users", "items")}
    return found


WRITERS = {
    "append": Writer(begin_shop, append, shop_state),
    "outgrown": Writer(begin_shop, outgrown, shop_state),
    "compact": Writer(begin_shop, lambda folder: compact(folder / "data") and None, shop_state),
    "forget": Writer(begin_shop, forget, shop_state),
    "nightly": Writer(begin_nights, night, night_state),
}


# ------------------------------------------------------------------ kills


def in_process(work: Callable[[], None]) -> None:
    """Run `work` and release its process group."""
    from hllm_torchrec.distributed.process_group import destroy_distributed

    try:
        work()
    finally:
        destroy_distributed()


def run_and_die(name: str, folder: str, access: int) -> None:
    """Run a writer in this process, which ends before its `access`-th file access."""
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        with acting_before(access, lambda: os._exit(KILLED), Path(folder)):
            WRITERS[name].act(Path(folder))
        os._exit(0)
    finally:
        os._exit(1)


def killed(name: str, folder: Path, access: int) -> bool:
    """Run a writer in a child process; return True if it was killed, False if it ended before."""
    if name == "nightly":  # training does not survive a plain fork
        process = forks().Process(target=run_and_die, args=(name, str(folder), access))
        process.start()
        process.join(300)
        status = process.exitcode
    else:
        child = os.fork()
        if child == 0:
            run_and_die(name, str(folder), access)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), f"{name}: exit status {status} before access {access}"
    return status == KILLED


def leftovers(folder: Path) -> list[str]:
    """Files that should not exist after a completed call: temporary files of a killed process."""
    permanent = (".lock", ".metadata")
    hidden = [path for path in folder.rglob(".*") if path.name not in permanent and not path.is_dir()]
    return [str(path) for path in (*hidden, *folder.rglob("*.forgetting"), *folder.rglob("*.erasing"))]


def try_kills(name: str, number: int, rng: np.random.Generator, work: Path) -> Counter[str]:
    """Kill a writer `number` times; return the counts of kills and of the versions' states after them.

    Raises:
        AssertionError: a check failed.
    """
    writer, saved, done = WRITERS[name], work / "saved", work / "done"
    writer.begin(saved)
    shutil.copytree(saved, done, symlinks=True)
    in_process(lambda: writer.act(done))
    before, after, due = versions_of(saved / "data"), versions_of(done / "data"), writer.state(done)
    found, most = Counter[str](), 600
    while found["kills"] < number:
        folder = work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder, symlinks=True)
        access = int(rng.integers(1, most + 1))
        if not killed(name, folder, access):
            most = min(most, access)  # the writer has fewer accesses than `access`
            continue
        found["kills"] += 1
        for version, state in versions_of(folder / "data").items():
            assert state in (before.get(version), after.get(version)), f"{name}, access {access}: version {version}"
            found["versions as before" if state == before.get(version) else "versions as after"] += 1
        if found["kills"] < number and rng.random() < 0.5:
            found["kills"] += killed(name, folder, int(rng.integers(1, most + 1)))
        in_process(partial(writer.act, folder))
        assert writer.state(folder) == due, f"{name}, access {access}: another state than undisturbed"
        assert not leftovers(folder), f"{name}, access {access}: left {leftovers(folder)}"
    return found


def build_parser() -> argparse.ArgumentParser:
    """Build the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills in all (default 50)")
    parser.add_argument("--only", nargs="+", choices=list(WRITERS), default=list(WRITERS), help="writers to kill")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Kill the writers, and print the counts."""
    args = build_parser().parse_args(argv)
    rng, found = np.random.default_rng(args.seed), {}
    share_sum = sum(SHARES[name] for name in args.only)
    shares = {name: max(1, args.kills * SHARES[name] // share_sum) for name in args.only}
    shares[args.only[0]] += max(0, args.kills - sum(shares.values()))
    for name, number in shares.items():
        with tempfile.TemporaryDirectory(prefix="hllm-kills-") as work:
            try:
                found[name] = dict(try_kills(name, number, rng, Path(work)))
            except AssertionError as error:
                print(f"FAILED: {error}", file=sys.stderr)
                return 1
    total = sum(one["kills"] for one in found.values())
    print(json.dumps({"kills": total, "failed": 0, "seed": args.seed, "writers": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
