"""`hllm evaluate`: metrics of a run's checkpoint or of prediction files, and comparisons on the same exposures.

    hllm evaluate --run-dir runs/quickstart --compare runs/baselines/item_mean runs/baselines/running_bias
    hllm evaluate --predictions new=new.parquet old=old.parquet --slices country --output runs/comparison
    hllm evaluate --predictions both=scores.csv --score both=score_new --memory 4G --output runs/new
    hllm evaluate --run-dir runs/nightly --baseline accepted/metrics.json --max-drop 0.001
    hllm evaluate --run-dir runs/yesterday --dataset data/today --output runs/yesterday/on-today
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.evaluate --run-dir runs/quickstart

The job writes the run's predictions/<split>/ into the run directory. It writes metrics.json (metrics-<split>.json for
parts other than test), report.html (test part only) and TensorBoard scalars into --output (default: the run directory;
with neither a run nor --output it only prints the metrics). All other models are compared with the run or, without a
run, with the first model. docs/evaluation.md defines the metrics.

exit status: 0; 2 after a user error; with --baseline 3 if a judged metric (AUC; GAUC and tasks on request) dropped by
more than allowed, 4 if it dropped by more but chance may explain it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point
from hllm_torchrec.launch.evaluate_options import (
    add_arguments,
    check_paths,
    describe,
    files_provenance,
    is_own_format,
    refuse_without_effect,
)

if TYPE_CHECKING:
    import numpy as np

    from hllm_torchrec.evaluation.regression_gate import Verdict
    from hllm_torchrec.evaluation.sanity_checks import Overlap


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm evaluate", description=__doc__)
    parser.add_run(required=False)
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="part to evaluate (default: test)"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="run directories, directories of baselines or of predictions; models are named by their folder",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="like --compare, with names of your choice; or prediction files of any origin (Parquet, CSV)",
    )
    parser.add_argument("--output", type=Path, help="directory for metrics and report (default: the run)")
    parser.add_argument(
        "--draws", type=int, default=1000, help="resamples for the intervals over users, 0: none (default: 1000)"
    )
    parser.add_argument("--no-tensorboard", action="store_true", help="do not write TensorBoard scalars")
    gate = parser.add_argument_group("regression gate")
    gate.add_argument(
        "--baseline", metavar="FILE", help="a metrics.json for the same rows, or the name of a compared model"
    )
    gate.add_argument("--max-drop", type=float, help="largest drop of AUC allowed (default: 0)")
    gate.add_argument("--max-gauc-drop", type=float, help="judge GAUC, too: largest drop allowed (default: AUC alone)")
    gate.add_argument(
        "--max-task-drop",
        nargs="+",
        metavar="TASK=DROP",
        help="judge further tasks, too: largest drop of AUC (of XAUC for numbers) allowed for each (docs/tasks.md)",
    )
    gate.add_argument(
        "--on-unsure", choices=("fail", "pass"), help="verdict if chance may explain the drop (default: fail)"
    )
    add_arguments(parser)
    return parser


def _status_of(verdict: "Verdict | None", on_unsure: str | None) -> int:
    if verdict is None or (verdict.status == "unsure" and on_unsure == "pass"):
        return 0
    return verdict.exit_status


def run(args: argparse.Namespace) -> "Verdict | None":
    """Score the run, compare the models, write and print the metrics; return the gate's verdict if there is a baseline.

    Raises:
        ValueError: there is nothing to evaluate; or an argument names a path that does not exist, does not fit the
            other arguments, or has no effect.
    """
    check_paths(args)
    named = named_paths(args.compare, args.predictions)
    if args.run is None and not named:
        raise ValueError("nothing to evaluate: name a run (--run-dir) or predictions (--compare, --predictions)")
    own_name = None if args.run is None else args.run.resolve().name
    others = _predictions_of(named, args.split) if args.run is not None else {}
    if own_name in named:
        raise ValueError(
            f"--run-dir {args.run}: another model has the name {own_name!r}; rename that model by "
            "--predictions NAME=DIR"
        )
    if args.baseline and not Path(args.baseline).is_file() and args.baseline not in [own_name, *named]:
        raise ValueError(f"--baseline {args.baseline} is neither a file nor a compared model; name a metrics.json")
    if args.run is not None:
        return _evaluate_run(args, others)
    refuse_without_effect(args, ranks_exposures=True)
    found = {name: _predictions_in(path, args.split) or path for name, path in named.items()}
    # Files written by this library are matched by user and position; files of other origin by row order.
    paired = bool(args.compare) or is_own_format(found)
    if paired:
        found = _predictions_of(named, args.split)
    return _run_of_ranks(lambda: _publish(args, args.output, *_measure(args, found, paired, {})))


def _run_of_ranks(job: Callable[[], "Verdict | None"]) -> "Verdict | None":
    """Run the job as a rank of torchrun; without torchrun, create no process group, which saves seconds of imports."""
    if "RANK" not in os.environ:
        return job()
    from hllm_torchrec.distributed.process_group import distributed_device

    with distributed_device():
        return job()


def _evaluate_run(args: argparse.Namespace, others: dict[str, Path]) -> "Verdict | None":
    """Score the run's checkpoint, and evaluate its predictions together with the others, on all ranks."""
    from hllm_torchrec.checkpoint.remote_runs import RunStorage, local_run
    from hllm_torchrec.common.urls import url_of
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.metrics_schema import retrieval_alone
    from hllm_torchrec.evaluation.run_loader import run_config, score_run, training_overlap

    config = run_config(args.run, args.dataset)  # report errors before the ranks connect
    refuse_without_effect(args, ranks_exposures=config.objective.fusion != "none" or bool(others))
    storage = RunStorage(local_run(args.run), url_of(args.run))
    with distributed_device() as device:
        scores = score_run(args.run, args.split, args.checkpoint or "best", device, args.dataset)
        own = {storage.folder.resolve().name: scores.predictions} if scores.predictions else {}
        overlap = None
        if own or others:
            counts = scores.dataset.training_item_counts()
            metrics, overlap = _measure(args, own | others, True, scores.provenance, counts)
            metrics["retrieval"] = scores.retrieval
        else:
            metrics = retrieval_alone(args.split, scores.retrieval, scores.provenance)
        if scores.predictions and args.split != "train" and not args.train:
            overlap = training_overlap(scores.predictions, scores.trained_on)
        verdict = _publish(args, args.output or storage.folder, metrics, overlap)
        storage.publish()
        return verdict


