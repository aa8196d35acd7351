"""creator_kinds: one kind keeps nothing, and a kind for each history keeps everything."""

import pytest

from hllm_torchrec.creative.template import TemplateRule, write_by_template
from hllm_torchrec.data.creative_table import write_table
from tests.helpers import creative_fixtures
from tests.helpers.scripts import bench_module

creator_kinds, creator_probe = bench_module("creator_kinds"), bench_module("creator_probe")


@pytest.mark.slow
def test_one_kind_keeps_nothing_and_one_for_each_history_everything() -> None:
    dataset = creative_fixtures.shop("leave_one_out")
    rows, _ = write_by_template(dataset, TemplateRule(least=1, template="{value}"))
    write_table(dataset, "genres", {"train": rows})
    texts = creator_probe.Texts(dataset, "train")
    different = len({tuple(row) for row in texts.counts["20 likes"].tolist()})
    found = creator_kinds.kept(texts, texts, [1, different])
    assert found["right"] < found["nothing"] - 0.05
    assert found["kept 1"] == pytest.approx(0.0, abs=0.02) and found[f"kept {different}"] == pytest.approx(1, abs=0.02)
