"""`OpenAIWriter`: repeated requests, errors that end a build, limits, secrecy of the key."""

import threading
from typing import Any

import pytest

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.creative.writing.openai_writer import Budget, Endpoint, OpenAIWriter
from hllm_torchrec.creative.writing.writer import Answer, Ask
from tests.helpers.completion_server import CompletionServer, Respond, completion, completion_server

KEY = "sk-0123456789abcdef"


def asks(number: int) -> list[Ask]:
    return [Ask("propose", "system", f"prompt {i}", "u1") for i in range(number)]


def writer(server: CompletionServer, budget: Budget | None = None, **settings: Any) -> OpenAIWriter:
    return OpenAIWriter(Endpoint(server.url, "m", **{"pause": 0.001, "tries": 3, "timeout": 5.0} | settings), budget)


def answered(respond: Respond, number: int = 1, **settings: Any) -> tuple[list[Answer], CompletionServer]:
    with completion_server(respond) as server:
        found = list(writer(server, **settings).write(asks(number)))
    return sorted(found, key=lambda answer: answer.index), server


def echo(body: dict[str, Any], _: int) -> tuple[int, bytes, dict[str, str]]:
    return 200, completion(body["messages"][1]["content"].upper()), {}


def test_every_prompt_gets_its_own_answer() -> None:
    found, server = answered(echo, 12, at_once=4)
    assert [answer.text for answer in found] == [f"PROMPT {i}" for i in range(12)]
    assert found[0].tokens == (30, 10)
    asked = server.requests[0]
    assert asked["model"] == "m" and asked["max_tokens"] == 512 and asked["messages"][0]["content"] == "system"
    assert not any("Authorization" in headers for headers in server.headers)


@pytest.mark.parametrize(
    "fault",
    [
        (429, b"slow down", {"Retry-After": "0.01"}),
        (500, b"oops", {}),
        (503, b"", {}),
        (200, b"<html>gateway</html>", {}),
        (200, completion("x")[:-5], {}),
        (200, b'{"choices": []}', {}),
        (200, b'{"choices": [{"message": ', {"Content-Length": "900"}),
    ],
    ids=["429", "500", "503", "html", "cut JSON", "no choice", "cut connection"],
)
def test_what_may_pass_is_tried_again(fault: tuple[int, bytes, dict[str, str]]) -> None:
    found, server = answered(lambda body, n: fault if n < 2 else echo(body, n), timeout=0.5)
    assert [answer.text for answer in found] == ["PROMPT 0"] and len(server.requests) == 3


def test_a_timeout_is_tried_again() -> None:
    late = threading.Event()

    def respond(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        if number == 0:
            late.wait(5)
        else:
            late.set()
        return echo(body, number)

    found, _ = answered(respond, timeout=0.2)
    assert [answer.text for answer in found] == ["PROMPT 0"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((401, f"no key {KEY}".encode(), {}), r"status 401, the key is refused \(no key \*\*\*\): check --base-url"),
        ((403, b"", {}), "status 403, access is refused"),
        ((404, b"", {}), "status 404, there is no such address or model"),
        ((302, b"", {"Location": "http://example.com/"}), "status 302, refused"),
        ((400, b"bad\x1b[2J", {}), r"status 400, refused \(bad\\x1b\[2J\)"),
    ],
)
def test_what_cannot_pass_ends_the_build_at_once(
    fault: tuple[int, bytes, dict[str, str]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with completion_server(lambda *_: fault) as server:
        with pytest.raises(ValueError, match=message) as raised:
            list(writer(server, key_from="MY_KEY", at_once=1).write(asks(20)))
        assert len(server.requests) == 1 and KEY not in str(raised.value)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_server_that_is_not_there_ends_the_build() -> None:
    with completion_server() as server:
        pass
    with pytest.raises(ValueError, match=r"127.0.0.1:\d+/v1: no answer \(.*refused\): check --base-url"):
        list(writer(server).write(asks(3)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion(None), "the answer has no text"),
        (b" " * (5 << 20), "more than 4,194,304 bytes"),
    ],
)
def test_an_unusable_answer_is_of_its_prompt_alone(body: bytes, reason: str) -> None:
    found, _ = answered(lambda b, n: (200, body, {}) if n == 3 else echo(b, n), 6, at_once=1)
    assert [answer.text is None for answer in found] == [False, False, False, True, False, False]
    assert reason in found[3].error


def test_a_server_that_goes_down_ends_the_build_after_a_few_failures() -> None:
    def respond(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
        return echo(body, number) if number < 5 else (500, b"", {})

    with completion_server(respond) as server:
        found = []
        with pytest.raises(ValueError, match="status 500"):
            for answer in writer(server, at_once=1, tries=1).write(asks(100)):
                found.append(answer)
    assert len([one for one in found if one.text]) == 5 and len(server.requests) == 5 + 8


@pytest.mark.parametrize(("limits", "most"), [({"max_requests": 7}, 7), ({"max_tokens": 100}, 3)])
def test_limits_stop_cleanly_with_what_was_paid_for(limits: dict[str, int], most: int) -> None:
    with completion_server(echo) as server:
        found: list[Answer] = []
        with pytest.raises(Preempted, match=rf"--max-\w+ {next(iter(limits.values()))} is reached: answers so far are"):
            for answer in writer(server, Budget(**limits), at_once=1).write(asks(20)):
                found.append(answer)
    assert len(server.requests) == len(found) == most


def test_writers_share_their_limits() -> None:
    budget = Budget(max_requests=5)
    with completion_server(echo) as server:
        assert len(list(writer(server, budget).write(asks(4)))) == 4
        with pytest.raises(Preempted, match="--max-requests 5"):
            list(writer(server, budget, at_once=1).write(asks(4)))
    assert len(server.requests) == 5 and budget.tokens == 5 * 40


def test_tries_count_as_requests() -> None:
    with completion_server(lambda *_: (500, b"", {})) as server:
        with pytest.raises(Preempted, match="--max-requests 2"):
            list(writer(server, Budget(max_requests=2), at_once=1).write(asks(2)))
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "http://example.com/v1"}, "must begin with https: http sends histories and the key in the clear"),
        ({"base_url": "ftp://example.com/v1"}, r"must be http\(s\)://HOST"),
        ({"base_url": ""}, r"must be http\(s\)://HOST"),
        ({"base_url": "https://a\nb/v1"}, r"must be http\(s\)://HOST"),
        ({"base_url": f"https://me:{KEY}@example.com/v1"}, "must not hold a name, a password or a query; give the key"),
        (
            {"base_url": f"https://example.com/v1?key={KEY}"},
            "must not hold a name, a password or a query; give the key",
        ),
        ({"model": ""}, "--model is missing"),
        ({"key_from": "NO_SUCH_VARIABLE"}, "--key-from NO_SUCH_VARIABLE: this environment variable must hold the key"),
        ({"key_from": "WRONG_KEY"}, "--key-from WRONG_KEY: this environment variable must hold the key"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(ValueError, match=message) as raised:
        OpenAIWriter(Endpoint(**{"base_url": "https://example.com/v1", "model": "m"} | settings))
    assert KEY not in str(raised.value)


def test_only_another_machine_is_announced() -> None:
    assert OpenAIWriter(Endpoint("https://example.com/v1", "m")).leaves_machine == "example.com"
    assert OpenAIWriter(Endpoint("http://localhost:8000/v1", "m")).leaves_machine == ""
