"""`hllm creatives`: builds, imports and prints tables of personalized texts, and evaluates a run on them.

hllm creatives build --dataset data/ml-100k --writer template --name lines
hllm creatives build --dataset data/ml-100k --writer openai --base-url http://localhost:8000/v1 --model M --name titles
hllm creatives import --source hllm_creator --files train.parquet --dataset data/books --name published
hllm creatives info --dataset data/ml-100k --name lines
hllm creatives show --dataset data/ml-100k --name lines --split test --rows 5
hllm creatives evaluate --run runs/creator/ml100k --split test
hllm creatives titles --creatives stores/titles --item 50 --user 196
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.creatives_build import add_build_options, run_build
from hllm_torchrec.launch.creatives_import import add_import_options, run_import
from hllm_torchrec.launch.entry import CommandParser, entry_point, natural

if TYPE_CHECKING:
    from hllm_torchrec.evaluation.creative_scores import CreativeVectors
    from hllm_torchrec.models.experiment import Experiment


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm creatives", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{build,import,info,show,evaluate,titles}")
    build = actions.add_parser("build", help="write a table: <dataset>/creatives/<name>")
    add_build_options(build)
    importer = actions.add_parser("import", help="write a table of texts that were made elsewhere")
    add_import_options(importer)
    info = actions.add_parser("info", help="print a table's counts and origin")
    show = actions.add_parser("show", help="print rows of a table")
    show.add_argument("--split", choices=("train", "valid", "test"), default="test", help="part (default: test)")
    show.add_argument("--dropped", action="store_true", help="rows that were left out, with the reasons")
    show.add_argument("--rows", type=natural, default=10, help="number of rows (default: 10)")
    evaluate = actions.add_parser(
        "evaluate", help="print the likelihoods of texts under a run, given their own user, no user, or another user"
    )
    evaluate.add_argument("--run", type=Path, required=True, metavar="DIR", help="run that was trained on a table")
    evaluate.add_argument("--checkpoint", default="best", help="best (default), latest, or a checkpoint's folder")
    evaluate.add_argument("--split", choices=("train", "valid", "test"), default="test", help="part (default: test)")
    evaluate.add_argument(
        "--most", type=natural, default=0, help="score at most this many texts, spaced evenly (default: all)"
    )
    evaluate.add_argument(
        "--clusters",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="also evaluate with the centers of these clusters (hllm cluster) in place of the users",
    )
    evaluate.add_argument(
        "--users", type=natural, default=0, metavar="N", help="rank the right user of N texts among 100 users"
    )
    evaluate.add_argument(
        "--write", type=natural, default=0, metavar="N", help="generate N texts and compare them with the references"
    )
    evaluate.add_argument(
        "--titles",
        type=Path,
        metavar="DIR",
        help="also measure the diversity of the titles in this folder of hllm create",
    )
    evaluate.add_argument(
        "--lamp", type=Path, metavar="FILE", help="write predictions in the format of LaMP to this file"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    titles = actions.add_parser("titles", help="print the titles of an item that hllm create wrote")
    titles.add_argument("--creatives", type=Path, required=True, metavar="DIR", help="folder of hllm create")
    titles.add_argument("--item", required=True, metavar="RAW", help="raw item id")
    titles.add_argument("--user", metavar="RAW", help="raw user id: this user's title alone")
    for action in (build, importer, info, show):
        action.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="prepared dataset")
        action.add_argument("--name", required=True, help="name of the table")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ValueError: the dataset, the table, the run or an option is not usable.
    """
    act = {
        "build": run_build,
        "import": run_import,
        "info": _info,
        "show": _show,
        "evaluate": _evaluate,
        "titles": _titles,
    }[args.action]
    act(args)


def _info(args: argparse.Namespace) -> None:
    from hllm_torchrec.data.creative_table import CreativeTable
    from hllm_torchrec.data.dataset import Dataset

    manifest = CreativeTable.open(Dataset.open(args.dataset), args.name).manifest
    for split, count in manifest["counts"].items():
        say(f"{split:<6} {count:>10,} texts of {manifest['users'][split]:,} users")
    for reason, count in manifest.get("left_out", {}).items():
        say(f"left out: {count:,}: {reason}")
    say(f"writer: {manifest.get('writer', 'unknown')}")


