"""`hllm evaluate`: AUC and more of a run's checkpoint or of prediction files, models compared on the same exposures.

    hllm evaluate --run-dir runs/quickstart --compare runs/baselines/item_mean runs/baselines/running_bias
    hllm evaluate --predictions new=new.parquet old=old.parquet --slices country --output runs/comparison
    hllm evaluate --predictions both=scores.csv --score both=score_new --memory 4G --output runs/new
    hllm evaluate --run-dir runs/nightly --baseline accepted/metrics.json --max-drop 0.001
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.evaluate --run-dir runs/quickstart

A run gets predictions/<split>/, metrics.json (metrics-valid.json for the validation part), report.html and
TensorBoard's scalars; without a run they go to --output. Every other model is compared with the run's, or
without a run with the first one named. docs/evaluation.md says what the numbers are.

exit status: 0; 2 after a message on a mistake; with --baseline 3 if the AUC dropped by more than --max-drop, 4 if it
did but chance may explain it.
"""

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm_torchrec.launch.entry import CommandParser, run_job
from hllm_torchrec.launch.evaluate_options import add_arguments, describe, files_provenance, is_own_format

if TYPE_CHECKING:
    from hllm_torchrec.evaluation.regression_gate import Verdict
    from hllm_torchrec.evaluation.sanity_checks import Overlap


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="hllm evaluate", description=__doc__)
    parser.add_argument(
        "--run-dir",
        "--run",
        dest="run",
        type=Path,
        metavar="DIR",
        help="run directory of hllm train, or its URL; --run is the same, but torchrun has an option of that name",
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
        "--predictions",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="the same with names of your choice, or files of predictions of any origin (Parquet, CSV)",
    )
    parser.add_argument("--output", type=Path, help="where metrics and report go (default: the run)")
    parser.add_argument(
        "--draws", type=int, default=1000, help="resamples for the intervals over users, 0: none (default: 1000)"
    )
    parser.add_argument("--no-tensorboard", action="store_true", help="write no scalars for TensorBoard")
    gate = parser.add_argument_group("regression gate")
    gate.add_argument("--baseline", metavar="FILE", help="a metrics.json of the same rows, or the name of a model here")
    gate.add_argument("--max-drop", type=float, default=0.0, help="largest drop of AUC allowed (default: 0)")
    gate.add_argument(
        "--on-unsure", choices=("fail", "pass"), default="fail", help="if chance may explain the drop (default: fail)"
    )
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 after a message on a mistake of the user's, or the gate's."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_job(parser.prog, lambda: _status_of(run(args), args.on_unsure))


def _status_of(verdict: "Verdict | None", on_unsure: str) -> int:
    if verdict is None or (verdict.status == "unsure" and on_unsure == "pass"):
        return 0
    return verdict.exit_status


def run(args: argparse.Namespace) -> "Verdict | None":
    """Score, compare, write and print; the gate's verdict if a baseline is named.

    Raises:
        ValueError: nothing to evaluate, or what is named is not there or does not fit.
    """
    named = named_paths(args.compare, args.predictions)
    if args.run is None and not named:
        raise ValueError("nothing to evaluate: name a run (--run-dir) or predictions (--compare, --predictions)")
    own_name = None if args.run is None else args.run.resolve().name
    others = _predictions_of(named, args.split) if args.run is not None else {}
    if own_name in named:
        raise ValueError(
            f"--run-dir {args.run}: another model has the name {own_name!r}; give it one with --predictions NAME=DIR"
        )
    if args.baseline and not Path(args.baseline).is_file() and args.baseline not in [own_name, *named]:
        raise ValueError(f"--baseline {args.baseline} is neither a file nor a compared model; name a metrics.json")
    from hllm_torchrec.distributed.coordination import run_on_rank_zero

    if args.run is not None:
        return _evaluate_run(args, others)
    found = {name: _predictions_in(path, args.split) or path for name, path in named.items()}
    if args.compare or is_own_format(found, args):
        found = _predictions_of(named, args.split)
        return _run_of_ranks(
            lambda: run_on_rank_zero(lambda: write_results(args, measure_models(args, found, None, None)))
        )
    return _run_of_ranks(lambda: _evaluate_files(args, found))


def _run_of_ranks(job: Callable[[], "Verdict | None"]) -> "Verdict | None":
    """The job as a rank of torchrun; alone if there are none, which saves seconds of imports."""
    if "RANK" not in os.environ:
        return job()
    from hllm_torchrec.distributed.process_group import distributed_device

    with distributed_device():
        return job()


def _evaluate_run(args: argparse.Namespace, others: dict[str, Path]) -> "Verdict | None":
    """Score the run's checkpoint on all ranks and compare it on the first."""
    from hllm_torchrec.checkpoint.remote_runs import RunStorage, local_run
    from hllm_torchrec.common.urls import url_of
    from hllm_torchrec.distributed.coordination import run_on_rank_zero
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.run_loader import run_config, score_run

    run_config(args.run)  # so that a mistake shows before ranks meet
    place = RunStorage(local_run(args.run), url_of(args.run))
    with distributed_device() as device:
        scores = score_run(args.run, args.split, args.checkpoint, device)
        args.run = place.folder
        own = {args.run.resolve().name: scores.predictions} if scores.predictions else {}
        verdict = run_on_rank_zero(
            lambda: write_results(
                args, measure_models(args, own | others, scores.retrieval, scores.provenance), scores.overlap
            )
        )
        place.publish()
        return verdict


