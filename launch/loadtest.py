"""`hllm loadtest`: measures the latencies of a running `hllm serve` at given request rates.

hllm loadtest --url http://127.0.0.1:8400 --dataset data/ml-100k --rates 20,50,100 --seconds 20 --output runs/load

For a model with `data.context`, give the context that all requests send: --context '{"page": "home"}'.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point, natural, positive, positive_number

if TYPE_CHECKING:
    from hllm_torchrec.serving.load_test import LoadResult


def rates(text: str) -> list[float]:
    """Parse rates separated by commas, for argparse."""
    return [positive_number(part) for part in text.split(",")]


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm loadtest", description=__doc__)
    parser.add_argument(
        "--url", default="http://127.0.0.1:8400", help="URL of the service (default: http://127.0.0.1:8400)"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the service's bearer token, as for hllm serve"
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        metavar="DIR",
        help="dataset whose users send the requests and whose items are the candidates",
    )
    parser.add_argument("--rates", type=rates, default=[20.0], metavar="R,R", help="requests per second (default: 20)")
    parser.add_argument(
        "--seconds", type=positive_number, default=20.0, help="duration at each rate, in seconds (default: 20)"
    )
    parser.add_argument(
        "--candidates", type=positive, default=200, metavar="N", help="candidates per request (default: 200)"
    )
    parser.add_context()
    parser.add_argument("--users", type=positive, metavar="N", help="number of users who send requests (default: all)")
    parser.add_argument(
        "--zipf",
        type=float,
        default=1.0,
        metavar="S",
        help="user k = 1, 2, ... sends a share of the requests proportional to k^-S (default: 1)",
    )
    parser.add_argument(
        "--p99",
        type=positive_number,
        default=50.0,
        metavar="MS",
        help="largest p99 in milliseconds at which a rate counts towards the capacity (default: 50)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="random seed of the requests (default: 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for loadtest.json and loadtest.png")
    return parser


def run(args: argparse.Namespace) -> None:
    """Warm up the service, send requests at each rate, print the results, and write the files.

    Raises:
        ValueError: the dataset does not exist, or no service answers at the URL.
    """
    from hllm_torchrec.common.machine import machine_info
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.launch.serve import import_uvicorn

    import_uvicorn()
    from hllm_torchrec.common.token_file import read_token
    from hllm_torchrec.serving.load_test import as_json

    token = read_token(args.token_file, "localhost")
    dataset = Dataset.open(args.dataset)
    users = dataset.users["raw_user_id"].drop_null().to_pylist()  # the raw id of a forgotten user is null
    items = dataset.items["raw_item_id"].drop_null().to_pylist()
    results = asyncio.run(_load(args, users[: args.users], items, token))
    facts = {name: getattr(args, name) for name in ("seconds", "candidates", "zipf", "seed")}
    facts |= {"users": len(users[: args.users]), "dataset": dataset.name, "machine": machine_info()}
    report = as_json(results, facts, args.p99)
    rate = report["capacity"]["rate"]
    met = "no rate meets it" if rate is None else f"{rate:g} requests/s"
    say(f"capacity, at a p99 of {args.p99:g} ms: {met}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "loadtest.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _plot(results, args.output / "loadtest.png")


async def _load(args: argparse.Namespace, users: list[str], items: list[str], token: str | None) -> list["LoadResult"]:
    from hllm_torchrec.serving.load_test import HttpClient, draw_arrivals, run_load, score_bodies

    client, results = HttpClient(args.url, token), []
    try:
        status, _ = await client.request("GET", "/readyz")
    except (OSError, EOFError):
        status = 0
    if status != 200:
        raise ValueError(f"--url {args.url}: no service is ready there (status {status}); start one with `hllm serve`")
    for number, rate in enumerate(args.rates):
        arrivals = draw_arrivals(rate, args.seconds, len(users), args.zipf, args.seed + number)
        bodies = score_bodies(users, items, arrivals, args.candidates, args.seed, args.context)
        if number == 0:  # warm-up: the first requests of a process compile and allocate
            for body in bodies[:20]:
                await client.post_score(body)
        before = await client.cache_counts()
        result = await run_load(client.post_score, bodies, arrivals, rate)
        hits, misses = (now - then for now, then in zip(await client.cache_counts(), before, strict=True))
        results.append(replace(result, hit_rate=hits / max(hits + misses, 1)))
        say(_line(results[-1]))
        if client.refusal:
            say(f"the first refused request: {client.refusal}")
            client.refusal = ""
    client.close()
    return results


def _line(result: "LoadResult") -> str:
    latencies = ", ".join(f"{name} {value:.1f}" for name, value in result.latency_ms.items())
    hits = "" if result.hit_rate is None else f"; states found {result.hit_rate:.0%}"
    return f"{result.rate:g}/s: {result.throughput:.1f} answered/s, ms: {latencies}{hits}; statuses {result.statuses}"


def _plot(results: list["LoadResult"], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in results[0].latency_ms:
        axes.plot([r.rate for r in results], [r.latency_ms[name] for r in results], marker="o", label=name)
    axes.set(xlabel="requests per second (Poisson arrivals)", ylabel="latency in ms", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