def _show(args: argparse.Namespace) -> None:
    from hllm_torchrec.data.creative_table import CreativeTable
    from hllm_torchrec.data.dataset import Dataset

    table = CreativeTable.open(Dataset.open(args.dataset), args.name)
    rows = table.dropped() if args.dropped else table.part(args.split).rows
    if not len(rows):
        say("nothing was left out" if args.dropped else f"{args.split}: no texts")
    for row in rows.slice(0, args.rows).to_pylist():
        why = f" [{'; '.join(row['reasons'])}]" if args.dropped else ""
        say(f"user {row['raw_user_id']}, item {row['raw_item_id']}: {row['response']}{why}")


def _evaluate(args: argparse.Namespace) -> None:
    from hllm_torchrec.creative.clusters import Clusters
    from hllm_torchrec.creative.metrics import centers_of, described, summarize
    from hllm_torchrec.creative.text_metrics import describe_titles
    from hllm_torchrec.creative.titles import Creatives
    from hllm_torchrec.creative.written_texts import written_texts
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.creative_scores import creative_vectors, score_creatives
    from hllm_torchrec.evaluation.run_loader import load_run, run_config
    from hllm_torchrec.evaluation.user_retrieval import rank_metrics, user_ranks
    from hllm_torchrec.serving.scorer_loading import in_one_process

    if not run_config(args.run).creative.enabled:
        raise ValueError(f"--run {args.run}: was trained without texts (creative.enabled is false); name one on texts")
    clusters = [Clusters.open(path) for path in args.clusters]
    titles = None if args.titles is None else describe_titles(Creatives.open(args.titles))
    with distributed_device() as device:
        # Each rank generates its share of the texts independently, for which it needs the complete weights.
        config = in_one_process(run_config(args.run)) if args.write or args.lamp is not None else None
        loaded = load_run(args.run, args.checkpoint, device, config)
        experiment = loaded.experiment
        task = None if args.lamp is None else _lamp_task(experiment)
        # The catalogue is encoded once for all conditions.
        with loaded.weights, experiment.evaluation_items():
            vectors = creative_vectors(experiment, args.split)
            centers = centers_of(vectors, clusters, loaded.fingerprint)
            found = summarize(score_creatives(experiment, args.split, given=centers, vectors=vectors, most=args.most))
            if args.users:
                found["users_among"] = rank_metrics(*user_ranks(experiment, vectors, args.users))
            if args.write:
                found["written"] = written_texts(experiment, vectors, centers, args.write)
            if task is not None:
                _write_predictions(args.lamp, task, experiment, vectors)
        if titles is not None:
            found["titles"] = titles
        if rank() != 0:
            return
    if args.json:
        say(json.dumps(found))
        return
    say(f"{found['creatives']:,} texts of {found['users']:,} users of {args.split}, nats per text (per token)")
    for name, nats in found["nll"].items():
        say(f"  {name:<12} {nats:8.4f}  ({found['nll_per_token'][name]:.4f})")
    for name, one in found["differences"].items():
        say(f"  {name:<20} {one['mean']:8.4f}  95% over users [{one['interval'][0]:.4f}, {one['interval'][1]:.4f}]")
    for line in described(found):
        say(line)


def _lamp_task(experiment: "Experiment") -> str:
    from hllm_torchrec.creative.imports.lamp import task_of
    from hllm_torchrec.data.creative_table import CreativeTable

    table = CreativeTable.open(experiment.dataset, experiment.config.creative.data)
    return task_of(str(table.manifest.get("writer")))


def _write_predictions(file: Path, task: str, experiment: "Experiment", vectors: "CreativeVectors") -> None:
    from hllm_torchrec.common.atomic_files import replace_file
    from hllm_torchrec.creative.imports.lamp import predictions
    from hllm_torchrec.creative.written_texts import texts_of_part
    from hllm_torchrec.distributed.coordination import rank

    found = predictions(task, texts_of_part(experiment, vectors))
    if rank() == 0:
        replace_file(file, json.dumps(found, indent=1))


def _titles(args: argparse.Namespace) -> None:
    from hllm_torchrec.common.errors import did_you_mean
    from hllm_torchrec.creative.titles import Creatives

    creatives = Creatives.open(args.creatives)
    found = creatives.of_item(args.item)
    if not found:
        hint = did_you_mean(args.item, creatives.titles["raw_item_id"].unique().to_pylist())
        raise ValueError(f"--item {args.item}: {args.creatives} has no titles of it{hint}")
    if args.user is not None:
        found = [creatives.get(args.user, args.item)]
    for one in found:
        whom = "everybody" if one.cluster < 0 else f"cluster {one.cluster}"
        say(f"{whom}: {one.text}" + " (the item's own text)" * one.fallback)


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
