"""Fuzzes the readers of files, the metrics and the models, with new random inputs in each run unless --seed is given.

    python scripts/reliability/fuzz.py --seconds 60                     # all readers, one after the other
    python scripts/reliability/fuzz.py --seconds 600 --reader store
    python scripts/reliability/fuzz.py --inputs 20000 --reader tables --log fuzz.jsonl    # continues an interrupted run

Prints a JSON line for each reader: number of inputs, and the distinct failures with their counts. Exit status 1 if
there is a failure. Inputs are drawn in rounds of at most ROUND, with one seed per round. With --log the result of each
round is a line of the file, and rounds that the file has are not repeated. Each reader runs in a separate process, so
that a crash of a decoder counts as a failure and does not end the others. tests/fuzz/ defines how the files are changed
and what the readers must do (hypothesis); values are compared with those of other programs: DuckDB, scikit-learn and
plain transformers.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
READERS = (
    "manifest", "sequences", "sources", "tables", "lists", "tokens", "config", "predictions", "metrics", "store",
    "checkpoint", "models", "names", "creatives", "titles",
)  # fmt: skip
ROUND = 200
"""Largest number of inputs in a round."""
GRACE = 120
"""Seconds that a reader's process may take in addition to the limit, to start and to finish its last input."""


def main(argv: list[str] | None = None) -> int:
    """Fuzz the chosen readers; return 0, or 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds for each reader (default: 60)")
    parser.add_argument("--inputs", type=int, default=0, help="number of inputs for each reader, instead of --seconds")
    parser.add_argument("--reader", choices=READERS, action="append", help="reader (repeatable; default: all)")
    parser.add_argument("--seed", type=int, help="seed of the first round (default: the time; with --log: 0)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="JSON lines of the rounds; existing ones are reused")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = 0 if args.log else int(time.time())
    found = []
    for name in args.reader or READERS:
        limits = Limits(args.seconds, args.inputs, args.seed, args.log)
        result = fuzz(name, limits) if args.in_process else run_apart(name, limits)
        print(json.dumps(result), flush=True)
        found.append(result)
    return int(any(result["failures"] for result in found))


class Limits(NamedTuple):
    """Limits of a reader's fuzzing. seconds: time limit; inputs: number of inputs, which replaces `seconds` if above 0;
    seed: of the first round; log: see `--log`."""

    seconds: float = 60.0
    inputs: int = 0
    seed: int = 0
    log: Path | None = None


def run_apart(name: str, limits: Limits) -> dict[str, object]:
    """Run `fuzz` in a separate process; a process that crashes or does not end is a failure."""
    command = [sys.executable, str(Path(__file__).resolve()), "--in-process", f"--reader={name}"]
    command += [f"--seconds={limits.seconds}", f"--inputs={limits.inputs}", f"--seed={limits.seed}"]
    command += [f"--log={limits.log}"] if limits.log else []
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    longest = None if limits.inputs else limits.seconds + GRACE
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=longest)
    except subprocess.TimeoutExpired:
        return {"reader": name, "seed": limits.seed, "inputs": None, "failures": ["does not end"]}
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or not lines:
        return {"reader": name, "seed": limits.seed, "inputs": None, "failures": [f"died, status {done.returncode}"]}
    result: dict[str, object] = json.loads(lines[-1])
    return result


def fuzz(name: str, limits: Limits, target: Any = None) -> dict[str, object]:
    """Draw inputs and check them until a limit is reached; each distinct failure is shown once on stderr.

    target: a `tests.fuzz.mutations.Target`; None: the target of the reader's tests.
    """
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    target = target or importlib.import_module(f"tests.fuzz.test_{name}").TARGET
    failures: Counter[str] = Counter()
    rounds, inputs, start, number = _rounds_of(limits.log, name), 0, time.monotonic(), limits.seed

    def is_over() -> bool:
        return inputs >= limits.inputs if limits.inputs else time.monotonic() - start >= limits.seconds

    while not is_over():
        found = rounds.get(number)
        if found is None:
            stop = start + limits.seconds if not limits.inputs else math.inf
            found = _round(target, number, stop, failures)
            if limits.log:
                with limits.log.open("a") as file:
                    file.write(json.dumps({"reader": name, "seed": number} | found) + "\n")
        inputs += found["inputs"]
        failures.update(found["failures"])
        number += 1
    return {
        "reader": name,
        "seed": limits.seed,
        "seconds": round(time.monotonic() - start, 1),
        "inputs": inputs,
        "failures": dict(failures),
    }


def _rounds_of(log: Path | None, name: str) -> dict[int, dict[str, Any]]:
    """Seed -> result of the rounds of a reader that the log has."""
    if log is None or not log.exists():
        return {}
    lines = map(json.loads, log.read_text().splitlines())
    return {line["seed"]: line for line in lines if line["reader"] == name}


def _round(target: Any, seed: int, stop: float, shown: Counter[str]) -> dict[str, Any]:
    """Number of inputs of one seed, and number of failures by `_place`; failures in `shown` are not shown again."""
    import hypothesis

    inputs, failures = 0, Counter[str]()
    options = hypothesis.settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def check(mutation: object) -> None:
        nonlocal inputs
        if inputs and time.monotonic() >= stop:
            return
        inputs += 1
        try:
            target.check(mutation)
        except BaseException as error:  # every error except Ctrl-C is a failure of the reader
            if isinstance(error, KeyboardInterrupt):
                raise
            key = _place(error)
            if key not in shown and key not in failures:
                print(f"{target.name}: {repr(mutation)[:2000]}\n{key}", file=sys.stderr)
                traceback.print_exc()
            failures[key] += 1

    hypothesis.seed(seed)(options(hypothesis.given(target.inputs)(check)))()
    return {"inputs": inputs, "failures": dict(failures)}


def _place(error: BaseException) -> str:
    """Key of a failure: types of the error and of its cause, and the last line of the library in the traceback."""
    first = error.__context__ if isinstance(error, AssertionError) and error.__context__ else error
    frames = [f for f in traceback.extract_tb(first.__traceback__) if str(ROOT) in f.filename]
    own = [f for f in frames if "/tests/" not in f.filename and f.filename != __file__] or frames
    return f"{type(error).__name__}/{type(first).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


if __name__ == "__main__":
    sys.exit(main())
