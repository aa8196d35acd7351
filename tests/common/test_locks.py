"""Locks: who holds one is named, a wait is announced and ends."""

import os
import socket
import threading
from pathlib import Path

import pytest

from hllm_torchrec.common import locks
from hllm_torchrec.common.locks import Locked, hold_lock, lock_wait


def test_the_holder_is_named(tmp_path: Path) -> None:
    holder = rf"process {os.getpid()} on {socket.gethostname()} since 20\d\d-.*\+00:00\): wait for it, or stop it$"
    with hold_lock(tmp_path / "lock", "runs/a: busy"), pytest.raises(Locked, match=rf"^runs/a: busy \({holder}"):
        with hold_lock(tmp_path / "lock", "runs/a: busy"):
            pass
    with hold_lock(tmp_path / "lock", "runs/a: busy"):  # free again
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_wait_is_announced_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_FIRST_NOTICE", 0.1)
    with hold_lock(tmp_path / "lock", "copy: in use"):
        with pytest.raises(Locked, match="waited for 0 seconds .HLLM_LOCK_WAIT."):
            with hold_lock(tmp_path / "lock", "copy: in use", wait=0.3):
                pass
    assert capsys.readouterr().err.startswith(f"waiting: copy: in use (process {os.getpid()} on ")


def test_a_wait_goes_on_when_the_holder_is_done(tmp_path: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with hold_lock(tmp_path / "lock", "x"):
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    threading.Timer(0.2, done.set).start()
    with hold_lock(tmp_path / "lock", "x", wait=10.0):
        pass
    thread.join()


def test_the_longest_wait_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock_wait() == 3600
    monkeypatch.setenv("HLLM_LOCK_WAIT", "5")
    assert lock_wait() == 5
    monkeypatch.setenv("HLLM_LOCK_WAIT", "soon")
    with pytest.raises(ValueError, match="HLLM_LOCK_WAIT: 'soon' is not a number of seconds"):
        lock_wait()
