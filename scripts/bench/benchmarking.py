"""Common functions of the bench_*.py scripts: arguments, alternating timing, the machine's peak, the final JSON.

Rules of the benches: unless a bench states otherwise, the compared sides run in one process with one allocator setting,
alternately, after a warm-up; a ratio is the median over the rounds, and is refused if the rounds disagree (`ratio`,
`refuse_noisy`). Speeds are also given as a share of the machine's measured matrix-product peak.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hllm_torchrec.common.machine import LARGE_BUFFERS_KEPT, machine_info
from hllm_torchrec.models.flops import measured_matmul_peak

ROOT = Path(__file__).resolve().parents[2]

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
"""The shape of SmolLM2-135M, with 6 of its 30 layers."""


SPREAD_LIMIT = 0.3
"""Largest spread of a ratio that is reported."""


class Ratio(float):
    """A ratio of times."""

    spread: float | None
    """Disagreement of the rounds: (third quartile - first quartile) / median. None for a single round."""


def keep_large_buffers() -> None:
    """Restart this script with the environment `LARGE_BUFFERS_KEPT`, which glibc reads when a process starts."""
    if any(os.environ.get(name) != value for name, value in LARGE_BUFFERS_KEPT.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **LARGE_BUFFERS_KEPT})


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser with the arguments of every bench."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 3 minutes on 2 cores: few repeats, fewer shapes")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # shapes for the tests
    return parser


def add_dataset(parser: argparse.ArgumentParser, tokenizer: bool = False) -> None:
    """Add `--dataset` and, if `tokenizer` is true, `--tokenizer`."""
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "ml-100k", help="prepared MovieLens-100k")
    if tokenizer:
        smollm2 = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
        parser.add_argument("--tokenizer", type=Path, default=smollm2, help="directory with SmolLM2's tokenizer")


def alternate(
    sides: Mapping[str, Callable[[], float | None]], repeats: int, warmup: int = 1, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Call the sides alternately and time each call.

    Args:
        sides: name -> function to time. If a function returns a number, this is its time in seconds.
        repeats: least number of timed rounds.
        warmup: number of rounds before the timed ones.
        seconds: continue with rounds until the timed calls of all sides took this many seconds together, so that fast
            sides get many rounds.

    Returns:
        Name -> seconds of every timed call.
    """
    for _ in range(warmup):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    spent = 0.0
    while min(map(len, times.values())) < repeats or spent < seconds:
        for name, run in sides.items():
            start = time.perf_counter()
            own = run()
            times[name].append(time.perf_counter() - start if own is None else own)
            spent += times[name][-1]
    return times


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Side for `alternate` that returns the seconds of `run` by `clock`; the result of `run` is discarded."""

    def seconds() -> float:
        start = clock()
        run()
        return clock() - start

    return seconds


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds by side."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> Ratio:
    """Median over the rounds of above / below, times `scale`.

    A round measures both sides one after the other, so a slowdown of the machine that is longer than a round cancels.
    The quartiles of the spread are those of the same quotients, interpolated linearly between the rounds (three rounds:
    half the range). Unlike the range, they are not affected by a single disturbed round among many.

    Args:
        above: seconds of one side by round, as `alternate` returns them.
        below: seconds of the other side, of the same rounds.
        scale: factor of every quotient, for a side of which only a part was run.
    """
    quotients = [scale * a / b for a, b in zip(above, below, strict=True)]
    found = Ratio(statistics.median(quotients))
    found.spread = None
    if len(quotients) > 1:
        first, _, third = statistics.quantiles(quotients, n=4, method="inclusive")
        found.spread = (third - first) / found
    return found


def refuse_noisy(ratios: Mapping[str, float | None]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Return the ratios, with None for those whose spread is above `SPREAD_LIMIT`, and the reason of each refusal.

    Ratios of bytes and counts have no rounds and remain.
    """
    spreads = {name: value.spread for name, value in ratios.items() if isinstance(value, Ratio)}
    refused = {
        name: f"its rounds spread over {spread:.0%} of their median, more than {SPREAD_LIMIT:.0%}"
        for name, spread in spreads.items()
        if spread is not None and spread > SPREAD_LIMIT
    }
    return {name: None if name in refused else value for name, value in ratios.items()}, refused


