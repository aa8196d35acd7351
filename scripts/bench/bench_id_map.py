"""Memory and time of assigning dense ids to raw ids: `IdMap`, which `hllm prepare` uses, against a dict of str.

    python scripts/bench/bench_id_map.py [--quick] [--out FILE]

Ids are ten-character product numbers, which arrive in chunks as from a table. Each chunk is added and then looked up,
as `hllm prepare` does with the tables of items and of events. Each side runs in a separate process, so that its peak
memory is known. `memory_<ids>` and `seconds_<ids>` are the ratios IdMap / dict; `bytes_an_id` is the peak memory per
id.
"""

import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
from benchmarking import arguments, ratio, report, say

from hllm_torchrec.data.id_map import IdMap

CHUNK = 65_536


def chunk(first: int, size: int) -> pa.Array:
    """Ids of a chunk, different from those of all other chunks."""
    return pa.array([f"B{number * 7_919 % 10**9:09d}" for number in range(first, first + size)])


def fill_id_map(count: int) -> int:
    """Add and look up `count` ids in an IdMap; returns its length."""
    ids = IdMap()
    for first in range(0, count, CHUNK):
        raw = chunk(first, min(CHUNK, count - first))
        ids.add(raw)
        assert ids.find(raw)[-1] == len(ids) - 1
    return len(ids)


def fill_dict(count: int) -> int:
    """Add and look up `count` ids, one by one, in a dict; returns its length."""
    ids: dict[str, int] = {}
    for first in range(0, count, CHUNK):
        raw = chunk(first, min(CHUNK, count - first)).to_pylist()
        for one in raw:
            ids.setdefault(one, len(ids))
        assert np.fromiter((ids[one] for one in raw), np.int64)[-1] == len(ids) - 1
    return len(ids)


def measured(side: str, count: int, answer: Connection) -> None:
    """Send (bytes, CPU seconds) of one side. Memory for making the ids is not counted, but time for it is."""
    for first in range(0, min(count, 4 * CHUNK), CHUNK):
        chunk(first, CHUNK)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert {"id_map": fill_id_map, "dict": fill_dict}[side](count) == count
    seconds = time.process_time() - start
    answer.send(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, seconds))


def in_own_process(side: str, count: int) -> tuple[int, float]:
    """(bytes, CPU seconds) of a side, measured in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measured, args=(side, count, there))
    process.start()
    found: tuple[int, float] = here.recv()
    process.join()
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write the result."""
    options = arguments(__doc__).parse_args(argv)
    counts = [20_000] if options.tiny else [1_000_000] if options.quick else [1_000_000, 10_000_000]
    ratios, sides, own = {}, {}, 0.0
    for count in counts:
        say(f"{count:,} ids")
        start = time.process_time()
        for first in range(0, count, CHUNK):
            chunk(first, min(CHUNK, count - first))
        own = time.process_time() - start  # CPU seconds of making the ids, which are subtracted from both sides
        found = {side: in_own_process(side, count) for side in ("id_map", "dict")}
        ratios[f"memory_{count}"] = found["id_map"][0] / max(found["dict"][0], 1)
        ratios[f"seconds_{count}"] = ratio([found["id_map"][1] - own], [found["dict"][1] - own])
        sides[count] = {
            side: {"peak_bytes": size, "bytes_an_id": size / count, "cpu_seconds": seconds - own}
            for side, (size, seconds) in found.items()
        }
    nothing = {"matmul_peak": 0.0, "matmul_share": {}}
    return report("id_map", options, {"ratios": ratios, "shapes": {"ids": counts}, "sides": sides, **nothing})


if __name__ == "__main__":
    main(sys.argv[1:])
