"""scripts/reliability/kills.py on a few kills: every writer but the night, which tests/lifecycle kills."""

import json
import os
from pathlib import Path

import pytest

from tests.helpers.scripts import bench_module


@pytest.mark.slow
def test_a_few_kills_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kills = bench_module("kills")
    assert kills.main(["--kills", "9", "--only", "append", "compact", "forget"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kills"] >= 9 and found["failed"] == 0
    assert all(one["kills"] >= 2 for one in found["writers"].values())


@pytest.mark.slow
def test_a_writer_that_does_not_finish_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = bench_module("kills")
    whole, here, calls = kills.WRITERS["append"], os.getpid(), []

    def act(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1 or os.getpid() != here:  # undisturbed, or killed; but not after the kill
            whole.act(folder)

    monkeypatch.setitem(kills.WRITERS, "append", kills.Writer(whole.begin, act, whole.state))
    assert kills.main(["--kills", "1", "--only", "append"]) == 1
    assert "another state than undisturbed" in capsys.readouterr().err