def _measure(
    args: argparse.Namespace,
    paths: Mapping[str, Path],
    paired: bool,
    provenance: Mapping[str, Any],
    item_events: "np.ndarray | None" = None,
) -> "tuple[dict[str, Any], Overlap | None]":
    """Compute the content of metrics.json; all ranks read parts of the predictions. Collective.

    The first model is the reference of comparisons. paired: the predictions were written by jobs of this library, and
    rows are matched by user and position.

    Raises:
        ValueError: another job replaced predictions meanwhile, so that old and new rows could be mixed.
    """
    from hllm_torchrec.common.machine import machine_info
    from hllm_torchrec.distributed.coordination import run_on_rank_zero, world_size
    from hllm_torchrec.evaluation.model_comparison import evaluate_files
    from hllm_torchrec.evaluation.offline_evaluation import MEMORY, EvaluationSettings
    from hllm_torchrec.evaluation.prediction_files import unchanged_files

    memory = MEMORY if args.memory is None else args.memory
    settings = EvaluationSettings(args.split, memory, args.draws, spill=args.spill)
    with unchanged_files(paths.values()):
        models, layout = describe(paths, args)
        metrics, overlap = evaluate_files(
            models, layout, settings, paired=paired, train=args.train, item_events=item_events
        )
        columns = {name: value for name, value in vars(layout).items() if value and name != "tasks"}
        origin = {"columns": columns, "world": world_size(), "machine": machine_info()} | dict(provenance)
        if paired:
            origin["predictions"] = {name: str(path) for name, path in paths.items()}
        else:
            origin["files"] = run_on_rank_zero(lambda: files_provenance(models))
    return metrics | {"retrieval": None, "provenance": origin}, overlap


