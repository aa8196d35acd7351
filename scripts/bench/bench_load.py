"""The service under load: the engine of `hllm serve` against one `Scorer` behind a lock, with the same HTTP server.

    python scripts/bench/bench_load.py --out benchmarks/DATE-load.json [--folder DIR] [--quick]
    python scripts/bench/bench_load.py --runs RUN [RUN ...] [--out FILE] [--quick]

Server and client are two processes, each pinned to one core. Requests of 200 candidates arrive as a Poisson process,
their users are drawn from a Zipf distribution, and a latency is measured from the scheduled arrival. The `capacity` is
the largest rate at which p99 is at most 50 ms and every request is answered with status 200: the rate is doubled, then
bisected. p99 / p50 is measured at half of the capacity, for a longer time. The last part has requests of 10^5 users and
a cache of user states of 1 GiB, filled with the most active users and then reduced in steps to a tenth: it reports hit
rate and p99 by size of the cache, and with `--out` a plot is written beside the JSON.

Dataset and models are synthetic (`serving_stand_in`); they are written to `--folder` and reused from there. The bench
takes about 11 minutes on a machine that runs nothing else. With `--runs` these runs are measured instead, each with its
dataset, without the last part: about 5 minutes for each.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import ROOT, arguments, report, say
from serving_stand_in import Sizes, raw_ids, stand_in_dataset, stand_in_run

from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.run_loader import run_config
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import AnyRequest, Engine, ScoreRequest, Scores
from hllm_torchrec.serving.load_test import HttpClient, LoadResult, draw_arrivals, run_load, score_bodies
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.scorer import Scorer
from hllm_torchrec.serving.service import Service
from hllm_torchrec.serving.user_state import UserState

P99_MS, CANDIDATES, MIB = 50.0, 200, 1 << 20
FIRST_RATE, BISECTIONS = 20.0, 3
CACHES = (1024, 512, 256, 102)
"""Sizes of the cache in the last part, MiB."""


def main(argv: list[str] | None = None) -> None:
    """Run the bench, or one of its servers."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "bench-load")
    parser.add_argument("--runs", type=Path, nargs="+", help="runs to measure (default: generated ones)")
    parser.add_argument("--serve", choices=("engine", "locked"), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.serve:
        os.sched_setaffinity(0, {args.core})
        serve(args.serve, args.run, args.warm)
        return
    cores = sorted(os.sched_getaffinity(0))
    seconds = 1.0 if args.tiny else 3.0 if args.quick else 8.0
    runs, many = (args.runs, None) if args.runs else stand_ins(args.folder, args.tiny)
    os.sched_setaffinity(0, {cores[-1]})
    found: dict[str, Any] = {"ratios": {}, "shapes": {"candidates": CANDIDATES, "p99_ms": P99_MS}}
    for run in runs:
        sides = {side: side_of(side, run, seconds, cores[0]) for side in ("engine", "locked")}
        found[run.name] = sides
        found["ratios"][f"{run.name}_capacity"] = sides["engine"]["capacity"] / max(sides["locked"]["capacity"], 1e-9)
        found["ratios"][f"{run.name}_p99_over_p50"] = sides["engine"]["p99_over_p50"]
    if many is not None:
        found["caches"] = caches(many, cores[0], 3 * seconds, 300 if args.tiny else 100_000)
        if args.out is not None:
            plot(found["caches"], args.out.with_suffix(".svg"))
    report("load", args, found)


def stand_ins(folder: Path, tiny: bool) -> tuple[list[Path], Path]:
    """Make the runs; return the two with the sizes of MovieLens-100k, and the one with 10^5 users."""
    few, many = folder / "few", folder / "many"
    with distributed_device() as device:
        dataset = stand_in_dataset(few, Sizes(60, 300, 20) if tiny else Sizes())
        runs = [stand_in_run(few / fusion, dataset, fusion, device) for fusion in ("late", "early")]
        dataset = stand_in_dataset(many, Sizes(300, 300, 20) if tiny else Sizes(users=100_000, items=5000))
        return runs, stand_in_run(many / "late", dataset, "late", device)


def ids_of(run: Path) -> tuple[list[str], list[str]]:
    """Raw ids of the users, and of the items, of a run's dataset."""
    return raw_ids(run_config(run, None).data.dataset)


# ---------------------------------------------------------------------- the servers


class LockedScorer(Engine):
    """Engine that scores one request at a time with a `Scorer`, and keeps the state of every user whom it has read."""

    def __init__(self, plain: Scorer, scorer: BatchScorer) -> None:
        super().__init__(scorer, index="none")
        self._plain, self._read_states = plain, dict[str, UserState]()

    def score(self, requests: Sequence[AnyRequest]) -> list[Scores | Exception]:
        """See `Engine`."""
        return [self._one(request) for request in requests if isinstance(request, ScoreRequest)]

    def _one(self, request: ScoreRequest) -> Scores:
        assert request.user is not None
        state = self._read_states.get(request.user)
        if state is None:
            state = self._read_states[request.user] = self._plain.read(self.histories.read(request.user).events)
        logits = self._plain.score(state, request.candidates, request.time)
        return Scores(logits, self._plain.predictions(logits), len(state.history), self.mark)


def serve(kind: str, run: Path, warm: int) -> None:
    """Run a server until SIGTERM, on a free port, which is printed.

    warm: number of the most active users whose states are computed before the start.
    """
    import uvicorn

    with distributed_device() as device:
        scorer = BatchScorer.of_run(run, device=device)
        engine = Engine(scorer, index="none", cache_bytes=CACHES[0] * MIB)
        limits = BatchLimits(deadline=10.0, queue=4096)
        if kind == "locked":
            engine, limits = LockedScorer(Scorer.of_run(run, device=device), scorer), replace(limits, requests=1)
        users, items = ids_of(run)
        # The most active users come last, so that they are the most recently used entries of the cache.
        asked = [ScoreRequest(user, items[:1], int(time.time())) for user in reversed(active(users)[:warm])]
        for at in range(0, len(asked), 16):
            engine.score(asked[at : at + 16])
        app = create_app(Service(engine, limits), log=None)

        @app.post("/bench/cache/{mib}")
        async def resize(mib: int) -> dict[str, int]:
            engine.states.max_bytes = mib * MIB  # states are evicted when the next one is stored
            return {"users": len(engine.states)}

        server = uvicorn.Server(uvicorn.Config(app, port=0, access_log=False, log_level="warning"))
        started = server.startup

        async def startup(sockets: Any = None) -> None:
            await started(sockets)
            print(server.servers[0].sockets[0].getsockname()[1], flush=True)

        server.startup = startup  # type: ignore[method-assign]
        server.run()


@contextmanager
def running(kind: str, run: Path, core: int, warm: int = 0) -> Iterator[str]:
    """Context manager that runs a server on a core; yields its URL."""
    command = [sys.executable, __file__, "--serve", kind, "--run", str(run), "--core", str(core), "--warm", str(warm)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as job:
        assert job.stdout is not None
        try:
            port = next((line for line in job.stdout if line.strip().isdigit()), None)
            if port is None:
                raise SystemExit(f"the server of {run} did not start")
            yield f"http://127.0.0.1:{port.strip()}"
        finally:
            job.terminate()


# ---------------------------------------------------------------------- the client


def active(users: list[str]) -> list[str]:
    """Users, the most active first: the order that `score_bodies` draws with seed 0."""
    return [users[at] for at in np.random.default_rng([0, 1]).permutation(len(users))]


async def measured(url: str, run: Path, rate: float, seconds: float, seed: int, number: int) -> LoadResult:
    """Result of an open-loop load test at a rate, with requests of `number` users."""
    users, items = ids_of(run)
    arrivals = draw_arrivals(rate, seconds, min(number, len(users)), 1.0, seed)
    bodies = score_bodies(users, items, arrivals, CANDIDATES, 0)
    client = HttpClient(url)
    before = await client.cache_counts()
    result = await run_load(client.post_score, bodies, arrivals, rate)
    hits, misses = (now - then for now, then in zip(await client.cache_counts(), before, strict=True))
    client.close()
    say(f"{run.name} {rate:.0f}/s: p50 {result.latency_ms['p50']}, p99 {result.latency_ms['p99']}, {result.statuses}")
    return replace(result, hit_rate=hits / max(hits + misses, 1))


def side_of(kind: str, run: Path, seconds: float, core: int) -> dict[str, Any]:
    """Capacity of a server, and its latencies at half of the capacity."""
    users = len(ids_of(run)[0])
    with running(kind, run, core, users) as url:
        say(f"{kind}, {run.name}")

        def good(rate: float, seed: int) -> bool:
            result = asyncio.run(measured(url, run, rate, seconds, seed, users))
            return result.latency_ms["p99"] <= P99_MS and set(result.statuses) == {"200"}

        asyncio.run(measured(url, run, FIRST_RATE, 2.0, 0, users))  # the first requests of a process allocate
        best = largest_rate(good)
        half = asyncio.run(measured(url, run, best / 2, 3 * seconds, 99, users))
    return {"capacity": best, "p99_over_p50": half.latency_ms["p99"] / half.latency_ms["p50"], "at_half": asdict(half)}


def largest_rate(good: Any) -> float:
    """Largest rate for which `good(rate, seed)` is true, by doubling and bisection on a logarithmic scale.

    The smallest rate that failed is larger than the result by a factor of at most 2^(1 / 2^BISECTIONS).
    """
    low, high, seed = FIRST_RATE, 2 * FIRST_RATE, 1
    while not good(low, seed):
        low, high, seed = low / 2, low, seed + 1
        if low < 1:
            return low
    while high == 2 * low and good(high, seed := seed + 1):
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if good(middle, seed := seed + 1) else (low, middle)
    return low


def caches(run: Path, core: int, seconds: float, users: int) -> list[dict[str, Any]]:
    """Hit rate and latencies by size of the cache, for requests of `users` users at 40 requests per second."""
    found = []
    with running("engine", run, core, users // 5) as url:
        for mib in CACHES:
            held = asyncio.run(resized(url, mib))
            asyncio.run(measured(url, run, 40.0, seconds / 3, mib, users))
            result = asyncio.run(measured(url, run, 40.0, seconds, mib + 1, users))
            found.append({"cache_mib": mib, "users_before": held, **asdict(result)})
    return found


async def resized(url: str, mib: int) -> int:
    """Set the size of a server's cache in MiB; returns the number of cached users, before any is evicted."""
    client = HttpClient(url)
    _, content = await client.request("POST", f"/bench/cache/{mib}")
    client.close()
    return int(content.split(b":")[1].strip(b" }"))


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Plot hit rate and latencies against the size of the cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [one["cache_mib"] for one in found]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in ("p50", "p99"):
        axes.plot(sizes, [one["latency_ms"][name] for one in found], marker="o", label=f"{name}, ms")
    axes.set(xlabel="cache of user states, MiB", ylabel="latency in ms", xscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    other = axes.twinx()
    other.plot(sizes, [one["hit_rate"] for one in found], color="gray", linestyle="--", marker="s", label="hit rate")
    other.set(ylabel="share of requests whose state was cached", ylim=(0, 1))
    figure.legend(loc="upper center", ncols=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
