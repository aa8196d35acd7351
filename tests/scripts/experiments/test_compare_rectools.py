"""What RecTools is given of a dataset, and how its recommendations become ranks that our table reads."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hllm_torchrec.evaluation.retrieval_comparison import gains, read_target_ranks
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module

SCRIPT = Path(__file__).parents[3] / "scripts" / "experiments" / "compare_rectools.py"


@pytest.fixture
def script() -> ModuleType:
    return bench_module("compare_rectools")


def test_the_script_runs_where_this_library_is_not_installed() -> None:
    run = "import runpy, sys; sys.modules['hllm_torchrec'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--settings" in done.stdout, done.stderr


def test_targets_are_the_last_events_and_histories_grow_by_one_from_part_to_part(script: ModuleType) -> None:
    dataset = fixtures.dataset("leave_one_out")
    valid, test = (script.read_part(dataset.root, split) for split in ("valid", "test"))
    pieces = {piece.user_id: piece for piece in fixtures.pieces("test", "leave_one_out")}
    assert len(pieces) == test.user_id.size > 1
    for row, user in enumerate(test.user_id.tolist()):
        whole = pieces[user].item_ids
        assert test.histories[row].tolist() == whole[:-1].tolist() and test.target[row] == whole[-1]
        assert test.position[row] == whole.size - 1
    before = dict(zip(valid.user_id.tolist(), zip(valid.histories, valid.target, strict=True), strict=True))
    assert len(before) > 1
    for user, history in zip(test.user_id.tolist(), test.histories, strict=True):
        if user in before:
            assert [*before[user][0].tolist(), before[user][1]] == history.tolist()


def test_interactions_keep_the_order_of_events_that_share_a_second(script: ModuleType) -> None:
    part = script.Part(np.array([3, 7]), np.array([2, 1]), np.array([1, 1]), [np.array([5, 2]), np.array([9])])
    frame = script.interactions(part)
    assert frame["user_id"].tolist() == [3, 3, 7] and frame["item_id"].tolist() == [5, 2, 9]
    assert np.diff(frame["datetime"])[0] > np.timedelta64(0) and frame["weight"].tolist() == [1, 1, 1]


def test_ranks_are_places_among_the_recommendations_and_go_to_the_table(script: ModuleType, tmp_path: Path) -> None:
    part = script.Part(np.array([3, 7, 8]), np.array([4, 1, 2]), np.array([11, 12, 13]), [])
    users, items = np.array([7, 7, 3, 3, 3]), np.array([10, 12, 11, 12, 10])
    ranks = script.ranks_of_targets(part, users, items, np.array([1, 2, 1, 2, 3]), candidates=20)
    assert ranks.tolist() == [1, 2, 20]  # nothing was recommended to user 8: the last place
    script.write_ranks(part, ranks, tmp_path / "ranks")
    read = read_target_ranks(tmp_path / "ranks")
    assert (read.user_id.tolist(), read.position.tolist(), read.rank.tolist()) == ([3, 7, 8], [4, 1, 2], [1, 2, 20])
    found = script.metrics_of(ranks)
    for name in ("recall@10", "ndcg@10", "ndcg@50"):
        assert found[name] == pytest.approx(gains(ranks, name).mean())


def test_a_dataset_of_another_split_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"split": {"rule": "time"}}))
    with pytest.raises(ValueError, match="split by 'time'; prepare one with --split leave_one_out"):
        script.read_part(tmp_path, "valid")
