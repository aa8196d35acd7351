"""Disconnects one of two nodes and reconnects it, many times, and checks that training has lost nothing.

    bash scripts/reliability/soak_two_nodes.sh [--cuts 8] [--steps 150] [--timeout 10] [--out FILE]

The shell script creates the nodes: network namespaces with one address each, and a switch between them. Each node runs
an agent (torchrun, rendezvous c10d on node 1) with one rank; an agent that ends with an error is started again, as a
scheduler would do. A tiny model trains on a generated shop, and saves a checkpoint after every step. The cable of node
2 is disconnected

- for less than `parallel.timeout`: training may only pause;
- for longer: each rank must end with a line that names the rank and the step, and both must restart together;
- for longer, while the ranks of a restart are still connecting;
- for so long that the agents lose each other, too.

At the end the log must have every step once, with bitwise the same losses as those of an undisturbed run. Prints JSON:
cuts, recovered (cuts after which a step was completed), lost (steps whose loss differs, is missing or repeated), lines
that name rank and step, seconds from the reconnection to the next step. Exit status 1 if anything was lost or the job
failed.
"""

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "reliability")]

from soak import (  # noqa: E402
    ForkedJob,
    events,
    job_options,
    lost_steps,
    processes_of,
    seconds_of,
    soak_and_report,
    wait_until,
)

from hllm_torchrec.common.machine import machine_info  # noqa: E402
from tests.helpers.training_fixtures import arguments  # noqa: E402

STOPPED = re.compile(r"train: rank (\d+) stops after step (\d+) because of another rank")
LASTS = {"short": (0.1, 0.5), "long": (1.3, 2.5), "at the start": (1.3, 2.5), "very long": (7, 9)}
"""Kind of cut -> smallest and largest duration in units of `--timeout`; agents give up after 60 seconds."""
ADDRESS = "10.86.0.1"


