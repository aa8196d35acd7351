"""Trains and evaluates the models of docs/results.md on several datasets, with one command for each task.

    python scripts/experiments/benchmark.py --task retrieval --sets data/steam data/office --output runs/benchmark
    python scripts/experiments/benchmark.py --task ranking --help

It calls `benchmark_retrieval.py` or `benchmark_ranking.py`; both continue an interrupted run and write JSON.
"""

import argparse
import importlib
import sys


def main() -> int:
    """Run the script of the task with the other arguments."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--task", choices=("retrieval", "ranking"), required=True)
    options, rest = parser.parse_known_args()
    return int(importlib.import_module(f"benchmark_{options.task}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
