"""`hllm report --run DIR`: rewrites `report.html` from the run's metrics, log and configuration."""

import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, run_job


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after the message of a user error."""
    parser = CommandParser(prog="hllm report", description=__doc__)
    parser.add_run(checkpoint=False)
    run = parser.parse_args(argv).run
    return run_job(parser.prog, lambda: write(run))


def write(run: Path) -> None:
    """Write the report, and print its path.

    Raises:
        ValueError: see `write_report`.
    """
    from hllm_torchrec.evaluation.report import write_report  # matplotlib and torch: not for --help

    say(f"report: {write_report(run)}")


if __name__ == "__main__":
    sys.exit(main())
