"""Titles in answers of the service: the user's cluster's, refreshed on their own, of nobody who was forgotten."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from hllm_torchrec.creative.forgotten_titles import forget_items, forget_users
from hllm_torchrec.creative.titles import Creatives
from hllm_torchrec.data.event_log import EventLog
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import cli
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.reload import Reloader
from hllm_torchrec.serving.served_titles import ServedTitles
from hllm_torchrec.serving.service import Service
from tests.helpers.title_fixtures import copied, create, done, world

TOKEN = "a secret of ours"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_a_recommendation_has_the_title_of_the_users_cluster(tmp_path: Path) -> None:
    run = world() / "run"
    copied("clusters", tmp_path)
    (tmp_path / "ids.txt").write_text("s1\n")
    done(create(tmp_path / "few", "--items", str(tmp_path / "ids.txt"), clusters=str(tmp_path / "clusters")))
    few = Creatives.open(tmp_path / "few")
    user = few.clusters.users["raw_user_id"][0].as_py()
    with BatchScorer.of_run(run) as scorer:
        log = EventLog(tmp_path / "events.sqlite")
        titled = ServedTitles(tmp_path / "few")
        service = Service(Engine(scorer, log), BatchLimits(deadline=60.0), TOKEN, titles=titled)
        reloader = Reloader(service, lambda: Engine(scorer, log))
        with TestClient(create_app(service, None, reloader), headers=HEADERS) as client:

            def titles(**more: object) -> dict[str, str | None]:
                answer = client.post("/v1/recommend", json={"user": user, "top": 40, "seen_too": True} | more)
                assert answer.status_code == 200, answer.text
                return {item["item"]: item["title"] for item in answer.json()["items"]}

            assert titles()["s1"] == few.get(user, "s1").text and titles()["s2"] is None
            assert titles(user=None)["s1"] == titles(user="nobody")["s1"] == few.get(None, "s1").text
            (tmp_path / "ids.txt").write_text("s1\ns2\n")
            line = create(tmp_path / "few", "--items", str(tmp_path / "ids.txt"), clusters=str(tmp_path / "clusters"))
            done(line)
            assert titles()["s2"] is None
            assert client.post("/v1/reload").status_code == 200
            assert titles()["s2"] == Creatives.open(tmp_path / "few").get(user, "s2").text
            # Titles that cannot be served leave those in use, and the model is loaded all the same.
            (tmp_path / "few" / "titles" / "titles.json").write_text("{}")
            assert client.post("/v1/reload").status_code == 200 and titles()["s2"] is not None
            assert client.delete(f"/v1/users/{user}").status_code == 200
            assert titles()["s1"] == few.get(None, "s1").text
            service.titles = None
            plain = client.post("/v1/recommend", json={"user": user, "top": 2}).json()["items"][0]
            assert plain.keys() == {"item", "text", "score", "probability"}


def test_titles_are_watched(tmp_path: Path) -> None:
    titles, clusters = copied("titles", tmp_path), copied("clusters", tmp_path)
    served, stop, said = ServedTitles(titles), threading.Event(), []
    gone, reported = clusters.rename(tmp_path / "away"), threading.Event()

    def say(text: object) -> None:
        said.append(str(text))
        if len(said) == 1:
            gone.rename(clusters)
            (titles / "titles" / "titles.json").open("a").write("\n")
        else:
            stop.set()
            reported.set()

    watching = threading.Thread(target=served.watch, args=(0.01, stop, say))
    watching.start()
    assert reported.wait(30)
    watching.join()
    assert "the titles stay" in said[0] and "120 titles of" in said[1]


def test_a_link_is_an_alias_of_titles_with_clusters_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    titles, again = copied("titles", tmp_path), copied("titles", tmp_path / "second")
    folders = [copied("clusters", tmp_path), copied("clusters", tmp_path / "second")]
    link = tmp_path / "current"
    link.symlink_to("titles")
    served = ServedTitles(link)
    person = Creatives.open(titles).clusters.users["raw_user_id"][0].as_py()
    forget_users(folders[1], [person])
    forget_items(again, ["s1"])
    assert not served.refresh() and served.of(person, ["s1"]) != [None]
    link.unlink()
    link.symlink_to("second/titles")
    assert served.refresh() and served.of(person, ["s1"]) == [None]
    assert Creatives.open(link).clusters.path == folders[1]


def test_serve_without_titles_in_the_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["serve", "--run", str(tmp_path), "--creatives", str(tmp_path)]
    assert cli.main(line) == 2
    assert "no titles (no titles/titles.json); write them with `hllm create`" in capsys.readouterr().err
