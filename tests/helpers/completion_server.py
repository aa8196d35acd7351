"""A server of chat completions on this machine, whose answers a test scripts."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[dict[str, Any], int], tuple[int, bytes, dict[str, str]]]
"""Status, body and headers for a request's body and its number."""


@dataclass
class CompletionServer:
    """What was asked. requests: bodies, in order; headers: of each; paths: of each."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def completion(text: str | None, **more: Any) -> bytes:
    """Body of a completion."""
    usage = {"prompt_tokens": 30, "completion_tokens": 10}
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage} | more
    ).encode()


def facts_of(prompt: str) -> dict[str, str]:
    """Lines `name: text` of the item in a prompt."""
    found = re.search(r"^BEGIN \w+ \((?:facts of the )?item\)\n(.*?)\nEND", prompt, re.MULTILINE | re.DOTALL)
    return dict(line.split(": ", 1) for line in found[1].splitlines()) if found else {}


def honest(body: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
    """A profile, a title of the item's own words in another order, and a judge that agrees."""
    prompt = body["messages"][1]["content"]
    if '"title": ' in prompt:
        item = facts_of(prompt)
        title = " ".join([*reversed(item["title"].split()), "for", "fans", "of", item.get("brand", item["title"])])
        answer = {"reader": "r", "points": "p", "title": title}
    elif '"verdict": ' in prompt:
        answer = {"reason": "", "verdict": "yes"}
    else:
        names = ("lasting", "recent", "preferences", "needs", "appeal", "summary")
        answer = {name: f"{name} of this reader" for name in names}
    return 200, completion(f"Here it is: {json.dumps(answer)}"), {}


@contextmanager
def completion_server(respond: Respond = honest) -> Iterator[CompletionServer]:
    """Context manager with a running server, at `url`."""
    seen, lock = CompletionServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
            status, data, headers = respond(body, number)
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has left
                pass

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()
