"""A service with a million items: seconds until it is ready, latency of recommendations, memory.

    python scripts/bench/bench_many_items.py [--folder DIR] [--index ivf] [--quick] [--out FILE]

The dataset, the model and the item embeddings (a store of random vectors) are synthetic; they are written to `--folder`
and reused from there. `ready` is the time from the start of loading to the first answer, in a process that has imported
everything: wall seconds, CPU seconds (for a machine that is shared), and `scorer`, the wall seconds without the index.
`recommend_ms` has the engine's latencies of recommendations, one request at a time, for users with a cached state;
`score_ms`, measured alternately, is for scoring 200 candidates; `cold_ms` is for recommendations to users whose history
must first be read from the dataset. All is measured in one thread.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from benchmarking import ROOT, alternate, arguments, ratio, report, resident, say, timed
from serving_stand_in import Sizes, raw_ids, stand_in_dataset, stand_in_run

from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.models.fingerprint import item_facts
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import AnyRequest, Engine, RecommendRequest, ScoreRequest, Scores
from hllm_torchrec.store.store import EmbeddingStore

ROWS = 65_536
"""Number of rows of the store that are written at a time."""
NOW = 1_750_000_000


def main(argv: list[str] | None = None) -> None:
    """Run the bench."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "bench-many-items")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=576, help="of item embeddings (default: SmolLM2's)")
    parser.add_argument("--index", choices=("flat", "ivf"), default="ivf")
    args = parser.parse_args(argv)
    sizes = Sizes(200, 2000, 20, 16) if args.tiny else Sizes(args.users, args.items, 40, args.width)
    torch.set_num_threads(1)
    with distributed_device() as device:
        dataset, run, store = stand_in(args.folder, sizes, device)
        users, items = raw_ids(dataset)
        before, started, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        scorer = BatchScorer.of_run(run, "latest", device, dataset=dataset, store=store)
        loaded = time.perf_counter() - started
        engine = Engine(scorer, index=args.index, index_folder=args.folder / "index")
        answered(engine, [RecommendRequest(users[0], 10, NOW)])
        ready = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "scorer": loaded}
        say(f"ready: {ready}")
        found = measure(engine, users, items, 1 if args.tiny else 10 if args.quick else 40)
        memory = {
            "process": resident("VmRSS"),
            "before_loading": before,
            "peak": resident("VmHWM"),
            "items": engine.scorer.catalogue_bytes,
        }
        shapes = {"items": sizes.items, "users": sizes.users, "width": sizes.width, "index": args.index}
        result = {"ready": ready, "memory_bytes": memory, "shapes": shapes, **found}
        report("many_items", args, result)


def stand_in(folder: Path, sizes: Sizes, device: torch.device) -> tuple[Path, Path, Path]:
    """Folders of the dataset, the run (late fusion) and the store of random item embeddings; made if missing."""
    dataset = stand_in_dataset(folder, sizes)
    run, store = stand_in_run(folder / "late", dataset, "late", device, sizes.width), folder / "items"
    if not store.is_dir():
        facts = item_facts(load_run(run, "latest", device).experiment)
        _, items = raw_ids(dataset)
        written, rng = EmbeddingStore.create(store, sizes.width, "fp16", "string", facts), torch.Generator()
        with written.writer() as writer:
            for at in range(0, len(items), ROWS):
                part = pa.array(items[at : at + ROWS], pa.string())
                writer.upsert(part, torch.randn(len(part), sizes.width, generator=rng.manual_seed(at)))
            writer.commit()
    return dataset, run, store


def measure(engine: Engine, users: list[str], items: list[str], repeats: int) -> dict[str, Any]:
    """Latencies in milliseconds of recommendations and scores for the same users, and the ratio of the two.

    The first recommendation for each user, without a cached state, is counted separately.
    """
    rng = np.random.default_rng(0)
    asked = [users[user] for user in rng.choice(len(users), min(repeats, len(users)), replace=False)]
    candidates = [[items[item] for item in rng.choice(len(items), 200)] for _ in asked]
    recommend: list[AnyRequest] = [RecommendRequest(user, 10, NOW) for user in asked]
    score: list[AnyRequest] = [ScoreRequest(user, own, NOW) for user, own in zip(asked, candidates, strict=True)]
    cold = [timed(partial(answered, engine, [one]))() for one in recommend]
    warm: dict[str, list[list[float]]] = {"recommend": [], "score": []}
    for one, other in zip(recommend, score, strict=True):
        sides: dict[str, Callable[[], Any]] = {
            "recommend": partial(answered, engine, [one]),
            "score": partial(answered, engine, [other]),
        }
        for name, rounds in alternate(sides, 3).items():
            warm[name].append(rounds)
    new = timed(partial(answered, engine, [RecommendRequest("nobody", 10, NOW)]))()
    of_users = {name: [statistics.median(rounds) for rounds in values] for name, values in warm.items()}
    found = {f"{name}_ms": quantiles(values) for name, values in {**of_users, "cold": cold}.items()}
    of_rounds = {name: np.median(values, axis=0).tolist() for name, values in warm.items()}
    ratios = {"recommend_vs_score": ratio(of_rounds["recommend"], of_rounds["score"])}
    return {**found, "new_user_ms": new * 1e3, "ratios": ratios}


def answered(engine: Engine, requests: list[AnyRequest]) -> None:
    """Answer requests; raise the error of the first that fails."""
    for one in engine.score(requests):
        if not isinstance(one, Scores):
            raise one


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 95% quantile in milliseconds."""
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 2) for q in (50, 95)}


if __name__ == "__main__":
    main()
