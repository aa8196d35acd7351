"""Runs `hllm serve` under load with kills, reloads, new items and appends, and compares its scores with evaluation.

    python scripts/reliability/soak_serving.py --minutes 30 --rate 20 [--folder DIR] [--out FILE]

Visits of users arrive as a Poisson process of `--rate` visits per second. In a visit a user requests scores of
candidates and then sends an event; all visits of a user have different seconds. Meanwhile the service is killed
(SIGKILL) every `--kill` seconds and started again, the published run alternates between two runs every `--reload`
seconds, new items are added, and the acknowledged events are appended to the dataset every `--append` seconds. At the
end all events are appended as a test part, the scores that `hllm evaluate` computes with both runs are compared with
the served scores, and the service's file must have every acknowledged event. The last append assigns ID rows to the
items that were added during the soak, so the scores of these items, and of users who have rated them, cannot be
compared: half of the users therefore request scores of the other items only.

Prints JSON. The exit status is 1 if a score differs, no score was compared, an event is lost, or a request that no kill
interrupted has a status 5xx or no answer. `--rate` should be half of the capacity that scripts/bench/bench_load.py
measures on this machine. Requires a checkout and Linux.
"""

import argparse
import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

from serving_stand_in import Sizes, raw_ids, stand_in_dataset, stand_in_run  # noqa: E402

from hllm_torchrec.common.machine import machine_info  # noqa: E402
from hllm_torchrec.data.append import append_events  # noqa: E402
from hllm_torchrec.data.dataset import Dataset  # noqa: E402
from hllm_torchrec.data.sources.table_mapping import table  # noqa: E402
from hllm_torchrec.data.split import Split  # noqa: E402
from hllm_torchrec.distributed.process_group import distributed_device  # noqa: E402
from hllm_torchrec.evaluation.run_loader import score_run  # noqa: E402
from hllm_torchrec.serving.load_test import HttpClient  # noqa: E402

TOKEN, PORT, SIZES, WIDTH = "a secret of this soak", 8431, Sizes(users=300, items=400, events=40, seed=3), 32
TOLERANCE = 1e-3
"""Largest accepted difference of a logit, due to rounding in batches."""


@dataclass
class Served:
    """A score that was served. second: time of the request; model: the scorer's mark."""

    user: str
    item: str
    second: int
    score: float
    model: str


Event = tuple[str, str, int, float, str]
"""User, item, second, label, action."""


@dataclass
class Tally:
    """Counts and records of a soak.

    up: status -> number of requests while the service was running; at_a_kill: the same for requests that a kill may
    have interrupted; items: raw ids of the added items.
    """

    up: Counter[int] = field(default_factory=Counter)
    at_a_kill: Counter[int] = field(default_factory=Counter)
    served: list[Served] = field(default_factory=list)
    acknowledged: list[Event] = field(default_factory=list)
    kills: int = 0
    appends: int = 0
    items: list[str] = field(default_factory=list)
    memory: list[list[int]] = field(default_factory=list)
    """Resident bytes of each process of the service, every ten seconds."""


