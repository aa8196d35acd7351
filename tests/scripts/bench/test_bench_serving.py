"""bench_serving: both sides give the same scores, and the JSON has the ratios asked of it."""

import json
from pathlib import Path

import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed
from tests.helpers.scripts import bench_module
from tests.helpers.served_runs import trained

bench_serving = bench_module("bench_serving")


@pytest.mark.slow  # a training run
@pytest.mark.parametrize(("kind", "more"), [("late", []), ("evidence", ["--untrained", "late"])])
def test_bench_serving_ends_with_its_json(
    kind: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained(kind)
    destroy_distributed()
    given = ["--tiny", "--run", str(run), "--candidates", "7", "--batch", "4", "--out", str(tmp_path / "o"), *more]
    bench_serving.main(given)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "o").read_text()) == found
    assert found["ratios"].keys() == {"engine_vs_scorer", "engine_one_vs_scorer"}
    assert found["shapes"]["fusion"] == "late"
    assert min(found["ratios"].values()) > 0 and found["largest_score_difference"] < 1e-4
    assert all(0 < share < 1 for share in found["outside_model"].values())
