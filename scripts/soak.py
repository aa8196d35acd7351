"""Kill ranks of a training job with SIGKILL, again and again, and see whether anything was lost.

    python scripts/soak.py [--kills 50] [--world 2] [--launcher torchrun|torchx] [--asynchronous] [--out FILE]

A tiny model trains on a generated shop, saving after every step, on `--world` gloo ranks with elastic restarts. Kills
hit a random rank: a fifth of them at a random moment after the ranks have started, while they are still building the
model; half of the others at a random moment of the steps, half while a checkpoint is being written. At the end the
losses in the run's log must be those of a run that was left alone, bit for bit, each step once. Prints JSON: kills
injected, those that hit inside a write, recovered (restarts that went on), lost (steps whose loss differs or is
missing), seconds from a kill to the next step. Exit status 1 if anything was lost. Needs a checkout and Linux.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hllm_torchrec.logs import machine_info, read_log  # noqa: E402
from tests.training_fixtures import arguments  # noqa: E402

STEPS_PER_KILL = 40
"""More than a job takes in the seconds that it is given."""
SECONDS = 1.0
"""Kills come so long after the first step of a restart at most."""
GIVE_UP_AFTER = 120.0
"""Seconds without a step."""


@dataclass
class Tally:
    """What was done to a job and what became of it."""

    injected: int = 0
    in_a_write: int = 0
    at_the_start: int = 0
    recovered: int = 0
    seconds_to_resume: list[float] = field(default_factory=list)


def command(launcher: str, world: int, restarts: int, options: list[str]) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line, and the environment to run it in."""
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


def ranks_of(output: Path) -> dict[int, int]:
    """Rank -> process id of the job that trains into `output`."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(output).encode() in (process / "cmdline").read_bytes():
                variables = dict(pair.partition(b"=")[::2] for pair in (process / "environ").read_bytes().split(b"\0"))
                if b"LOCAL_RANK" in variables and b"TORCHELASTIC_RUN_ID" in variables:
                    found[int(variables[b"RANK"])] = int(process.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended
    return found


def events(output: Path, name: str) -> list[dict]:
    """The log's lines of one kind."""
    return [line for line in read_log(output) if line["event"] == name] if (output / "log.jsonl").exists() else []


class Job:
    """A training job under way."""

    def __init__(self, launcher: str, world: int, restarts: int, output: Path, options: list[str]) -> None:
        self.world, self.output = world, output
        words, env = command(launcher, world, restarts, options)
        self.printed = (output.parent / f"{output.name}.txt").open("w")
        self.process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=self.printed, stderr=subprocess.STDOUT)
        self.killed: set[int] = set()

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def new_ranks(self) -> dict[int, int]:
        """Wait until all ranks run that came after the last kill; nothing if the job has ended."""
        while self.running():
            found = ranks_of(self.output)
            if len(found) == self.world and not self.killed & set(found.values()):
                return found
            time.sleep(0.01)
        return {}

    def next_step(self, after: float) -> dict | None:
        """Wait for the first step of a start later than `after`; None if the job has ended."""
        begun = time.monotonic()
        while self.running():
            starts = [line["time"] for line in events(self.output, "start") if line["time"] > after]
            steps = [line for line in events(self.output, "step") if starts and line["time"] >= starts[-1]]
            if steps:
                return steps[0]
            if time.monotonic() - begun > GIVE_UP_AFTER:
                raise TimeoutError(f"no step for {GIVE_UP_AFTER:.0f} s; see {self.printed.name}")
            time.sleep(0.02)
        return None

    def kill(self, rank: int, ranks: dict[int, int]) -> None:
        """SIGKILL for one rank; all of this generation count as dead."""
        os.kill(ranks[rank], signal.SIGKILL)
        self.killed |= set(ranks.values())


def torment(job: Job, kills: int, rng: random.Random) -> Tally:
    """Kill ranks of a job until enough were killed or it has ended, then wait for its end."""
    tally, killed_at = Tally(), 0.0
    while job.running():
        ranks = job.new_ranks()
        early = tally.injected < kills and rng.random() < 0.2
        if early and ranks:
            time.sleep(rng.uniform(0, 5))
        else:
            step = job.next_step(killed_at)
            if step is None:
                break
            if killed_at:
                tally.seconds_to_resume.append(step["time"] - killed_at)
                tally.recovered = tally.injected
            if tally.injected >= kills:
                job.process.wait()
                break
            time.sleep(rng.uniform(0, SECONDS))
            if rng.random() < 0.5:
                wait_for_a_write(job)
        if not job.running():
            break
        writing = bool(list((job.output / "checkpoints").glob("*.tmp-*")))
        try:
            job.kill(rng.randrange(job.world), ranks)
        except ProcessLookupError:
            break  # it has just ended
        killed_at = time.time()
        tally.injected, tally.in_a_write = tally.injected + 1, tally.in_a_write + writing
        tally.at_the_start += early
    job.process.wait()
    return tally


def wait_for_a_write(job: Job) -> None:
    """Wait until a checkpoint is being written."""
    while job.running() and not list((job.output / "checkpoints").glob("*.tmp-*")):
        time.sleep(0.0005)


def losses(output: Path) -> list[tuple[int, float]]:
    """(step, loss) as the log has them."""
    return [(line["step"], line["loss"]) for line in events(output, "step")]


def soak(folder: Path, kills: int, world: int, launcher: str, asynchronous: bool, seed: int) -> dict:
    """A run that is left alone and one that is not, in `folder`; the report."""
    steps = STEPS_PER_KILL * (kills + 1)
    options = {"stages": [{"name": "soak", "epochs": 1000}], "max_steps": steps, "data__batch_users": 4 // world or 1}
    options |= {"evaluation__every": 1000, "evaluation__checkpoint_every": 1, "parallel__timeout": 60}
    options |= {"objective__head_dropout": 0.2, "objective__generative_weight": 0.5, "optim__ema": 0.9, "resume": True}
    options |= {"reliability__asynchronous_checkpoints": asynchronous}
    begun = time.monotonic()
    alone = Job(launcher, world, 0, folder / "alone", arguments(folder / "alone", **options))
    if alone.process.wait() != 0:
        raise RuntimeError(f"the run that was left alone failed; see {alone.printed.name}")
    killed = Job(launcher, world, kills + 5, folder / "killed", arguments(folder / "killed", **options))
    tally = torment(killed, kills, random.Random(seed))
    expected, found = losses(folder / "alone"), losses(folder / "killed")
    lost = len(set(expected) ^ set(found)) + abs(len(found) - len(expected))
    resumed = tally.seconds_to_resume
    return {
        "kills": {"injected": tally.injected, "in_a_write": tally.in_a_write, "at_the_start": tally.at_the_start},
        "recovered": tally.recovered,
        "lost": lost,
        "steps": steps,
        "exit_status": killed.process.returncode,
        "seconds_to_resume": {"median": statistics.median(resumed), "most": max(resumed)} if resumed else None,
        "world": world,
        "launcher": launcher,
        "asynchronous": asynchronous,
        "seconds": time.monotonic() - begun,
        "machine": machine_info(),
    }


def main() -> int:
    """Parse, soak, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--launcher", choices=["torchrun", "torchx"], default="torchrun")
    parser.add_argument("--asynchronous", action="store_true", help="checkpoints in the background")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.kills, options.world, options.launcher, options.asynchronous, options.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return int(found["lost"] > 0 or found["exit_status"] != 0)


if __name__ == "__main__":
    sys.exit(main())
