"""bench_hstu: jagged and padded compute the same, and the JSON has the ratios by length."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import fixtures
from tests.helpers.scripts import bench_module, tiny_result

bench_hstu = bench_module("bench_hstu")


def test_bench_hstu_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hstu.json"
    bench_hstu.main(["--tiny", "--out", str(out), "--dataset", str(fixtures.dataset().root)])
    result = tiny_result("hstu", out, capsys.readouterr().out)
    for name in ("ml_12", "ml_24", "power_12", "power_24"):
        ratios = {f"{pair}_{name}{part}" for pair in PAIRS for part in ("", "_forward")}
        assert ratios <= set(result["ratios"])
        point = result["points"][name]
        assert max(point["lengths"]) == int(name.split("_")[1]) and set(point["seconds"]) == SIDES
        assert 0.95 < point["parameters"]["softmax"] / point["parameters"]["hstu"] < 1.15
    assert result["memory"]["padded"] > 0 and result["cuda"] == "there is none"


PAIRS = ("padded_vs_hstu", "softmax_vs_hstu", "softmax_vs_plain")
SIDES = {"hstu", "plain", "softmax", "padded"}


def test_groups_of_padded_users_are_the_whole_batch() -> None:
    batch = bench_hstu.make_batch([9, 5, 2], 16)
    encoder = bench_hstu.encoders(16, 9)["hstu"]
    whole, grouped = bench_hstu.Padded(encoder, batch), bench_hstu.Padded(encoder, batch)
    grouped.group = 2
    parts = list(grouped(batch.x))
    assert [len(part) for part in parts] == [14, 2]
    torch.testing.assert_close(torch.cat(parts), next(whole(batch.x)), rtol=1e-5, atol=1e-6)


def test_lengths_follow_the_data_or_a_power_law() -> None:
    histories = np.array([1, 2, 3, 4, 100])
    assert bench_hstu.lengths_of("power", 100, 4, histories) == [100, 50, 33, 25]
    found = bench_hstu.lengths_of("ml", 50, 5, histories)
    assert found[0] == 50 and found == sorted(found, reverse=True) and found[-1] <= 2
