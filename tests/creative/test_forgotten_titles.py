"""`hllm forget` in clusters and titles: no id remains, and a center that only a new fit can remove is reported."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hllm_torchrec.creative.clusters import Clusters
from hllm_torchrec.creative.titles import Creatives
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import cli
from tests.helpers import creative_fixtures
from tests.helpers.title_fixtures import copied, done, world


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_users_leave_clusters_and_items_leave_titles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles, clusters = copied("titles", tmp_path), copied("clusters", tmp_path)
    shutil.copytree(creative_fixtures.shop().root, tmp_path / "shop")
    before = Creatives.open(titles)
    user, other = before.clusters.users["raw_user_id"].to_pylist()[:2]
    forget = ["forget", "--dataset", str(tmp_path / "shop"), "--user", user, "--item", "s3", "--stores", str(tmp_path)]
    capsys.readouterr()
    assert cli.main([*forget, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "clusters of users: 1 found" in said and f"{titles}: titles: 3 found" in said
    assert Clusters.open(clusters).of(user) >= 0
    (titles / "rounds" / "a.parquet").write_bytes(b"")
    assert cli.main([*forget, "--erase"]) == 0
    said = capsys.readouterr().out
    assert "clusters of users: 1 found" in said and "none is left" in said
    now = Creatives.open(titles)
    assert now.clusters.of(user) == -1 and now.get(user, "s4") == now.get(None, "s4")
    assert now.clusters.of(other) == before.clusters.of(other) >= 0
    assert now.of_item("s3") == [] and len(now) == len(before) - 3 == now.facts["titles"]
    assert now.of_item("s4") == before.of_item("s4") and not any((titles / "rounds").iterdir())
    # The center stays until the next fit.
    assert now.clusters.fingerprint == before.clusters.fingerprint
    assert sum(now.clusters.facts["sizes"]) == sum(before.clusters.facts["sizes"]) - 1


def test_a_center_that_is_a_forgotten_users_vector_is_left_until_the_next_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = copied("users", tmp_path)
    cluster = ["cluster", "--users", str(users), "--output", str(tmp_path / "clusters")]
    done([*cluster, "--clusters", "3", "--least", "2", "--center", "medoid"])
    shutil.copytree(creative_fixtures.shop().root, tmp_path / "shop")
    person = Clusters.open(tmp_path / "clusters").facts["medoids"][0]
    forget = ["forget", "--dataset", str(tmp_path / "shop"), "--user", person, "--stores", str(tmp_path)]
    for _ in range(2):  # also once the assignment is gone
        capsys.readouterr()
        assert cli.main(forget) == 1
        assert "LEFT: 1 centers are vectors of forgotten users: fit again (hllm cluster --refit)" in (
            capsys.readouterr().out
        )
    done([*cluster, "--refit"])
    assert cli.main([*forget, "--erase"]) == 0
    assert world().exists()