def resident(what: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS (resident now) or VmHWM (peak since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {what}: Linux is needed")


def reset_high_water_mark() -> None:
    """Set VmHWM to VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def matmul_peak(seconds: float = 1.0) -> float:
    """Floating-point operations per second of float32 matrix products on the CPU, with all threads that torch uses."""
    return measured_matmul_peak("cpu", seconds=seconds)


def why_no_bf16() -> str | None:
    """Reason to leave bfloat16 rows out; None if the processor has bfloat16 matrix instructions."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "the processor has no bfloat16 matrix instructions (AVX512-BF16 or AMX): it would emulate them"


def say(text: str) -> None:
    """Print a line of progress on stderr, because the last line of stdout is the JSON."""
    print(text, file=sys.stderr, flush=True)


def report(bench: str, options: argparse.Namespace, found: Mapping[str, Any]) -> dict[str, Any]:
    """Print the shares of the peak, then the result as one JSON object on stdout's last line; write it to `--out`.

    If a ratio is refused (see `refuse_noisy`), it is null in the JSON, and so are the shares, because the machine was
    not idle. The shares are also refused if one of them is above 100%, because the peak was then measured while
    something else ran. All refusals are printed. With `--tiny`, the shapes of the tests, nothing is refused.

    Args:
        bench: name of the bench.
        options: the parsed arguments.
        found: results: `ratios` (those of times by `ratio`), `shapes`, and any further entries; if the bench measures
            shares of the peak, `matmul_peak` (operations/s) and `matmul_share` by row and side.
    """
    if "matmul_peak" not in found:
        found = {**found, "matmul_peak": matmul_peak(seconds=0.2), "matmul_share": None}
    machine = machine_info()
    result = {
        "bench": bench,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "mode": "tiny" if options.tiny else "quick" if options.quick else "full",
        "ratios": {},
        "shapes": {},
        **found,
        **_trusted(found, options.tiny),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name) for name in LARGE_BUFFERS_KEPT},
        "load": os.getloadavg()[0],
        "machine": {name: machine[name] for name in ("cpu", "cores", "memory_bytes", "gpus")},
        "versions": {"python": machine["python"], **machine["packages"], "hllm_torchrec": machine["hllm_torchrec"]},
        "commit": machine["commit"],
    }
    assert result["ratios"] or options.tiny or "curves" in result, "a bench reports ratios"
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, reason in result["refused"].items():
        print(f"refused: {name}: {reason}; run it again with nothing else running")
    print(f"share of the matrix-product peak, {result['matmul_peak'] / 1e9:.0f} GFLOP/s: {_shares(result)}")
    print(json.dumps(result), flush=True)
    return result


def _trusted(found: Mapping[str, Any], tiny: bool) -> dict[str, Any]:
    """Fields of the result that depend on whether the machine was idle."""
    given, shares = found.get("ratios", {}), found.get("matmul_share")
    ratios, refused = (given, {}) if tiny else refuse_noisy(given)
    spreads = {name: value.spread for name, value in given.items() if isinstance(value, Ratio)}
    highest = max((share for by in (shares or {}).values() for share in by.values()), default=0.0)
    if highest > 1 and not tiny:
        refused |= {"matmul_share": f"{highest:.0%} of the peak, which something else must have slowed down"}
    return {"ratios": ratios, "spreads": spreads, "refused": refused, "matmul_share": None if refused else shares}


def _shares(found: Mapping[str, Any]) -> str:
    if found["refused"]:
        return "refused"
    shares = found["matmul_share"] or {}
    rows = (f"{row} " + ", ".join(f"{side} {share:.1%}" for side, share in by.items()) for row, by in shares.items())
    return "; ".join(rows) or "not measured"
