"""Kills ranks of a training job with SIGKILL, many times, and checks that training has lost nothing.

    python scripts/reliability/soak.py [--launcher torchrun|torchx|fork] [--kills 50] [--steps 500] [--out FILE]

A tiny model trains on a generated shop, and saves a checkpoint after every step, on two gloo ranks (`--world`). When
one rank has died, all ranks are started again: by torchrun, by TorchX, or by this script (fast, because nothing is
imported again). Each kill hits a random rank: a fifth of the kills comes at a random time after the start of the ranks,
while they build the model; half of the others come at a random time during the steps, half while a checkpoint is being
written. At the end the run's log must have every step once, with bitwise the same losses as those of an undisturbed
run. Prints JSON: numbers of kills, of kills during a write, and of kills after which a step was completed (recovered),
lost (steps whose loss differs, is missing or repeated), seconds from a kill to the next step. Exit status 1 if anything
was lost or the job failed. Needs a checkout and Linux.
"""

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hllm_torchrec.common.machine import machine_info  # noqa: E402
from hllm_torchrec.common.run_log import read_log  # noqa: E402
from tests.helpers.training_fixtures import arguments  # noqa: E402

T = TypeVar("T")
GIVE_UP_AFTER = 300.0
"""Seconds without progress after which the job is considered to hang."""


@dataclass
class Tally:
    """Counts of the kills of a job; recovered: kills after which a step was completed."""

    injected: int = 0
    in_a_write: int = 0
    at_the_start: int = 0
    recovered: int = 0
    seconds_to_resume: list[float] = field(default_factory=list)


def command(launcher: str, world: int, restarts: int, options: list[str]) -> tuple[list[str], dict[str, str]]:
    """Command line of the launcher, and its environment."""
    programs = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = "1"
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    if launcher == "torchx":
        job = ["torchx", "run", "dist.ddp", "-j", f"1x{world}", "--rdzv_port", port]
        job += ["--env", f"PET_MAX_RESTARTS={restarts}"]
    else:
        job = ["torchrun", "--nproc_per_node", str(world), "--master_port", port, "--max_restarts", str(restarts)]
    return [str(programs / job[0]), *job[1:], "train.py", *options], env


def processes_of(folder: Path) -> Iterator[Path]:
    """/proc/<id> of the processes whose command lines name the folder."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended
            if process.name.isdigit() and str(folder).encode() in (process / "cmdline").read_bytes():
                yield process


def ranks_of(output: Path) -> dict[int, int]:
    """Rank -> process id of the job that trains into `output`."""
    found = {}
    for process in processes_of(output):
        with suppress(OSError):
            variables = dict(pair.partition(b"=")[::2] for pair in (process / "environ").read_bytes().split(b"\0"))
            if b"LOCAL_RANK" in variables and b"TORCHELASTIC_RUN_ID" in variables:
                found[int(variables[b"RANK"])] = int(process.name)
    return found


def wait_until(found: Callable[[], T | None], running: Callable[[], bool], what: str) -> T | None:
    """Wait until `found` returns a value other than None, and return it; return None if the job ends before.

    what: name of the awaited value, for the error.

    Raises:
        TimeoutError: neither happened within GIVE_UP_AFTER seconds: the job hangs.
    """
    deadline = time.monotonic() + GIVE_UP_AFTER
    while running():
        value = found()
        if value is not None:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} for {GIVE_UP_AFTER:.0f} s")
        time.sleep(0.02)
    return None


def events(output: Path, name: str) -> list[dict]:
    """Lines of the log with the event `name`."""
    return [line for line in read_log(output) if line["event"] == name] if (output / "log.jsonl").exists() else []


class LaunchedJob:
    """A training job under torchrun or TorchX, which restart all ranks when one has died."""

    def __init__(self, launcher: str, world: int, restarts: int, output: Path, options: list[str]) -> None:
        self.world, self.output = world, output
        words, env = command(launcher, world, restarts, options)
        with (output.parent / f"{output.name}.txt").open("w") as printed:
            self._process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)

    def running(self) -> bool:
        """True while the job is running."""
        return self._process.poll() is None

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that are running."""
        return ranks_of(self.output)

    def wait(self) -> int:
        """Wait until the job ends; return its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """End the job, if it is running."""
        self._process.terminate()
        self._process.wait()


class ForkedJob:
    """A training job without a launcher: ranks are forked from a process that has imported everything, so that restarts
    are fast."""

    def __init__(self, world: int, restarts: int, output: Path, options: list[str]) -> None:
        self.world, self.output, self._restarts, self._options = world, output, restarts, options
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["transformers.models.llama.modeling_llama", "hllm_torchrec.training.trainer"]
        )
        self._pids: dict[int, int] = {}
        self._status: int | None = None
        self._stopped = False
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def _supervise(self) -> None:
        for generation in range(self._restarts + 1):
            store = self.output.parent / f"{self.output.name}-store-{generation}"
            processes = [
                self._context.Process(target=train_forked, args=(rank, self.world, store, self._options))
                for rank in range(self.world)
            ]
            for process in processes:
                process.start()
            self._pids = {rank: process.pid for rank, process in enumerate(processes)}
            codes = [process.exitcode for process in processes]
            while None in codes and not any(codes):
                time.sleep(0.01)
                codes = [process.exitcode for process in processes]
            for process in processes:  # end the other ranks, as torchrun does
                process.terminate()
            for process in processes:
                process.join(30)
                process.kill()
                process.join()
            self._pids = {}
            codes = [process.exitcode for process in processes]
            if self._stopped or codes == [0] * self.world:
                break
        self._status = max(map(abs, codes))

    def running(self) -> bool:
        """True while the job is running."""
        return self._status is None

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that are running."""
        return self._pids

    def wait(self) -> int:
        """Wait until the job ends; return its exit status."""
        self._supervisor.join()
        return self._status or 0

    def stop(self) -> None:
        """End the job, if it is running."""
        self._stopped = True
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._supervisor.join()


