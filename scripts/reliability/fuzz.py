"""Fuzzes the readers of files: each for a while, with new inputs every time unless --seed says which.

    python scripts/reliability/fuzz.py --seconds 60                     # all readers, one after the other
    python scripts/reliability/fuzz.py --seconds 600 --reader store

Prints a JSON line for each reader: inputs tried, distinct failures, and where. Exit status 1 if there is a failure.
Each reader runs in a process of its own, so that a crash of a decoder counts as a failure and ends nothing else. What
is done to the files, and what is demanded of the readers, is in tests/fuzz/ (hypothesis).
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
READERS = (
    "manifest", "sequences", "sources", "tables", "lists", "tokens", "config", "predictions", "store", "checkpoint",
)  # fmt: skip
GRACE = 120
"""Seconds that a reader's process may take to start, and to end with its last input."""


def main(argv: list[str] | None = None) -> int:
    """Run; returns 0, or 1 if a reader failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader (default: 60)")
    parser.add_argument("--reader", choices=READERS, action="append", help="may be given several times; default: all")
    parser.add_argument("--seed", type=int, help="of the inputs (default: the time)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    seed = int(time.time()) if args.seed is None else args.seed
    found = []
    for name in args.reader or READERS:
        result = fuzz(name, args.seconds, seed) if args.in_process else run_apart(name, args.seconds, seed)
        print(json.dumps(result), flush=True)
        found.append(result)
    return int(any(result["failures"] for result in found))


def run_apart(name: str, seconds: float, seed: int) -> dict[str, object]:
    """`fuzz` in a process of its own; one that dies or does not end is a failure."""
    command = [sys.executable, str(Path(__file__).resolve()), "--in-process"]
    command += [f"--reader={name}", f"--seconds={seconds}", f"--seed={seed}"]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=seconds + GRACE)
    except subprocess.TimeoutExpired:
        return {"reader": name, "seed": seed, "inputs": None, "failures": ["does not end"]}
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or not lines:
        return {"reader": name, "seed": seed, "inputs": None, "failures": [f"died, exit status {done.returncode}"]}
    result: dict[str, object] = json.loads(lines[-1])
    return result


def fuzz(name: str, seconds: float, seed: int, target: Any = None) -> dict[str, object]:
    """Draw inputs and check them until the time is over; each distinct failure is shown once on stderr.

    target: a `tests.fuzz.mutations.Target`; None: the reader's own.
    """
    import hypothesis

    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    target = target or importlib.import_module(f"tests.fuzz.test_{name}").TARGET
    inputs, failures, start = 0, {}, time.monotonic()
    options = hypothesis.settings(
        max_examples=200,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def check(mutation: object) -> None:
        nonlocal inputs
        if inputs and time.monotonic() - start >= seconds:
            return
        inputs += 1
        try:
            target.check(mutation)
        except BaseException as error:  # whatever it is, it is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            key = _place(error)
            if key not in failures:
                print(f"{name}: {repr(mutation)[:2000]}\n{key}", file=sys.stderr)
                traceback.print_exc()
            failures[key] = failures.get(key, 0) + 1

    rounds = 0
    while time.monotonic() - start < seconds:
        hypothesis.seed(seed + rounds)(options(hypothesis.given(target.inputs)(check)))()
        rounds += 1
    return {
        "reader": name,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "inputs": inputs,
        "failures": failures,
    }


def _place(error: BaseException) -> str:
    """Which failure it is: the kind of error, and the last line of the library's own that it went through."""
    first = error.__context__ if isinstance(error, AssertionError) and error.__context__ else error
    frames = [f for f in traceback.extract_tb(first.__traceback__) if str(ROOT) in f.filename]
    own = [f for f in frames if "/tests/" not in f.filename and f.filename != __file__] or frames
    return f"{type(error).__name__}/{type(first).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


if __name__ == "__main__":
    sys.exit(main())
