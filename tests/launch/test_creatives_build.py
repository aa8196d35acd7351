"""`hllm creatives build --writer openai` against a scripted server on this machine."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hllm_torchrec.data.creative_table import CreativeTable
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.launch import creatives
from hllm_torchrec.launch.entry import PREEMPTED
from tests.helpers import fixtures
from tests.helpers.completion_server import CompletionServer, completion, completion_server, honest
from tests.helpers.creative_fixtures import tiny_model


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures.dataset().root, tmp_path / "shop"))


def build(shop: Path, server: CompletionServer, *more: str, name: str = "mine") -> int:
    given = ["--dataset", str(shop), "--name", name, "--writer", "openai", "--base-url", server.url, "--model", "m"]
    return creatives.main(["build", *given, "--least", "1", *more])


def test_a_table_is_written_by_a_server(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with completion_server() as server:
        assert build(shop, server) == 0
    said = capsys.readouterr().out
    dataset = Dataset.open(shop)
    table = CreativeTable.open(dataset, "mine")
    rows = [row for split in ("train", "valid", "test") for row in table.part(split).rows.to_pylist()]
    dropped = pq.read_table(table.path / "dropped.parquet").to_pylist()
    assert f"{len(rows)} texts (train" in said and f"; {len(dropped)} left out" in said
    assert {row["origin"] for row in rows} == {"llm:m"} and len(rows) > 5
    assert all(json.loads(row["profile"])["summary"] == "summary of this reader" for row in rows)
    titles = dict(
        zip(dataset.items["raw_item_id"].to_pylist(), dataset.text(["title"])["title"].to_pylist(), strict=True)
    )
    for row in rows:
        assert row["response"].startswith(" ".join(reversed(titles[row["raw_item_id"]].split())))
    counts = table.manifest["left_out"]
    assert sum(map(len, (row["reasons"] for row in dropped))) == sum(counts.values()) and set(counts)
    assert creatives.main(["show", "--dataset", str(shop), "--name", "mine", "--dropped", "--rows", "1"]) == 0
    assert capsys.readouterr().out == (
        f"user {dropped[0]['raw_user_id']}, item {dropped[0]['raw_item_id']}: {dropped[0]['response']} "
        f"[{'; '.join(dropped[0]['reasons'])}]\n"
    )
    # The writer knows titles, and no ids of users or items.
    sent = json.dumps(server.requests)
    assert not any(f'"{raw}"' in sent or f" {raw} " in sent for raw in dataset.users["raw_user_id"].to_pylist())
    assert set(server.paths) == {"/v1/chat/completions"}


def test_a_budget_stops_and_the_same_command_goes_on(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with completion_server() as server:
        assert build(shop, server, name="whole") == 0
        at_once = len(server.requests)
        assert build(shop, server, "--max-requests", "7") == PREEMPTED
        assert "--max-requests 7 is reached: answers so far are kept" in capsys.readouterr().err
        assert not (shop / "creatives" / "mine").exists()
        assert build(shop, server) == 0
        assert len(server.requests) == 2 * at_once
    mine, whole = (CreativeTable.open(Dataset.open(shop), name) for name in ("mine", "whole"))
    assert all(mine.part(split).rows.equals(whole.part(split).rows) for split in ("train", "valid", "test"))


def test_the_key_is_sent_and_written_nowhere(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-4f5d6c7b8a90"
    monkeypatch.setenv("SHOP_KEY", key)

    def respond(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        return (400, f"who is {key}?".encode(), {}) if number == 3 else honest(body, number)

    with completion_server(respond) as server:
        assert build(shop, server, "--key-from", "SHOP_KEY", "--at-once", "1") == 0
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    with completion_server(lambda *_: (401, f"no {key}".encode(), {})) as server:
        assert build(shop, server, "--key-from", "SHOP_KEY", name="other") == 2
    said = capsys.readouterr()
    assert "the key is refused (no ***)" in said.err and key not in said.out + said.err
    files = [path for path in shop.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if key.encode() in path.read_bytes()]


def test_two_builds_of_a_table_do_not_run_at_once(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def respond(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        begun.set()
        go_on.wait(20)
        return honest(body, number)

    with completion_server(respond) as server:
        first = threading.Thread(target=build, args=(shop, server))
        first.start()
        try:
            assert begun.wait(20)
            assert build(shop, server) == 2
            assert "another process is building this table (process" in capsys.readouterr().err
            with pytest.raises(ValueError, match="another process is building this table"):
                forget(shop, Names(users=["u1"]))
        finally:
            go_on.set()
            first.join()
    assert (shop / "creatives" / "mine" / "manifest.json").is_file()


def test_forgetting_reaches_the_answers(shop: Path) -> None:
    with completion_server() as server:
        assert build(shop, server) == 0
    files = sorted((shop / "creatives" / ".answers" / "mine").glob("*.jsonl"))
    before = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    user = before[files[0]][0]["user"]
    item = next(one["item"] for one in before[files[1]] if one["user"] != user)
    forget(shop, Names(users=[user], items=[item]))
    for file, lines in before.items():
        kept = [json.loads(line) for line in file.read_text().splitlines()]
        assert kept == [one for one in lines if one["user"] != user and one["item"] != item] and len(kept) < len(lines)
    assert [file.name for file in files] == ["profile.jsonl", "propose.jsonl"]


def test_histories_that_leave_the_machine_are_announced_first(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "far_writers.py").write_text(
        "class Far:\n    name, leaves_machine = 'llm:far', 'far.example'\n"
        "    def write(self, asked):\n        raise ValueError(f'{len(asked)} asked')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--dataset", str(shop), "--name", "far", "--writer", "far_writers:Far", "--history", "7", "--least", "1"]
    assert creatives.main(["build", *given]) == 2
    announced, error = capsys.readouterr().err.splitlines()
    assert announced.startswith("titles of up to 7 liked items of each of")
    assert announced.endswith("(no ids) and facts of items are sent to far.example") and "asked" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recent", "5"], "--recent belongs to --writer template, not to openai; leave it out"),
        (["--writer", "template"], "--model belongs to --writer openai and local, not to template; leave it out"),
        (["--writer", "opnai"], "--writer 'opnai': must be one of template, openai, local"),
        (["--support", "2"], "--support 2.0: must be from 0 to 1"),
        (["--fractions", "0.5", "0.5", "0.5"], "three shares that sum to 1, none negative, the share of train"),
        (["--name", "../../x"], "--name '../../x': must consist of letters, digits"),
        (["--title", "name"], "--title name: no text column of"),
        (["--least", "1000"], "no like has 1000 earlier likes and a title; lower --least"),
        (["--allowed", "none.txt"], "none.txt"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: list[str], message: str, shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with completion_server() as server:
        assert build(shop, server, *options) == 2
    assert message in capsys.readouterr().err and not server.requests


def test_filters_are_options(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words.txt"
    words.write_text("wonderful\n")

    def respond(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        status, data, headers = honest(body, number)
        text = json.loads(data)["choices"][0]["message"]["content"]
        return status, completion(text.replace("for fans of", "wonderful for")), headers

    with completion_server(respond) as server:
        assert build(shop, server, name="strict") == 2
        said = capsys.readouterr().err
        assert "no text is left of" in said and ": words that the facts do not have" in said
        paid = len(server.requests)
        # Other filters ask for nothing again where the prompt stays the same.
        shutil.copytree(shop / "creatives" / ".answers" / "strict", shop / "creatives" / ".answers" / "loose")
        assert build(shop, server, "--allowed", str(words), "--alike", "0", name="loose") == 0
        assert len(server.requests) == paid
    made = CreativeTable.open(Dataset.open(shop), "loose").manifest
    assert sum(made["counts"].values()) > 10 and made["filters"]["allowed"] == 1


def test_a_model_on_this_machine_writes(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dataset", str(shop), "--name", "mine", "--writer", "local", "--least", "1", "--answer-tokens", "4"]
    assert creatives.main(["build", *given]) == 2
    assert "--model is missing: the directory of a language model" in capsys.readouterr().err
    # A random model writes no JSON: each prompt is asked once, and the reasons are counted.
    model = ["--model", str(tiny_model()), "--temperature", "0", "--users", "3", "--history", "1"]
    assert creatives.main(["build", *given, *model]) == 2
    assert "no text is left of 3 (3: profile: no " in capsys.readouterr().err
