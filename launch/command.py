"""What the jobs' command lines have in common: mistakes of the user's are one line and exit status 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_job(prog: str, job: Callable[[], None]) -> int:
    """Run `job`; return the exit status: 0, or 2 after the message of an error that the user can mend."""
    try:
        job()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
