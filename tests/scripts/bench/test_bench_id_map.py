"""bench_id_map: both sides number the same ids."""

from tests.helpers.scripts import bench_module

bench_id_map = bench_module("bench_id_map")


def test_both_sides_number_all_ids_once(monkeypatch):
    monkeypatch.setattr(bench_id_map, "CHUNK", 100)
    assert bench_id_map.fill_id_map(250) == bench_id_map.fill_dict(250) == 250
