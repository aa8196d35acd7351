"""Parser, entry point and exit statuses of all jobs. A user error is reported in one line with exit status 2."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.common.machine_errors import is_disk_full
from hllm_torchrec.common.terminal import say, show_logs_safely, shown
from hllm_torchrec.config.extensions import code_is_allowed

PREEMPTED = 75
"""Exit status of a run that stopped on request (sysexits.h: EX_TEMPFAIL, try again)."""
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

STATUSES = {
    0: "done",
    1: "another rank failed or was lost; store: a damaged file, an id without a vector; forget: something is left; "
    "plan: the model does not fit",
    2: "an error that you can fix, reported in one line: options, configuration, data, a full disk",
    3: "evaluate --baseline: a judged metric dropped by more than allowed; nightly: the gate refused the night's model",
    4: "evaluate --baseline: a judged metric dropped by more than allowed, but chance may explain it",
    PREEMPTED: "asked to stop (SIGTERM); the state is saved, resume: true continues; creatives build: a limit is "
    "reached, the same command continues",
    INTERRUPTED: "interrupted (Ctrl-C); training saves its state first, resume: true continues",
}
"""Exit statuses of all subcommands."""


def natural(text: str) -> int:
    """Parse a whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def positive_number(text: str) -> float:
    """Parse a finite number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def json_object(text: str) -> dict[str, Any]:
    """Parse an object in JSON, for argparse."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object; write it as \'{{"name": "value"}}\'')
    return found


