"""Kill a store's writer at lines of a commit: python kill_commits.py STORE --kills 40.

The lines of the store's code that two commits, the merging of their runs and a compaction execute are counted; then a
child is killed at each of so many of them, evenly spread. What is found afterwards is one of the states that were
committed, whole.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from hllm_torchrec import store as store_package  # noqa: E402
from hllm_torchrec.store import EmbeddingStore, compaction  # noqa: E402
from tests.store.kill_writers import KEYS, WIDTH, read  # noqa: E402

FOLDER = str(Path(store_package.__file__).parent)


def commit_and_compact(root: Path) -> None:
    """Two commits after the last, of which the second merges runs, and a compaction."""
    store = EmbeddingStore.open(root)
    last = int(store.snapshot().gather(["k0"])[0][0, 0])
    for number in (last + 1, last + 2):
        with store.writer() as writer:
            writer.delete(["k1"])
            writer.upsert([f"k{k}" for k in range(KEYS)], torch.full((KEYS, WIDTH), float(number)))
            writer.upsert([f"new{number}"], torch.full((1, WIDTH), float(number)))
            writer.commit()
    store.compact()


class Executioner:
    """A trace function that kills the process at a line of the store's code, the `line`th; 0: never."""

    def __init__(self, line: int = 0) -> None:
        self.line, self.passed = line, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> "Executioner | None":
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            self.passed += 1
            if self.passed == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def kill_at(root: Path, line: int) -> None:
    """Let a writer die at a line."""
    child = os.fork()
    if child == 0:
        sys.settrace(Executioner(line))
        commit_and_compact(root)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"a writer came to its end, or failed, before line {line}"


def count_lines(root: Path) -> int:
    """Lines that a writer executes."""
    counting = Executioner()
    sys.settrace(counting)
    commit_and_compact(root)
    sys.settrace(None)
    return counting.passed


def main() -> None:
    """Kill as often as asked, the last time a little before the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what a process has written outlives it; waiting for the disk is most of a commit
    compaction.MAX_SEGMENTS = 2
    EmbeddingStore.create(options.store, WIDTH, "fp32")
    count_lines(options.store)
    lines, shown, steps = count_lines(options.store), 4, set()
    for number in range(options.kills):
        kill_at(options.store, 1 + number * (lines - lines // 50) // options.kills)
        found = read(options.store)
        assert found - shown in (0, 1, 2), f"kill {number}: {shown} before, {found} after"
        steps.add(found - shown)
        shown = found
        EmbeddingStore.open(options.store).compact()  # so that the next one has the same lines before it
    assert steps == {0, 1, 2}, "before the first commit, after it, and after the second"
    print(f"killed {options.kills} writers within {lines} lines; {shown} commits, none lost, none half done")


if __name__ == "__main__":
    main()