def _evaluate_files(args: argparse.Namespace, paths: Mapping[str, Path]) -> "Verdict | None":
    """Measure files of predictions on all ranks."""
    from hllm_torchrec.common.machine import machine_info
    from hllm_torchrec.distributed.array_collectives import gather_objects
    from hllm_torchrec.distributed.coordination import run_on_rank_zero, world_size
    from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
    from hllm_torchrec.evaluation.prediction_rows import PredictionRows, known_items
    from hllm_torchrec.evaluation.sanity_checks import file_overlap

    models, layout = describe(paths, args)
    settings = EvaluationSettings(args.split, args.memory, args.draws, spill=args.spill)
    with tempfile.TemporaryDirectory(prefix="hllm-files-", dir=args.spill) as folder:
        warm = known_items(args.train, layout.item, Path(folder)) if args.train and layout.item else None
        metrics = evaluate_predictions(PredictionRows(models, layout, Path(folder), warm), settings)
        metrics["memory"]["peak"] = max(gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)) * 1024

        def write() -> "Verdict | None":
            metrics["provenance"] = {
                "files": files_provenance(models),
                "columns": {name: value for name, value in vars(layout).items() if value},
                "world": world_size(),
                "machine": machine_info(),
            }
            overlap = None
            if args.train:
                overlap = file_overlap(models[0].files, args.train, layout, args.memory, Path(folder))
            return write_results(args, metrics | {"retrieval": None}, overlap)

        return run_on_rank_zero(write)


def named_paths(compared: list[Path], named: list[str]) -> dict[str, Path]:
    """Model -> what was named for it.

    Raises:
        ValueError: two models of one name, or a name without a path.
    """
    pairs = [(path.resolve().name, path) for path in compared]
    for entry in named:
        name, equals, place = entry.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--predictions {entry}: must be NAME=PATH")
        pairs.append((name, Path(place)))
    found: dict[str, Path] = {}
    for name, path in pairs:
        if name in found:
            raise ValueError(f"two models are named {name!r}; give one a name with --predictions NAME=PATH")
        found[name] = path
    return found


def _predictions_of(named: Mapping[str, Path], split: str) -> dict[str, Path]:
    """Model -> directory of its predictions of the split.

    Raises:
        ValueError: a directory without predictions.
    """
    found = {}
    for name, path in named.items():
        directory = _predictions_in(path, split)
        if directory is None:
            raise ValueError(
                f"{path} has no predictions: no part-*.parquet in {path / 'predictions' / split} or in itself; "
                f"`hllm baselines` and `hllm evaluate --run-dir ... --split {split}` write them"
            )
        found[name] = directory
    return found


def _predictions_in(directory: Path, split: str) -> Path | None:
    candidates = (directory / "predictions" / split, directory)
    return next((candidate for candidate in candidates if any(candidate.glob("part-*.parquet"))), None)


def measure_models(
    args: argparse.Namespace,
    models: dict[str, Path],
    retrieval: dict[str, Any] | None,
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of metrics.json; the first model is the one the others are compared with."""
    from hllm_torchrec.common.machine import machine_info
    from hllm_torchrec.evaluation.metrics_schema import retrieval_alone
    from hllm_torchrec.evaluation.model_comparison import compare

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
    return retrieval_alone(args.split, retrieval, provenance)


def write_results(
    args: argparse.Namespace, metrics: dict[str, Any], overlap: "Overlap | None" = None
) -> "Verdict | None":
    """Judge, print, and write metrics and report into the output directory, if there is one."""
    from hllm_torchrec.evaluation.regression_gate import compare_with_baseline
    from hllm_torchrec.evaluation.report import write_report
    from hllm_torchrec.evaluation.sanity_checks import metric_warnings
    from hllm_torchrec.evaluation.sinks import track_metrics, write_json, write_tensorboard

    verdict = compare_with_baseline(metrics, args.baseline, args.max_drop) if args.baseline else None
    metrics["cautions"] = metric_warnings(metrics, overlap)
    metrics["overlap"] = None if overlap is None else vars(overlap)
    metrics["gate"] = None if verdict is None else verdict.as_json(args.baseline, args.max_drop)
    print(summary(metrics), flush=True)
    output, artifacts = args.output or args.run, {}
    if output is not None:
        name = "metrics.json" if args.split == "test" else f"metrics-{args.split}.json"
        write_json(metrics, output / name)
        artifacts["metrics"] = output / name
        if args.split == "test":
            artifacts["report"] = write_report(output)
        if not args.no_tensorboard:
            write_tensorboard(metrics, output / "tensorboard", int(metrics["provenance"].get("step", 0)))
    for kind, path in artifacts.items():
        print(f"{kind}: {path}")
    track_metrics(metrics, artifacts)
    if verdict is not None:
        print(f"gate: {verdict.text}", flush=True)
    return verdict


def summary(metrics: dict[str, Any]) -> str:
    """What is printed: the table of models, and the retrieval metrics."""
    from hllm_torchrec.evaluation.model_comparison import format_number, metrics_table

    lines = [metrics_table(metrics)] if metrics["models"] else []
    retrieval = metrics["retrieval"]
    if retrieval:
        shown = {name: value for name, value in retrieval.items() if name.startswith(("recall", "ndcg", "mrr"))}
        values = ", ".join(f"{name} {format_number(value)}" for name, value in shown.items())
        targets = "events" if retrieval.get("targets") == "all" else "positive exposures"
        lines.append(f"{metrics['split']}, whole catalogue, {retrieval['rows']:,} {targets}: {values}")
    lines += [f"caution: {text}" for text in metrics.get("cautions", [])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
