"""Lookup of titles for users, after the steps embed, cluster and create."""

from collections.abc import Iterator

import pytest

from hllm_torchrec.creative.titles import Creatives
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import cli
from tests.helpers import creative_fixtures
from tests.helpers.title_fixtures import world


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_a_user_gets_the_title_of_the_own_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    creatives = Creatives.open(world() / "titles")
    items = creative_fixtures.shop().items["raw_item_id"].to_pylist()
    users = creatives.clusters.users["raw_user_id"].to_pylist()
    for item in items:
        titles = creatives.of_item(item)
        assert titles[0].cluster == -1 and len(titles) == 3
        for user in users:
            own = [one for one in titles if one.cluster == creatives.clusters.of(user)]
            assert creatives.get(user, item) == (own or titles)[0]
        assert creatives.get("nobody", item) == creatives.get(None, item) == titles[0]
    with pytest.raises(KeyError, match="item 'nothing': .* has no titles of it"):
        creatives.get(users[0], "nothing")
    capsys.readouterr()
    given = ["creatives", "titles", "--creatives", str(world() / "titles"), "--item", items[0]]
    assert cli.main(given) == 0 and len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main([*given, "--user", users[0]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
