"""`hllm evaluate`: scores a split with a run's checkpoint, and compares models on the same exposures.

    hllm evaluate --run runs/quickstart --compare runs/baselines/item_mean runs/baselines/running_bias
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.evaluate --run-dir runs/quickstart
    hllm evaluate --predictions mine=exports/mine theirs=exports/theirs --output runs/comparison

The run gets predictions/<split>/, metrics.json (metrics-valid.json for the validation part) and report.html.
Every other model is compared with the run's, or without a run with the first one named.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hllm_torchrec.launch.command import CommandParser, run_job


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="hllm evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        "--run-dir",
        dest="run",
        type=Path,
        metavar="DIR",
        help="run directory of hllm train; behind torchrun write --run-dir: it takes --run for one of its own",
    )
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="default: test")
    parser.add_argument(
        "--checkpoint", default="best", help="best (on validation; the default), latest, or a directory"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="run directories, baselines' directories or directories of predictions, named by their folder",
    )
    parser.add_argument(
        "--predictions", nargs="+", default=[], metavar="NAME=DIR", help="the same with names of your choice"
    )
    parser.add_argument("--output", type=Path, help="where metrics and report go (default: the run)")
    parser.add_argument(
        "--draws", type=int, default=1000, help="resamples for the intervals over users (default: 1000)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after a message on a mistake of the user's."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_job(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Score, compare, write and print.

    Raises:
        ValueError: nothing to evaluate, or what is named is not there or does not fit.
    """
    others = named_directories(args.compare, args.predictions, args.split)
    if args.run is None and not others:
        raise ValueError("nothing to evaluate: name a run (--run) or predictions (--compare, --predictions)")
    if args.run is not None and args.run.resolve().name in others:
        raise ValueError(
            f"--run {args.run}: another model has the name {args.run.resolve().name!r}; give it one with "
            "--predictions NAME=DIR"
        )
    from hllm_torchrec.offline import run_config, score_run
    from hllm_torchrec.parallelize import start_process, stop_process
    from hllm_torchrec.ranks import on_rank_zero

    if args.run is None:
        finish(args, others, None, None)
        return
    run_config(args.run)  # so that a mistake shows before ranks meet
    device = start_process()
    try:
        scores = score_run(args.run, args.split, args.checkpoint, device)
        own = {args.run.resolve().name: scores.predictions} if scores.predictions else {}
        on_rank_zero(lambda: finish(args, own | others, scores.retrieval, scores.provenance))
    finally:
        stop_process()


def named_directories(compared: list[Path], named: list[str], split: str) -> dict[str, Path]:
    """Model -> directory of its predictions of the split.

    Raises:
        ValueError: two models of one name, a name without directory, or a directory without predictions.
    """
    pairs = [(path.resolve().name, path) for path in compared]
    for entry in named:
        name, equals, directory = entry.partition("=")
        if not (name and equals and directory):
            raise ValueError(f"--predictions {entry}: must be NAME=DIR")
        pairs.append((name, Path(directory)))
    found: dict[str, Path] = {}
    for name, path in pairs:
        if name in found:
            raise ValueError(f"two models are named {name!r}; give one a name with --predictions NAME=DIR")
        found[name] = _predictions_in(path, split)
    return found


def _predictions_in(directory: Path, split: str) -> Path:
    candidates = (directory / "predictions" / split, directory)
    for candidate in candidates:
        if any(candidate.glob("part-*.parquet")):
            return candidate
    raise ValueError(
        f"{directory} has no predictions: no part-*.parquet in {candidates[0]} or in itself; `hllm baselines` "
        f"and `hllm evaluate --run ... --split {split}` write them"
    )


def finish(
    args: argparse.Namespace,
    models: dict[str, Path],
    retrieval: dict[str, Any] | None,
    provenance: dict[str, Any] | None,
) -> None:
    """Write metrics and report into the output directory, if there is one, and print the table."""
    from hllm_torchrec.report import write_report

    metrics = measure(args, models, retrieval, provenance)
    print(summary(metrics), flush=True)
    output = args.output or args.run
    if output is None:
        return
    name = "metrics.json" if args.split == "test" else f"metrics-{args.split}.json"
    output.mkdir(parents=True, exist_ok=True)
    beside = output / f"{name}.tmp"
    beside.write_text(json.dumps(metrics, indent=1, allow_nan=False))
    beside.replace(output / name)
    print(f"metrics: {output / name}")
    if args.split == "test":
        print(f"report: {write_report(output)}")


def measure(
    args: argparse.Namespace,
    models: dict[str, Path],
    retrieval: dict[str, Any] | None,
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of metrics.json; the first model is the one the others are compared with."""
    from hllm_torchrec.logs import machine_info
    from hllm_torchrec.metrics.compare import SCHEMA_VERSION, compare

    provenance = provenance or {"machine": machine_info()}
    if models:
        return compare(
            models,
            next(iter(models)),
            split=args.split,
            draws=args.draws,
            retrieval=retrieval,
            provenance=provenance | {"predictions": {name: str(path) for name, path in models.items()}},
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "split": args.split,
        "models": {},
        "retrieval": retrieval,
        "provenance": provenance,
    }


def summary(metrics: dict[str, Any]) -> str:
    """What is printed: the table of models, and the retrieval metrics."""
    from hllm_torchrec.metrics.compare import number, table

    lines = [table(metrics)] if metrics["models"] else []
    retrieval = metrics["retrieval"]
    if retrieval:
        shown = {name: value for name, value in retrieval.items() if name.startswith(("recall", "ndcg", "mrr"))}
        values = ", ".join(f"{name} {number(value)}" for name, value in shown.items())
        lines.append(f"{metrics['split']}, whole catalogue, {retrieval['rows']:,} positive exposures: {values}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