class Service:
    """`hllm serve` for the run to which `folder`/current points."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url, self.ready = folder, f"http://127.0.0.1:{PORT}", False
        self.changed = time.monotonic()
        """Time at which the service was last killed or became ready, on the monotonic clock."""

    async def start(self) -> None:
        """Start the service, and wait until it is ready."""
        given = ["--run", "current", "--dataset", "data", "--checkpoint", "latest", "--port", str(PORT), "--quiet"]
        given += ["--state", "events.sqlite", "--token-file", "token", "--watch", "1", "--max-change", "1"]
        given += ["--deadline", "10000"]  # a reload computes at the same time as the requests
        command = [sys.executable, "-m", "hllm_torchrec.launch.cli", "serve", *given, "--cache", "64"]
        with (self.folder / "serve.log").open("a") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            self.job = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)
        while await self.status() != 200:
            if self.job.poll() is not None:
                raise SystemExit(f"the service ended: {(self.folder / 'serve.log').read_text()[-2000:]}")
            await asyncio.sleep(0.1)
        self.ready, self.changed = True, time.monotonic()

    async def status(self) -> int:
        """HTTP status of /readyz; 0 without an answer."""
        client = HttpClient(self.url)
        try:
            return (await client.request("GET", "/readyz"))[0]
        except (OSError, EOFError, h11.RemoteProtocolError):
            return 0
        finally:
            client.close()

    def kill(self) -> None:
        """Kill the service by SIGKILL."""
        self.ready, self.changed = False, time.monotonic()
        self.job.kill()
        self.job.wait()


class Soak:
    """The users, and the disturbances of the service."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.tally, self.service = folder, options, Tally(), Service(folder)
        self.users, items = raw_ids(folder / "data")
        self.known, self.rng, self.first_items = list(items), np.random.default_rng(0), len(items)
        self.last = dict.fromkeys(self.users, int(time.time()) - 5)
        self.busy: set[str] = set()

    async def run(self) -> None:
        """Send requests to the service and disturb it for `--minutes`."""
        await self.service.start()
        every = self.options
        work: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (every.kill, self.kill),
            (every.reload, self.publish_other),
            (every.append, self.append),
            (20.0, self.new_item),
            (10.0, self.measure),
        ]
        ends = time.monotonic() + 60 * every.minutes
        loops = [asyncio.create_task(self.repeat(seconds, step, ends)) for seconds, step in work]
        asked = []
        while time.monotonic() < ends:
            await asyncio.sleep(self.rng.exponential(1 / every.rate))
            number = int(self.rng.integers(len(self.users)))
            if self.users[number] not in self.busy:
                items = self.first_items if number % 2 else len(self.known)
                asked.append(asyncio.create_task(self.visit(self.users[number], items)))
        await asyncio.gather(*asked, *loops)
        self.service.job.send_signal(signal.SIGTERM)
        assert self.service.job.wait(60) == 0, "the service did not end with status 0"

    async def repeat(self, seconds: float, step: Callable[[], Awaitable[None]], ends: float) -> None:
        """Call `step` every `seconds` seconds until `ends`, on the monotonic clock."""
        while time.monotonic() + seconds < ends:
            await asyncio.sleep(seconds)
            await step()

    async def visit(self, user: str, items: int) -> None:
        """Request scores of candidates among the first `items` items, then send an event of the first candidate."""
        self.busy.add(user)
        try:
            second = self.last[user] = max(self.last[user] + 1, int(time.time()))
            candidates = [self.known[i] for i in self.rng.choice(items, 5, replace=False)]
            asked = {"user": user, "candidates": candidates, "time": second}
            status, found = await self.post("/v1/score", asked)
            if status != 200:
                return
            rating = int(self.rng.integers(1, 6))
            event = {"item": candidates[0], "timestamp": second, "label": float(rating > 3), "action": str(rating)}
            status, _ = await self.post("/v1/events", {"user": user, "events": [event]})
            if status == 200:
                self.tally.acknowledged.append((user, candidates[0], second, float(rating > 3), str(rating)))
            self.tally.served.append(Served(user, candidates[0], second, found["scores"][0], found["model"]))
        finally:
            self.busy.discard(user)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Send a request and count its status; return the status (0: no answer) and the answer."""
        client, began, was_ready = HttpClient(self.service.url, TOKEN), time.monotonic(), self.service.ready
        status, content = 0, b"null"
        with suppress(OSError, EOFError, h11.RemoteProtocolError):
            status, content = await client.request("POST", path, json.dumps(body).encode())
        client.close()
        is_up = was_ready and self.service.ready and self.service.changed < began
        (self.tally.up if is_up else self.tally.at_a_kill)[status] += 1
        return status, json.loads(content)

    async def kill(self) -> None:
        """Kill the service and start it again."""
        self.service.kill()
        self.tally.kills += 1
        self.tally.memory.append([])
        await self.service.start()

    async def publish_other(self) -> None:
        """Let `current` point to the other run; the service checks it every second."""
        other = "b" if (self.folder / "current").resolve().name == "a" else "a"
        (self.folder / "next").symlink_to(other)
        (self.folder / "next").replace(self.folder / "current")

    async def new_item(self) -> None:
        """Add an item with a text to the service."""
        name = f"new{len(self.tally.items)}"
        item = {"item": name, "text": {"title": "word1 word2"}, "features": {"genres": ["genre3"]}}
        if (await self.post("/v1/items", {"items": [item]}))[0] == 200:
            self.tally.items.append(name)
            self.known.append(name)

    async def append(self) -> None:
        """Append the acknowledged events to the dataset; the service then loads the new version."""
        await asyncio.to_thread(self.append_now, f"append{self.tally.appends}", list(self.tally.acknowledged))
        self.tally.appends += 1

    def append_now(self, name: str, events: list[Event], split: Split | None = None) -> None:
        """Append events to the dataset, which ignores the events of earlier appends."""
        names = ("user", "item", "second", "label", "action")
        columns = dict(zip(names, zip(*events, strict=True), strict=True))
        pq.write_table(
            pa.table({key: list(values) for key, values in columns.items()}), self.folder / f"{name}.parquet"
        )
        titles = ["word1 word2"] * len(self.tally.items)
        rows = {"item": self.tally.items, "title": titles, "genres": ["genre3"] * len(titles)}
        new = pa.table({key: pa.array(values, pa.string()) for key, values in rows.items()})
        items = pa.concat_tables([pq.read_table(self.folder / "items.parquet"), new])
        pq.write_table(items, self.folder / f"{name}-items.parquet")
        mapping = yaml.safe_load((self.folder / "tables.yaml").read_text())
        mapping["events"]["path"], mapping["items"]["path"] = f"{name}.parquet", f"{name}-items.parquet"
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(mapping))
        append_events(table(self.folder / f"{name}.yaml"), self.folder / "data", split=split)

    async def measure(self) -> None:
        """Record the resident memory of the service."""
        if not self.service.ready:
            return
        with suppress(OSError):
            pages = int(Path(f"/proc/{self.service.job.pid}/statm").read_text().split()[1])
            self.tally.memory[-1].append(pages * os.sysconf("SC_PAGESIZE"))


def logged(file: Path) -> list[Event]:
    """Events in the service's file."""
    with closing(sqlite3.connect(file)) as connection:
        found: list[Event] = connection.execute("SELECT user, item, timestamp, label, action FROM events").fetchall()
    return found


