"""bench_appends: days are appended, prepared alone and compacted, and the JSON has every ratio."""

import json

from tests.helpers.scripts import bench_module

bench_appends = bench_module("bench_appends")
KINDS = ("", "_beside_parquet")


def test_bench_appends_ends_with_its_json(tmp_path, capsys):
    out = tmp_path / "out.json"
    bench_appends.main(["--tiny", "--out", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["shapes"] == {"before": 2_000, "days": 5, "events_a_day": 100}
    reads = {f"{name}_{part}{kind}" for name in ("read", "read_worst") for part in ("train", "test") for kind in KINDS}
    wanted = {"append_400_after_2000", "append_year"} | reads
    assert result["ratios"].keys() == wanted and min(result["ratios"].values()) > 0
