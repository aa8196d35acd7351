"""Kill writers of a store at random moments and look at what is left: python kill_writers.py STORE --kills 25.

Each writer commits forever: commit n sets every key to n, and key n is new; now and then it compacts. Having
committed, it says so. What is found, meanwhile and afterwards, must be whole: every key of version v set to v, v at
least the last that the writer spoke of and at most the one after.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from hllm_torchrec.store import EmbeddingStore  # noqa: E402

WIDTH = 64
KEYS = 300


def write_forever(root: Path, say: int) -> None:
    """Commit until killed."""
    store = EmbeddingStore.open(root)
    number = read(root)
    while True:
        number += 1
        with store.writer() as writer:
            writer.upsert([f"k{k}" for k in range(KEYS)], torch.full((KEYS, WIDTH), float(number)))
            writer.upsert([f"new{number}"], torch.full((1, WIDTH), float(number)))
            writer.commit()
        os.write(say, b"%d\n" % number)
        if number % 3 == 0:
            store.compact()


def read(root: Path) -> int:
    """The number that all keys have; an error if they differ."""
    store = EmbeddingStore.open(root)
    assert store.verify() == []
    snapshot = store.snapshot()
    vectors, known = snapshot.gather([f"k{k}" for k in range(KEYS)])
    if not known.any():
        return 0
    number = int(vectors[0, 0])
    assert known.all() and bool((vectors == number).all()), "half a commit is visible"
    marks, known = snapshot.gather([f"new{n}" for n in range(1, number + 1)])
    assert known.all() and marks[:, 0].tolist() == [float(n) for n in range(1, number + 1)], "a commit is lost"
    assert len(snapshot) == KEYS + number
    return number


def main() -> None:
    """Kill and look, as often as asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    EmbeddingStore.create(options.store, WIDTH, "fp32")
    for _ in range(options.kills):
        hear, say = os.pipe()
        child = os.fork()
        if child == 0:
            write_forever(options.store, say)
        os.close(say)
        until, seen = time.monotonic() + rng.uniform(0.02, 0.25), 0
        while time.monotonic() < until:  # meanwhile a reader sees whole states alone, and none go back
            now = read(options.store)
            assert now >= seen, f"{now} after {seen}"
            seen = now
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        heard = os.fdopen(hear).read().split()
        found = read(options.store)
        assert not heard or found - int(heard[-1]) in (0, 1), f"said {heard[-1]}, found {found}"
    print(f"killed {options.kills} writers; {read(options.store)} commits, none lost, none half done")


if __name__ == "__main__":
    main()