def train_forked(rank: int, world: int, store: Path, options: list[str]) -> None:
    """One rank of a `ForkedJob`."""
    import torch
    from torch import distributed as dist

    from hllm_torchrec.launch.train import main as train

    torch.set_num_threads(1)
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in address.items()})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    sys.exit(train(options))


class Victim:
    """A job whose ranks are killed."""

    def __init__(self, job: "LaunchedJob | ForkedJob") -> None:
        self.job, self._dead = job, set[int]()

    def new_ranks(self) -> dict[int, int]:
        """Wait until all ranks that are started after the last kill run; return them, or {} if the job has ended."""
        while self.job.running():
            found = self.job.ranks()
            if len(found) == self.job.world and not self._dead & set(found.values()):
                return found
            time.sleep(0.01)
        return {}

    def next_step(self, after: float) -> dict | None:
        """Wait for the first step of a start later than `after`; return its line, or None if the job has ended."""

        def first_step() -> dict | None:
            starts = [line["time"] for line in events(self.job.output, "start") if line["time"] > after]
            steps = (line for line in events(self.job.output, "step") if starts and line["time"] >= starts[-1])
            return next(steps, None)

        return wait_until(first_step, self.job.running, f"step in {self.job.output}")

    def writing(self) -> bool:
        """True while a checkpoint is being written."""
        return bool(list((self.job.output / "checkpoints").glob("*.tmp-*")))

    def wait_for_a_write(self) -> None:
        """Wait until a checkpoint is being written."""
        while self.job.running() and not self.writing():
            time.sleep(0.0005)

    def kill(self, rank: int, ranks: dict[int, int]) -> None:
        """Send SIGKILL to one rank; all ranks of this start then count as dead."""
        os.kill(ranks[rank], signal.SIGKILL)
        self._dead |= set(ranks.values())


def torment(victim: Victim, kills: int, seconds: float, rng: random.Random) -> Tally:
    """Kill ranks of a job until there were `kills` kills or the job has ended, then wait for its end.

    seconds: longest time from the first step of a restart, or from its start, to the kill.
    """
    tally, killed_at, job = Tally(), 0.0, victim.job
    while ranks := victim.new_ranks():
        early = tally.injected < kills and rng.random() < 0.2
        if early:
            time.sleep(rng.uniform(0, seconds))
        else:
            step = victim.next_step(killed_at)
            if step is not None and killed_at:
                tally.seconds_to_resume.append(step["time"] - killed_at)
                tally.recovered = tally.injected
            if step is None or tally.injected >= kills:
                break
            time.sleep(rng.uniform(0, seconds))
            if rng.random() < 0.5:
                victim.wait_for_a_write()
        writing = victim.writing()
        try:
            victim.kill(rng.randrange(job.world), ranks)
        except ProcessLookupError:
            break  # the rank has just ended
        killed_at = time.time()
        tally.injected, tally.in_a_write = tally.injected + 1, tally.in_a_write + writing
        tally.at_the_start += early
        print(f"kill {tally.injected}{' in a write' * writing}{' at the start' * early}", file=sys.stderr, flush=True)
    job.wait()
    return tally


