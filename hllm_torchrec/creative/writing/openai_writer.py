"""`OpenAIWriter`: answers of a server with OpenAI's chat completions interface (vLLM, llama.cpp, Ollama, providers).

    POST {base_url}/chat/completions    {"model", "messages", "max_tokens", "temperature", "seed"}

The key is read from an environment variable and is not written to any file or message. A request is repeated, after
increasing pauses, if the status is 408, 425, 429 or 5xx, if no complete answer arrives, or if the answer is not a
completion. After another error the request is not repeated; redirections and status 401, 403 and 404 end the build.
"""

import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.common.terminal import printable
from hllm_torchrec.creative.writing.writer import Answer, Ask

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LARGEST = 4 << 20
"""Maximum size of a server's response in bytes."""
_LONGEST_PAUSE = 60.0
_FAILURES = 8
"""Number of consecutive failures that end a build. Before the first answer, one failure ends it."""
_WRONG_REQUEST = {
    401: "the key is refused",
    403: "access is refused",
    404: "there is no such address or model",
}


@dataclass
class Budget:
    """Limits of requests and tokens, which several writers may share, and the numbers used so far.

    max_requests: maximum number of requests; max_tokens: no request is sent once prompts and answers together have this
    number of tokens. None: no limit.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    requests: int = 0
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> str:
        """Count a request; return the option whose limit is reached, or "" if the request may be sent."""
        with self.lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                return f"--max-requests {self.max_requests}"
            if self.max_tokens is not None and self.tokens >= self.max_tokens:
                return f"--max-tokens {self.max_tokens}"
            self.requests += 1
            return ""

    def add(self, tokens: int) -> None:
        """Count the tokens of a prompt and its answer."""
        with self.lock:
            self.tokens += tokens


@dataclass(frozen=True)
class Endpoint:
    """Address of a server, and how it is used.

    base_url: address with the version, such as https://host/v1; model: the server's name of the model; key_from: name
    of the environment variable with the key (None: no key is sent); at_once: number of concurrent requests; timeout:
    seconds without data after which a request fails; tries: maximum number of requests for a prompt; pause: seconds
    before the second request.
    """

    base_url: str
    model: str
    key_from: str | None = None
    at_once: int = 4
    timeout: float = 120.0
    tries: int = 6
    pause: float = 1.0

    @property
    def host(self) -> str:
        """Host of the server."""
        return urlsplit(self.base_url).hostname or ""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the settings."""
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or re.search(r"[\s\x00-\x1f]", self.base_url):
            yield f"--base-url {self.base_url!r}: must be http(s)://HOST[:PORT]/v1"
        elif url.username or url.password or url.query or url.fragment:
            yield "--base-url: must not hold a name, a password or a query; give the key by --key-from"
        elif url.scheme == "http" and url.hostname not in LOCAL_HOSTS:
            yield f"--base-url {self.base_url}: must begin with https: http sends histories and the key in the clear"
        if not self.model:
            yield "--model is missing: the server's name for the model"
        if self.key_from and not _is_key(os.environ.get(self.key_from, "")):
            yield f"--key-from {self.key_from}: this environment variable must hold the key, in one line of ASCII"