def _publish(
    args: argparse.Namespace, output: Path | None, metrics: dict[str, Any], overlap: "Overlap | None"
) -> "Verdict | None":
    """Call `write_results` on rank 0; return the verdict on all ranks. Collective."""
    from hllm_torchrec.distributed.coordination import run_on_rank_zero

    return run_on_rank_zero(lambda: write_results(args, output, metrics, overlap))


def named_paths(compared: list[Path], named: list[str]) -> dict[str, Path]:
    """Model name -> path, from the values of --compare and --predictions.

    Raises:
        ValueError: two models have the same name, or an entry is not NAME=PATH.
    """
    pairs = [(path.resolve().name, path) for path in compared]
    for entry in named:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--predictions {entry}: must be NAME=PATH")
        pairs.append((name, Path(path)))
    models: dict[str, Path] = {}
    for name, folder in pairs:
        if name in models:
            raise ValueError(f"two models are named {name!r}; rename one of them by --predictions NAME=PATH")
        models[name] = folder
    return models


def _predictions_of(named: Mapping[str, Path], split: str) -> dict[str, Path]:
    """Model name -> directory of its predictions of the split.

    Raises:
        ValueError: a path is a file, or a directory without predictions.
    """
    found = {}
    for name, path in named.items():
        directory = _predictions_in(path, split)
        if path.is_file():
            raise ValueError(
                f"{path} is a file: a run is compared with directories of predictions that jobs of this library wrote; "
                "compare files with each other, without a run"
            )
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


def write_results(
    args: argparse.Namespace, output: Path | None, metrics: dict[str, Any], overlap: "Overlap | None"
) -> "Verdict | None":
    """Compute the gate's verdict, print, and write metrics and report into the output directory, if any."""
    from hllm_torchrec.evaluation.regression_gate import judge
    from hllm_torchrec.evaluation.report import write_report
    from hllm_torchrec.evaluation.sanity_checks import metric_warnings
    from hllm_torchrec.evaluation.sinks import track_metrics, write_json, write_tensorboard

    artifacts: dict[str, Path] = {}
    limits = {"auc": args.max_drop or 0.0, "gauc": args.max_gauc_drop}
    verdict = judge(metrics, args.baseline, limits, _task_limits(args)) if args.baseline else None
    metrics["cautions"] = metric_warnings(metrics, overlap)
    metrics["overlap"] = None if overlap is None else vars(overlap)
    metrics["gate"] = None if verdict is None else verdict.as_json()
    say(summary(metrics))
    if output is not None:
        name = "metrics.json" if args.split == "test" else f"metrics-{args.split}.json"
        write_json(metrics, output / name)
        artifacts["metrics"] = output / name
        if args.split == "test":
            artifacts["report"] = write_report(output)
        if not args.no_tensorboard:
            write_tensorboard(metrics, output / "tensorboard", int(metrics["provenance"].get("step", 0)))
    for kind, path in artifacts.items():
        say(f"{kind}: {path}")
    track_metrics(metrics, artifacts)
    if verdict is not None:
        say(f"gate: {verdict.text}")
    return verdict


def _task_limits(args: argparse.Namespace) -> dict[str, float]:
    """Task -> largest allowed drop, from `--max-task-drop`. Raises ValueError for a malformed entry."""
    found = {}
    for entry in args.max_task_drop or ():
        task, equals, drop = entry.rpartition("=")
        try:
            found[task] = float(drop)
        except ValueError:
            equals = ""
        if not (task and equals):
            raise ValueError(f"--max-task-drop {entry}: must be TASK=DROP, such as like=0.002")
    return found


def summary(metrics: dict[str, Any]) -> str:
    """Printed summary: the table of models, the retrieval metrics, and warnings."""
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


main = entry_point(build_parser, lambda args: _status_of(run(args), args.on_unsure))

if __name__ == "__main__":
    sys.exit(main())