class Agent:
    """torchrun on one node; it is started again whenever it ends with an error."""

    def __init__(self, space: str, number: int, output: Path, options: list[str]) -> None:
        conf = f"is_host={int(number == 0)},join_timeout=300,last_call_timeout=1"
        job = ["ip", "netns", "exec", space, str(Path(sys.executable).parent / "torchrun"), "--nnodes", "2"]
        job += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESS}:29400"]
        job += ["--rdzv_id", "soak", "--rdzv_conf", conf, "--local_addr", f"10.86.0.{number + 1}"]
        self._command = [*job, "--max_restarts", "1000", "--monitor_interval", "0.5", "train.py", *options]
        self.printed = output.parent / f"{output.name}-node-{number + 1}.txt"
        self.starts, self.status, self._process = 0, None, None
        self._stopped = False
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def _supervise(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        while not self._stopped and self.status != 0:
            with self.printed.open("a") as printed:
                self._process = subprocess.Popen(
                    self._command, env=env, cwd=ROOT, stdout=printed, stderr=printed, start_new_session=True
                )
            self.starts += 1
            self.status = self._process.wait()

    def running(self) -> bool:
        """True until torchrun has ended without an error."""
        return self._supervisor.is_alive()

    def stop(self) -> None:
        """End the agent and its ranks, if they are still running."""
        self._stopped = True
        for process in processes_of(self.printed.parent):
            if process.name != str(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
        self._supervisor.join()


class Cable:
    """The cable between node 2 and the switch. When it is disconnected, the nodes get no packets and no errors."""

    def __init__(self, switch: str) -> None:
        self._port = ["ip", "-n", switch, "link", "set", "port2"]

    def out_for(self, seconds: float) -> float:
        """Disconnect the cable for `seconds`; return the time at which it was connected again."""
        subprocess.run([*self._port, "down"], check=True)
        time.sleep(seconds)
        subprocess.run([*self._port, "up"], check=True)
        return time.time()


def next_step(output: Path, agents: list[Agent], after: float) -> dict | None:
    """Wait for the first step later than `after`; None if the job has ended."""
    return wait_until(
        lambda: next((line for line in events(output, "step") if line["time"] > after), None),
        lambda: all(agent.running() for agent in agents),
        f"step in {output}",
    )


def torment(output: Path, agents: list[Agent], cable: Cable, wanted: argparse.Namespace) -> dict:
    """Disconnect and reconnect node 2 until there were enough cuts or the job has ended; wait for the job's end."""
    rng, back = random.Random(wanted.seed), 0.0
    cuts, resumed = dict.fromkeys(LASTS, 0), {kind: [] for kind in LASTS}
    for kind in islice(cycle(LASTS), wanted.cuts):
        if next_step(output, agents, back) is None:
            break
        time.sleep(rng.uniform(0, 1))
        if kind == "at the start":  # an additional cut first, which makes the ranks restart
            cable.out_for(1.5 * wanted.timeout)
            time.sleep(rng.uniform(0, wanted.timeout))
        seconds = rng.uniform(*LASTS[kind]) * wanted.timeout
        print(f"cut {sum(cuts.values()) + 1}: {kind}, {seconds:.0f} s", file=sys.stderr, flush=True)
        back = cable.out_for(seconds)
        cuts[kind] += 1
        step = next_step(output, agents, back)
        if step is not None:
            resumed[kind].append(step["time"] - back)
    wait_until(lambda: None, lambda: any(agent.running() for agent in agents), f"end of {output} after the last cut")
    return {
        "cuts": cuts,
        "recovered": sum(map(len, resumed.values())),
        "seconds_to_resume": {kind: seconds_of(found) for kind, found in resumed.items() if found},
    }


def soak(folder: Path, wanted: argparse.Namespace) -> dict:
    """Run an undisturbed job and one whose nodes are disconnected, in `folder`; return the report."""
    options = job_options(wanted.steps, batch_users=2, timeout=wanted.timeout)
    begun = time.monotonic()
    if ForkedJob(2, 0, folder / "alone", arguments(folder / "alone", **options)).wait() != 0:
        raise RuntimeError("the undisturbed run failed")
    output = folder / "cut"
    agents = [
        Agent(space, number, output, arguments(output, **options)) for number, space in enumerate(wanted.spaces[:2])
    ]
    try:
        found = torment(output, agents, Cable(wanted.spaces[2]), wanted)
    except TimeoutError:
        for agent in agents:
            print(agent.printed.read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        for agent in agents:
            agent.stop()
    printed = "".join(agent.printed.read_text() for agent in agents)
    stopped = [(int(rank), int(step)) for rank, step in STOPPED.findall(printed)]
    return {
        "command": wanted.command,
        **found,
        "lost": lost_steps(folder / "alone", output),
        "lines_that_name_rank_and_step": {str(rank): sum(own == rank for own, _ in stopped) for rank in (0, 1)},
        "tracebacks": printed.count("Traceback (most recent call last)"),
        "starts": {"agents": [agent.starts for agent in agents], "training": len(events(output, "start"))},
        "exit_status": max(abs(agent.status or 0) for agent in agents),
        "steps": wanted.steps,
        "timeout": wanted.timeout,
        "seconds": time.monotonic() - begun,
        "machine": machine_info(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs=3, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--cuts", type=int, default=8, help="number of cuts, which are of each kind in turn")
    parser.add_argument("--steps", type=int, default=150, help="steps of the job, which may end before the last cut")
    parser.add_argument("--timeout", type=float, default=10, help="parallel.timeout in seconds")
    parser.add_argument("--seed", type=int, default=0, help="random seed of times and durations")
    parser.add_argument("--out", type=Path, help="add the JSON to the list in this file")
    wanted = parser.parse_args(arguments)
    given = {name: getattr(wanted, name) for name in ("cuts", "steps", "timeout", "seed")}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", f"{value:g}")]
    wanted.command = shlex.join(["bash", "scripts/reliability/soak_two_nodes.sh", *words])
    return wanted


if __name__ == "__main__":
    sys.exit(soak_and_report(soak, parse()))