def lost_steps(alone: Path, harmed: Path) -> int:
    """Number of steps that are missing or repeated in the log of the disturbed run `harmed`, or have another loss; 0
    means that the losses are bitwise equal to those of the undisturbed run `alone`."""
    found: dict[int, list[float]] = {}
    for line in events(harmed, "step"):
        found.setdefault(line["step"], []).append(line["loss"])
    expected = {line["step"]: [line["loss"]] for line in events(alone, "step")}
    return sum(found.get(step) != expected.get(step) for step in found.keys() | expected.keys())


def add_row(found: dict, out: Path | None) -> None:
    """Print a report, and add it to the list in a file."""
    print(json.dumps(found, indent=1))
    if out:
        rows = json.loads(out.read_text()) if out.exists() else []
        out.write_text(json.dumps([*rows, found], indent=1) + "\n")


def start(launcher: str, world: int, restarts: int, output: Path, options: list[str]) -> LaunchedJob | ForkedJob:
    """Start a job that trains into `output`."""
    if launcher == "fork":
        return ForkedJob(world, restarts, output, options)
    return LaunchedJob(launcher, world, restarts, output, options)


def job_options(steps: int, batch_users: int, timeout: float) -> dict:
    """Options of both runs of a soak: a checkpoint after every step, dropout, and all state that must be resumed."""
    options = {"stages": [{"name": "soak", "epochs": 1000}], "max_steps": steps, "resume": True}
    options |= {"data__batch_users": batch_users, "evaluation__every": 1000, "evaluation__checkpoint_every": 1}
    options |= {"objective__head_dropout": 0.2, "objective__generative_weight": 0.5, "optim__ema": 0.9}
    return options | {"parallel__timeout": timeout}


def seconds_of(resumed: list[float]) -> dict[str, float] | None:
    """Median and maximum of the seconds to resume; None if there are none."""
    return {"median": statistics.median(resumed), "most": max(resumed)} if resumed else None


def soak(folder: Path, wanted: argparse.Namespace) -> dict:
    """Run an undisturbed job and one whose ranks are killed, in `folder`; return the report.

    wanted: the script's options.
    """
    launcher, world = wanted.launcher, wanted.world
    options = job_options(wanted.steps, 4 // world or 1, timeout=60)
    options |= {"reliability__asynchronous_checkpoints": wanted.asynchronous}
    begun = time.monotonic()
    alone = start(launcher, world, 0, folder / "alone", arguments(folder / "alone", **options))
    if alone.wait() != 0:
        printed = folder / "alone.txt"  # will be deleted with `folder`; a `ForkedJob` prints on stderr instead
        said = printed.read_text()[-3000:] if printed.exists() else ""
        raise RuntimeError(f"the undisturbed run failed\n{said}".rstrip())
    killed = start(launcher, world, wanted.kills + 5, folder / "killed", arguments(folder / "killed", **options))
    try:
        tally = torment(Victim(killed), wanted.kills, wanted.seconds, random.Random(wanted.seed))
    finally:
        killed.stop()
    return {
        "command": wanted.command,
        "kills": {"injected": tally.injected, "in_a_write": tally.in_a_write, "at_the_start": tally.at_the_start},
        "recovered": tally.recovered,
        "lost": lost_steps(folder / "alone", folder / "killed"),
        "steps": wanted.steps,
        "exit_status": killed.wait(),
        "seconds_to_resume": seconds_of(tally.seconds_to_resume),
        "world": world,
        "launcher": launcher,
        "asynchronous": wanted.asynchronous,
        "seconds": time.monotonic() - begun,
        "machine": machine_info(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=["torchrun", "torchx", "fork"], default="torchrun")
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument(
        "--seconds", type=float, default=1, help="longest time from a restart or its first step to a kill"
    )
    parser.add_argument("--steps", type=int, default=500, help="steps of the job, which may end before the last kill")
    parser.add_argument("--world", type=int, default=2, help="number of ranks")
    parser.add_argument("--asynchronous", action="store_true", help="write checkpoints in the background")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times and ranks of kills")
    parser.add_argument("--out", type=Path, help="add the JSON to the list in this file")
    wanted = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    shown = [word for before, word in zip(["", *words], words, strict=False) if "--out" not in (before, word)]
    wanted.command = shlex.join(["python", "scripts/reliability/soak.py", *shown])
    return wanted


def soak_and_report(soak: Callable[[Path, argparse.Namespace], dict], wanted: argparse.Namespace) -> int:
    """Call `soak` with a temporary folder in memory, print and store its report; return the exit status."""
    memory = Path("/dev/shm")  # on a disk, most of the time would be that of the disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        found = soak(Path(folder), wanted)
    add_row(found, wanted.out)
    return int(found["lost"] > 0 or found["exit_status"] != 0)


if __name__ == "__main__":
    sys.exit(soak_and_report(soak, parse()))
