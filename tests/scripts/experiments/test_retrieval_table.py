"""The retrieval table's script knows its models, and which runs are complete."""

from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.scripts import bench_module


@pytest.fixture
def script() -> ModuleType:
    return bench_module("retrieval_table")


def test_every_model_of_the_table_has_a_configuration(script: ModuleType) -> None:
    assert [name for name in script.MODELS if not (script.CONFIGS / f"{name}.yaml").is_file()] == []


def test_a_run_counts_once_it_was_evaluated(script: ModuleType, tmp_path: Path) -> None:
    for name in ("hstu-0", "hstu-2", "sasrec-0"):
        (tmp_path / name).mkdir()
    for name in ("hstu-0", "hstu-2"):
        (tmp_path / name / "metrics.json").write_text("{}")
    found = script.finished(tmp_path, ["sasrec", "hstu"], [0, 1, 2])
    assert found == {"hstu": [tmp_path / f"hstu-{seed}" / "retrieval" / "test" for seed in (0, 2)]}