class CommandParser(argparse.ArgumentParser):
    """Argument parser with one-line errors (without the usage) and unwrapped descriptions.

    output_may_be_url: True for a command that supports URLs as `--output`.
    """

    def __init__(self, *, output_may_be_url: bool = False, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self._output_may_be_url = output_may_be_url

    def add_run(self, *, required: bool = True, checkpoint: bool = True) -> None:
        """Add `--run`, `--allow-code`, `--checkpoint` and `--dataset`.

        `--run-dir` is an alias, because torchrun takes --run for an abbreviation of its own options.

        required: if False, `--run` is optional and the default of `--checkpoint` is None, which means best.
        checkpoint: if False, `--checkpoint` and `--dataset` are not added, for a job that does not load the model.
        """
        run_help = (
            "run directory of hllm train; under torchrun write --run-dir, because torchrun has an option --run-path"
        )
        self.add_argument("--run", "--run-dir", dest="run", type=Path, required=required, metavar="DIR", help=run_help)
        code_help = "import (and so execute) custom code (module:Name) that the run's configuration names"
        self.add_argument("--allow-code", action="store_true", help=code_help)
        if checkpoint:
            given = "best" if required else None
            self.add_argument("--checkpoint", default=given, help="best (the default), latest, or a directory")
            dataset_help = "dataset whose ids include the run's (default: the newest version of the run's dataset)"
            self.add_argument("--dataset", type=Path, metavar="DIR", help=dataset_help)

    def add_baselines(self, output: Path, names: Sequence[str], help: str) -> None:
        """Add `--dataset` with this help, `--output` and `--only`, for a job that runs the baselines `names`."""
        self.add_argument("--dataset", required=True, type=Path, help=help)
        output_help = f"directory with a folder per baseline (default: {output})"
        self.add_argument("--output", type=Path, default=output, help=output_help)
        only_help = f"some of {', '.join(names)} (default: all)"
        self.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=only_help)

    def add_context(self) -> None:
        """Add `--context`, the context of a request as a JSON object."""
        context_help = "context of the request: values of the dataset's context columns by name (null: unknown)"
        self.add_argument("--context", type=json_object, metavar="JSON", help=context_help)

    def add_fractions(self, train: float, valid: float, test: float, help: str) -> None:
        """Add `--fractions`, three shares with these defaults, which are appended to the help."""
        default, metavar = (train, valid, test), ("TRAIN", "VALID", "TEST")
        fractions_help = f"{help} (default: {train:g} {valid:g} {test:g})"
        self.add_argument("--fractions", nargs=3, type=float, default=default, metavar=metavar, help=fractions_help)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, shown(f"{self.prog}: error: {message}\n"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and reject a URL as `--output` unless the command supports it."""
        found, rest = super().parse_known_args(args, namespace)
        if self._output_may_be_url or getattr(found, "output", None) is None:
            return found, rest
        # The import of fsspec is slow, so it is only done if an argument contains a URL.
        if "://" in " ".join(sys.argv[1:] if args is None else args):
            from hllm_torchrec.common.urls import url_of

            if url := url_of(found.output):
                self.error(f"--output {url}: must be a folder of this machine; copy it to the URL afterwards")
        return found, rest


def refuse_options_of_others(
    args: argparse.Namespace, choice: str, chosen: str, options: Mapping[str, Sequence[str]]
) -> None:
    """Raise ValueError for an option that belongs only to other values of the option `choice`.

    chosen: key of the chosen value; options: value of `choice` -> its options, whose default is None.
    """
    for name in dict.fromkeys(name for names in options.values() for name in names):
        if getattr(args, name) is not None and name not in options[chosen]:
            owners = " and ".join(value for value, names in options.items() if name in names)
            given, shown_name = getattr(args, choice), name.replace("_", "-")
            raise ValueError(f"--{shown_name} belongs to --{choice} {owners}, not to {given}; leave it out")


class Main(Protocol):
    """Entry point of a job."""

    def __call__(self, argv: list[str] | None = None) -> int:
        """Run the command line `argv` (None: that of the process); return the exit status of `run_job`."""


def entry_point(
    build_parser: Callable[[], CommandParser], run: Callable[..., int | None], *, takes_options: bool = False
) -> Main:
    """Return `main(argv)`, which calls `run(args)`, or `run(args, options)` with the parser's unknown arguments."""

    def main(argv: list[str] | None = None) -> int:
        parser = build_parser()
        if takes_options:
            args, options = parser.parse_known_args(argv)
        else:
            args, options = parser.parse_args(argv), None
        with code_is_allowed(getattr(args, "allow_code", False)):
            return run_job(parser.prog, lambda: run(args) if options is None else run(args, options))

    return main


#: Messages of torch.distributed if another rank has died or does not answer (gloo, nccl, the store).
_LOST_RANK = re.compile(
    r"gloo/transport|caused pair closure|connection (closed|reset) by peer|broken pipe|remote process|nccl.*timeout",
    re.IGNORECASE,
)


def run_job(prog: str, job: Callable[[], int | None]) -> int:
    """Run `job`; return the exit status.

    Returns:
        - the job's return value, 0 for None;
        - 2 after the message of an error that the user can fix;
        - 1 after one line if another rank failed or was lost (that rank's messages state the cause);
        - PREEMPTED after one line of rank 0 if the job was asked to stop (SIGTERM) and has saved its state;
        - INTERRUPTED after one line of rank 0 for Ctrl-C.
    """
    show_logs_safely()
    try:
        return job() or 0
    except Preempted as request:
        return report_interruption(prog, str(request), INTERRUPTED if request.interrupted else PREEMPTED)
    except KeyboardInterrupt:
        return report_interruption(prog)
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"{prog}: error: {error}", sys.stderr)
        return 2
    except Exception as error:
        if (lack := _lack_of_machine(error)) is not None:
            say(f"{prog}: error: {lack}", sys.stderr)
            return 2
        if not isinstance(error, RuntimeError) or not is_of_another_rank(error):
            raise
        # Remove the "[...] " prefix of torch's messages.
        rank, cause = os.environ.get("RANK", "0"), re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        say(f"{prog}: rank {rank} stops{where} because of another rank, see its messages: {cause}", sys.stderr)
        return 1


def _lack_of_machine(error: Exception) -> str | None:
    """Describe a lack of memory, disk space or threads that a library reports as another error; None: no such lack."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        return f"not enough memory ({text or type(error).__name__}): free some, or allow this process more"
    if is_disk_full(error):
        return f"the disk is full ({text}): make room"
    if "can't start new thread" in text:
        return f"{text}: allow this process more threads (ulimit -u) or memory (ulimit -v)"
    return None


def report_interruption(prog: str, reason: str = "interrupted (Ctrl-C)", status: int = INTERRUPTED) -> int:
    """Print one line on rank 0 and return the exit status."""
    if os.environ.get("RANK", "0") == "0":
        say(f"{prog}: {reason}", sys.stderr)
    return status


def is_of_another_rank(error: RuntimeError) -> bool:
    """True if this rank failed because another rank failed or does not answer."""
    from torch import distributed as dist

    from hllm_torchrec.distributed.coordination import PeerFailed

    return isinstance(error, PeerFailed | dist.DistError) or _LOST_RANK.search(str(error)) is not None
