"""Checks and times all code that runs on CUDA, in at most nine minutes; writes the results as JSON.

    python scripts/gpu/gpu_check.py [--out FILE] [--only NAME ...]     on a machine with a GPU
    python scripts/gpu/gpu_check.py --cpu                              the checks that a CPU can run, with tiny shapes

Each check runs in a separate process with a time limit, and its result is ok, failed (with the error) or skipped (with
the reason); a failed check does not stop the others. Results are written to benchmarks/<date>-gpu_check.json (with
--cpu: <date>-gpu_check-cpu.json) unless --out names another file. Exit status: 0; 1 if a check failed; 2 if there is no
GPU (or the arguments are wrong).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# So torch.cuda.is_available() does not initialize CUDA: the server from which the checks are forked must not do it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if "--cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

import torch  # noqa: E402
from checking import MODULES, ROOT, Processes  # noqa: E402

LIMIT = 540.0
"""Time limit in seconds for all checks together."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run the checks that a CPU can run, with tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these checks")
    parser.add_argument(
        "--seconds", type=float, default=LIMIT, help=f"time limit for all checks together (default: {LIMIT:.0f})"
    )
    parser.add_argument("--list", action="store_true", help="list the checks")
    return parser


def main(argv: list[str] | None = None, modules: Sequence[str] = MODULES) -> int:
    """Run the checks of `modules`; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not (options.cpu or options.list or torch.cuda.is_available()):
        print("gpu_check: torch sees no CUDA device here; --cpu runs what a CPU can", file=sys.stderr)
        return 2
    started = time.monotonic()
    processes = Processes("cpu" if options.cpu else "cuda", options.cpu, modules)
    checks = processes.checks()
    unknown = sorted(set(options.only or ()) - checks.keys())
    if unknown:
        parser.error(f"--only: no check {', '.join(unknown)}; there are {', '.join(checks)}")
    if options.list:
        print("\n".join(f"{name:<22} {seconds:>4.0f} s  {about}" for name, (seconds, about) in checks.items()))
        return 0
    device = processes.probe()
    print(f"{device['device']}, torch {torch.__version__}", file=sys.stderr, flush=True)
    chosen = {name: limits[0] for name, limits in checks.items() if not options.only or name in options.only}
    results = run_all(processes, chosen, started + options.seconds)
    found = report(device, results, time.monotonic() - started)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    out = options.out or ROOT / "benchmarks" / f"{date}-gpu_check{'-cpu' if options.cpu else ''}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{out}: " + ", ".join(f"{number} {state}" for state, number in found["counts"].items()), file=sys.stderr)
    return 1 if found["counts"]["failed"] else 0


def run_all(processes: Processes, chosen: dict[str, float], deadline: float) -> dict[str, dict[str, Any]]:
    """Run the checks; return name -> state, seconds, and its results or the reason. Prints a line for each on stderr.

    chosen: name -> time limit in seconds; deadline: of all checks, by `time.monotonic`.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, most in chosen.items():
        start = time.monotonic()
        left = deadline - start
        if left < 1:
            state, found = "skipped", "no time left"
        else:
            state, found = processes.run(name, min(most, left))
        results[name] = {"state": state, "seconds": round(time.monotonic() - start, 2)}
        results[name] |= {"found": found} if state == "ok" else {"reason": found}
        words = "" if state == "ok" else f": {found.splitlines()[0]}"
        print(f"{state:<8} {results[name]['seconds']:>6.1f} s  {name}{words}", file=sys.stderr, flush=True)
    return results


def report(device: dict[str, Any], results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Content of the JSON file."""
    from hllm_torchrec.common.machine import machine_info

    machine = machine_info()
    states = [result["state"] for result in results.values()]
    return {
        "bench": "gpu_check",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "device": device,
        "counts": {state: states.count(state) for state in ("ok", "failed", "skipped")},
        "seconds": round(seconds, 1),
        "checks": results,
        "machine": {name: machine[name] for name in ("cpu", "cores", "memory_bytes")},
        "versions": {"python": machine["python"], **machine["packages"], "hllm_torchrec": machine["hllm_torchrec"]},
        "commit": machine["commit"],
    }


if __name__ == "__main__":
    sys.exit(main())
