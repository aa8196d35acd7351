"""Compares the speed of the service's engine with that of `Scorer`, for requests of many users and without HTTP.

    python scripts/bench/bench_serving.py --fusion late [--quick] [--out FILE]
    python scripts/bench/bench_serving.py --run RUN [--untrained late] [--dataset DATASET] [--quick] [--out FILE]

With `--untrained` the model has the configuration, item factors and evidence of the run, the fusion that the option
names, and random weights. Without `--run` the model is like that of configs/ml100k/early.yaml, with random weights, on
a generated dataset (`serving_stand_in`). Both programs score the same requests with one thread; the histories are
already in the cache. `scorer` scores one request after the other, with dense ids; `engine` scores batches of `--batch`
requests with raw ids; `engine_one` scores batches of one. The programs alternate, and ratios are those of CPU times,
which other processes influence less than wall times. The benchmark stops if the scores differ.

`outside_model` is the share of a program's CPU time that is not spent in the user encoder, the head or the projections.
It is measured by timers around the calls of these modules, in a separate pass.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarking import ROOT, alternate, arguments, medians, ratio, report, say, timed
from serving_stand_in import Sizes, stand_in_dataset, stand_in_run
from torch import nn

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.evidence import run_evidence
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.run_loader import load_run, run_config
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.modules import prepared_head
from hllm_torchrec.serving import batch_scorer
from hllm_torchrec.serving import scorer as scorer_module
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine, ScoreRequest, Scores
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from hllm_torchrec.serving.scorer_loading import in_one_process

USERS = 64


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, help="run to measure (default: a generated one)")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "bench-serving", help="of the generated run")
    parser.add_argument("--fusion", choices=("early", "late"), default="late", help="of the generated run")
    parser.add_argument("--untrained", choices=("early", "late"), help="fusion of random weights for --run")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with distributed_device() as device, ExitStack() as stack:
        if args.run is None:
            args.dataset = stand_in_dataset(args.folder, Sizes())
            args.run = stand_in_run(args.folder / args.fusion, args.dataset, args.fusion, device)
        config = in_one_process(run_config(args.run, args.dataset))
        experiment = untrained(config, args, device) if args.untrained else trained(args.run, config, device, stack)
        # Not the dataset's journal, which may have new items.
        journal = Path(stack.enter_context(TemporaryDirectory()), "none.jsonl")
        plain = Scorer(experiment, journal=journal)
        engine = Engine(BatchScorer(experiment, journal=journal), index="none")
        found = measure(plain, engine, args.candidates, args.batch, 1 if args.tiny else 5 if args.quick else 15)
        report("serving", args, found)


def trained(run: Path, config: Config, device: torch.device, stack: ExitStack) -> Experiment:
    """The model of a run with its evaluation weights, until `stack` is closed."""
    loaded = load_run(run, "best", device, config)
    stack.enter_context(loaded.weights)
    return loaded.experiment


def untrained(config: Config, args: argparse.Namespace, device: torch.device) -> Experiment:
    """The model of `--run` with the fusion of `--untrained` and random weights."""
    config = replace(config, objective=replace(config.objective, fusion=args.untrained))
    evidence = run_evidence(config.data.evidence, args.run)
    return build_experiment(config, device, factors=RunFactors.load(args.run), evidence=evidence)


def measure(plain: Scorer, engine: Engine, candidates: int, batch: int, repeats: int) -> dict[str, Any]:
    """Ratios of the programs' CPU times, their requests per CPU second, and their shares outside of the model."""
    dataset, rng = plain.experiment.dataset, np.random.default_rng(0)
    users = rng.permutation(dataset.num_users - 1)[:USERS] + 1
    raw_users, raw_items = dataset.users["raw_user_id"].to_pylist(), dataset.items["raw_item_id"].to_pylist()
    moment = int(time.time())
    items = [1 + rng.choice(len(raw_items), size=min(candidates, len(raw_items)), replace=False) for _ in users]
    states = [plain.read(UserHistory(int(user), **dataset.user_events(int(user)).columns)) for user in users]
    requests = [
        ScoreRequest(raw_users[user - 1], [raw_items[item - 1] for item in chosen], moment)
        for user, chosen in zip(users, items, strict=True)
    ]

    def by_scorer() -> list[np.ndarray]:
        return [plain.score(state, chosen, moment) for state, chosen in zip(states, items, strict=True)]

    def by_engine(size: int = batch) -> list[np.ndarray]:
        found = [one for at in range(0, USERS, size) for one in engine.score(requests[at : at + size])]
        return [one.logits for one in found if isinstance(one, Scores)]

    worst = max(float(np.abs(a - b).max()) for a, b in zip(by_scorer(), by_engine(), strict=True))
    if worst > 1e-3:
        raise SystemExit(f"the scores differ by {worst}")
    works = {"scorer": by_scorer, "engine_one": lambda: by_engine(1), "engine": by_engine}
    times = alternate({name: timed(work, time.process_time) for name, work in works.items()}, repeats)
    lengths = [state.cache.length for state in states]
    result = {
        "ratios": {
            "engine_vs_scorer": ratio(times["scorer"], times["engine"]),
            "engine_one_vs_scorer": ratio(times["scorer"], times["engine_one"]),
        },
        "shapes": {
            "fusion": plain.experiment.config.objective.fusion,
            "candidates": candidates,
            "batch": batch,
            "history": {"median": float(np.median(lengths)), "max": max(lengths)},
        },
        "largest_score_difference": worst,
        "requests_per_cpu_second": {name: USERS / value for name, value in medians(times).items()},
        "outside_model": {
            "scorer": outside(plain, by_scorer),
            "engine_one": outside(engine.scorer, works["engine_one"]),
            "engine": outside(engine.scorer, by_engine),
        },
    }
    say(str(result))
    return result


def outside(side: Scorer, work: Callable[[], Any]) -> float:
    """Share of the CPU time of `work` that is not spent in the encoder, the head or the projections of `side`."""
    spent = [0.0]
    with timed_model(side, spent):
        total = timed(work, time.process_time)()
    return 1 - spent[0] / total


@contextmanager
def timed_model(side: Scorer, spent: list[float]) -> Iterator[None]:
    """Within the context, add the CPU seconds of the encoder (with its cache), head and projections to `spent[0]`."""
    depth = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            depth[0] += 1
            started = time.process_time()
            try:
                return function(*given, **named)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent[0] += time.process_time() - started

        return run

    def begins(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: counted(counted(function)(*given))

    hllm = side.hllm
    projections = hllm.project_item, hllm.project_vectors, hllm.features.merge_time, hllm.features.numeric
    modules: list[nn.Module] = [hllm.head, *(one for one in projections if one is not None)]
    originals = batch_scorer.begin_requests, scorer_module.begin_request, prepared_head.PreparedHead.score
    batch_scorer.begin_requests, scorer_module.begin_request = begins(originals[0]), begins(originals[1])
    prepared_head.PreparedHead.score = counted(originals[2])  # type: ignore[method-assign]
    for module in modules:
        module.forward = counted(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        batch_scorer.begin_requests, scorer_module.begin_request = originals[:2]
        prepared_head.PreparedHead.score = originals[2]  # type: ignore[method-assign]
        for module in modules:
            del module.forward


if __name__ == "__main__":
    main()