def _is_key(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirections, because they would send the key and the histories to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Failed(Exception):
    """Failure of a request.

    again: the same request may succeed later, at the earliest after `after` seconds; ends: all other requests would
    fail, too.
    """

    def __init__(self, message: str, *, again: bool = False, ends: bool = False, after: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.ends, self.after = again, ends, after


class OpenAIWriter:
    """Sends prompts to a server; see the module docstring.

    budget: limits of the requests; None: no limits.

    Raises:
        ValueError: a setting is not valid.
    """

    def __init__(self, endpoint: Endpoint, budget: Budget | None = None) -> None:
        if problems := list(endpoint.problems()):
            raise ValueError("; ".join(problems))
        self.endpoint = endpoint
        self.name = f"llm:{endpoint.model}"
        is_local = endpoint.host in LOCAL_HOSTS
        self.leaves_machine = "" if is_local else endpoint.host
        self._key = os.environ[endpoint.key_from] if endpoint.key_from else ""
        proxies = [urllib.request.ProxyHandler({})] if is_local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.budget = budget or Budget()
        self._answered, self._failed_in_a_row = False, 0
        self._ended_by: Exception | None = None

    def write(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Yield the answers in the order in which they arrive.

        Raises:
            Preempted: a limit is reached. The answers to all requests that were sent have been yielded.
            ValueError: the server refuses the key or the model, or cannot be reached.
        """
        self._stop.clear()
        with ThreadPoolExecutor(self.endpoint.at_once) as pool:
            futures: list[Future[Answer | None]] = [pool.submit(self._answer, i, ask) for i, ask in enumerate(asks)]
            try:
                for future in as_completed(futures):
                    if (answer := future.result()) is not None:
                        yield answer
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        if self._ended_by is not None:
            raise self._ended_by

    def _answer(self, index: int, ask: Ask) -> Answer | None:
        """Request an answer to one prompt, with repetitions; None if the build ends before there is one."""
        failure = _Failed("")
        for number in range(self.endpoint.tries):
            if self._stop.wait(self._pause(number, failure) if number else 0.0) or not self._may_ask():
                return None
            try:
                text, tokens = self._request(ask)
            except _Failed as error:
                failure = error
                if error.again:
                    continue
                break
            self.budget.add(sum(tokens))
            with self._lock:
                self._answered, self._failed_in_a_row = True, 0
            return Answer(index, text, tokens=tokens)
        return self._failure(index, failure)

    def _pause(self, number: int, failure: _Failed) -> float:
        """Return the seconds before request `number`: doubled each time, at least the server's Retry-After, at most
        60."""
        pause = self.endpoint.pause * 2.0 ** (number - 1) * random.uniform(0.75, 1.25)
        return min(_LONGEST_PAUSE, max(pause, failure.after))

    def _failure(self, index: int, failure: _Failed) -> Answer | None:
        with self._lock:
            self._failed_in_a_row += 1
            ends = failure.ends or not self._answered or self._failed_in_a_row >= _FAILURES
        if not ends:
            return Answer(index, None, str(failure))
        remedy = "check --base-url, --model and --key-from; answers so far are kept"
        self._end(ValueError(f"{self.endpoint.base_url}: {failure}: {remedy}"))
        return None

    def _may_ask(self) -> bool:
        """Count a request; False if a limit is reached, so that the request must not be sent."""
        if reached := self.budget.take():
            self._end(Preempted(f"{reached} is reached: answers so far are kept; the same command goes on from there"))
        return not reached

    def _end(self, reason: Exception) -> None:
        with self._lock:
            if self._ended_by is None:
                self._ended_by = reason
        self._stop.set()

    def _request(self, ask: Ask) -> tuple[str, tuple[int, int]]:
        """Send a request; return the text of the completion and the numbers of tokens of prompt and answer.

        Raises:
            _Failed: the request has no completion.
        """
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "system", "content": ask.system}, {"role": "user", "content": ask.prompt}],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.endpoint.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                data = response.read(_LARGEST + 1)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, HTTPException) as error:  # no connection, a timeout, or an interrupted connection
            reason = getattr(error, "reason", error)
            raise _Failed(f"no answer ({self._safe(str(reason) or type(reason).__name__)})", again=True) from None
        return _completion(data, ask)

    def _refused(self, error: urllib.error.HTTPError) -> _Failed:
        with error:
            try:
                said = error.read(2000).decode("utf-8", "replace")
            except (OSError, HTTPException):
                said = ""
        message = f"status {error.code}, {_WRONG_REQUEST.get(error.code, 'refused')} ({self._safe(said)})"
        again = error.code in (408, 425, 429) or error.code >= 500
        after = error.headers.get("Retry-After", "") if error.headers else ""
        seconds = float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 0.0
        return _Failed(
            message, again=again, ends=error.code in _WRONG_REQUEST or 300 <= error.code < 400, after=seconds
        )

    def _safe(self, text: str) -> str:
        """Return the beginning of a server's message without the key, which some servers repeat."""
        shown = text.replace(self._key, "***") if self._key else text
        return printable(" ".join(shown.split()))[:200]


def _completion(data: bytes, ask: Ask) -> tuple[str, tuple[int, int]]:
    if len(data) > _LARGEST:
        raise _Failed(f"the answer has more than {_LARGEST:,} bytes")
    try:
        found: Any = json.loads(data)
        text = found["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _Failed("the answer is no completion", again=True) from None
    if not isinstance(text, str):
        raise _Failed("the answer has no text: the model refused, or used up its tokens")
    usage = found.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    # For servers that do not report numbers of tokens, four characters count as one token.
    lengths = [len(ask.system) + len(ask.prompt), len(text)]
    tokens = [n if isinstance(n, int) and n >= 0 else length // 4 for n, length in zip(counts, lengths, strict=True)]
    return text, (tokens[0], tokens[1])
