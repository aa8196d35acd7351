"""bench_nights: the steps of nights are timed, after histories of two lengths."""

import json
from pathlib import Path

import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.lifecycle.night_state import STEPS
from tests.helpers.scripts import bench_module, tiny_result


@pytest.mark.slow
def test_every_step_of_a_night_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, out = bench_module("bench_nights"), tmp_path / "nights.json"
    monkeypatch.setattr("sys.argv", ["bench_nights.py", "--tiny", "--out", str(out)])
    try:
        bench.main()
    finally:
        destroy_distributed()
    found = tiny_result("nights", out, capsys.readouterr().out)
    first, second = found["seconds"]
    assert second["events"] > first["events"] > 0
    assert all(min(one[step]) > 0 for one in (first, second) for step in STEPS)
    assert json.dumps(found["ratios"]).count("night_") == 2