def replayed(soak: Soak, device: torch.device) -> dict[str, Any]:
    """Compare the served scores with the scores of evaluation for the same exposures, and the acknowledged events with
    the service's file."""
    tally, folder = soak.tally, soak.folder
    events = logged(folder / "events.sqlite")
    lost = sorted(set(tally.acknowledged) - set(events))
    there = {event[:3] for event in events}
    first = min(second for _, _, second in there)
    soak.append_now("last", events, Split("date", train_until=first - 2, valid_until=first - 1))
    by_run = {name: evaluated(folder / name, folder / "data", device) for name in ("a", "b")}
    of_new = {user for user, item, _ in there if item.startswith("new")}
    errors: dict[str, dict[str, list[float]]] = {}
    for one in tally.served:
        if one.item.startswith("new") or one.user in of_new or (one.user, one.item, one.second) not in there:
            continue
        for name, scores in by_run.items():
            difference = abs(scores[one.user, one.item, one.second] - one.score)
            errors.setdefault(one.model, {}).setdefault(name, []).append(difference)
    # Scores with the same mark were computed with the same weights, so by one run: the one whose scores differ least.
    worst = {mark: min(max(values) for values in by.values()) for mark, by in errors.items()}
    compared = sum(len(by["a"]) for by in errors.values())
    largest = max(worst.values(), default=0.0)
    return {"lost": lost, "compared": compared, "models": len(worst), "largest_difference": largest}


def evaluated(run: Path, dataset: Path, device: torch.device) -> dict[tuple[str, str, int], float]:
    """(Raw user, raw item, second) -> score of the run, for the exposures of the test part."""
    predictions = score_run(run, "test", "latest", device, dataset).predictions
    assert predictions is not None
    opened, rows = Dataset.open(dataset), pq.read_table(predictions).to_pydict()
    users, items = (opened.users["raw_user_id"].to_pylist(), opened.items["raw_item_id"].to_pylist())
    names = ([users[user - 1] for user in rows["user_id"]], [items[item - 1] for item in rows["item_id"]])
    return dict(zip(zip(*names, rows["timestamp"], strict=True), rows["score"], strict=True))


def main() -> int:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=20, help="visits per second, of two requests each")
    for name, seconds, what in (
        ("kill", 120, "kills"),
        ("reload", 75, "changes of the run"),
        ("append", 310, "appends"),
    ):
        help_text = f"seconds between {what} (default: {seconds})"
        parser.add_argument(f"--{name}", type=float, default=seconds, help=help_text)
    parser.add_argument("--folder", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hllm-soak-"))
    with distributed_device() as device:
        dataset = stand_in_dataset(folder, SIZES)
        for seed, name in enumerate(("a", "b")):
            stand_in_run(folder / name, dataset, "early", device, WIDTH, seed)
        (folder / "current").symlink_to("a")
        (folder / "token").write_text(TOKEN)
        soak = Soak(folder, options)
        soak.tally.memory.append([])
        asyncio.run(soak.run())
        found = replayed(soak, device)
    tally = soak.tally
    failures = {str(status): count for status, count in tally.up.items() if status == 0 or status >= 500}
    memory = [{"first": life[0], "last": life[-1], "most": max(life)} for life in tally.memory if life]
    result = {
        **{name: value for name, value in vars(options).items() if name not in ("folder", "out")},
        "statuses": {str(status): count for status, count in tally.up.items()},
        "statuses_at_a_kill": {str(status): count for status, count in tally.at_a_kill.items()},
        "kills": tally.kills,
        "appends": tally.appends,
        "new_items": len(tally.items),
        "acknowledged": len(tally.acknowledged),
        **found,
        "memory_bytes": memory,
        "machine": machine_info(),
    }
    print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = found["largest_difference"] > TOLERANCE or not found["compared"]
    return int(bool(failures or found["lost"] or wrong))


if __name__ == "__main__":
    sys.exit(main())
