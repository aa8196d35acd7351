"""A killed service has lost nothing that it acknowledged."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hllm_torchrec.data.event_log import EventLog

WRITER = """
import sys
from pathlib import Path
from hllm_torchrec.data.event_log import EventLog, LoggedEvent

log = EventLog(Path(sys.argv[1]))
for number in range(100_000):
    log.append(f"u{number % 3}", [LoggedEvent(f"s{number}", number), LoggedEvent("s0", number)])
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 40])
def test_acknowledged_events_survive_a_kill_and_others_are_whole_or_not_there(after: int, tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(after)]
    time.sleep(0.003)
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    log = EventLog(path)
    found = [event for user in ("u0", "u1", "u2") for event in log.of_user(user)[0]]
    log.close()
    seconds = sorted(event.timestamp for event in found)
    assert acknowledged == list(range(len(acknowledged))) and len(acknowledged) >= after
    assert {*acknowledged} <= {*seconds}
    assert seconds == sorted(2 * list(range(len(seconds) // 2)))  # both events of an append, or none
