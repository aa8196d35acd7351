"""Open-loop load test of a service: arrivals do not wait for answers.

Requests arrive at the times of a Poisson process, however long the answers take, and a latency is the time from the
*scheduled* arrival to the answer. So a stall of the service counts for every request that was due during the stall; a
closed loop would not have sent these requests (coordinated omission). Users are drawn from a Zipf distribution, because
the hit rate of a cache depends on how unevenly the requests are distributed over users.
"""

import asyncio
import json
import time as clock
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import numpy as np

from hllm_torchrec.common.arrays import Floats, Ints

Send = Callable[[bytes], Awaitable[int]]
"""Function that sends the body of a request to /v1/score and returns the HTTP status of the answer."""
QUANTILES = (50, 95, 99, 99.9)


@dataclass(frozen=True)
class Arrivals:
    """Requests of a load test. seconds: [n] arrival times since the start, ascending; users: [n] index of the user of
    each request, where index 0 is the most active user."""

    seconds: Floats
    users: Ints


def draw_arrivals(rate: float, seconds: float, users: int, zipf: float, seed: int) -> Arrivals:
    """Draw a Poisson process of `rate` requests per second.

    zipf: a request is of user k in [0, users) with a probability proportional to (k + 1)^-zipf; 0: uniform.
    """
    rng = np.random.default_rng(seed)
    times = rng.exponential(1 / rate, size=int(rate * seconds + 10 * (rate * seconds) ** 0.5) + 10).cumsum()
    times = times[times < seconds]
    shares = (1 + np.arange(users)) ** -zipf
    return Arrivals(times, rng.choice(users, size=times.size, p=shares / shares.sum()))


@dataclass(frozen=True)
class LoadResult:
    """Result of a load test.

    rate: scheduled requests per second; requests: number of requests; throughput: answers with status 200 per second;
    latency_ms: quantile -> milliseconds, of the answers with status 200; late_ms: 99% quantile of the milliseconds
    between the scheduled arrival and the sending of a request: a delay of the client, which is part of the latency;
    statuses: HTTP status -> number of requests (0: no answer); hit_rate: share of the look-ups of a user's state that
    found it in the service's cache, or None if not measured.
    """

    rate: float
    requests: int
    throughput: float
    latency_ms: dict[str, float]
    late_ms: float
    statuses: dict[str, int]
    hit_rate: float | None = None


async def run_load(send: Send, bodies: Sequence[bytes], arrivals: Arrivals, rate: float) -> LoadResult:
    """Send `bodies[i]` at `arrivals.seconds[i]`; wait for all answers."""
    total = arrivals.seconds.size
    latency, late, statuses = np.full(total, np.nan), np.zeros(total), np.zeros(total, int)
    start = clock.perf_counter()

    async def one(number: int) -> None:
        late[number] = clock.perf_counter() - start - arrivals.seconds[number]
        try:
            statuses[number] = await send(bodies[number])
        except (OSError, EOFError, h11.RemoteProtocolError):
            return  # no answer: status 0
        latency[number] = clock.perf_counter() - start - arrivals.seconds[number]

    tasks = []
    for number in range(total):
        await asyncio.sleep(max(0.0, start + arrivals.seconds[number] - clock.perf_counter()))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    elapsed = clock.perf_counter() - start
    answered = latency[statuses == 200] * 1e3
    found = np.percentile(answered, QUANTILES).tolist() if answered.size else [float("nan")] * len(QUANTILES)
    values, counts = np.unique(statuses, return_counts=True)
    return LoadResult(
        rate,
        total,
        answered.size / elapsed,
        {f"p{quantile:g}": round(value, 3) for quantile, value in zip(QUANTILES, found, strict=True)},
        round(float(np.percentile(late, 99)) * 1e3, 3) if total else 0.0,
        {str(value): int(count) for value, count in zip(values, counts, strict=True)},
    )


def score_bodies(
    users: Sequence[str],
    items: Sequence[str],
    arrivals: Arrivals,
    candidates: int,
    seed: int,
    context: Mapping[str, Any] | None = None,
) -> list[bytes]:
    """Bodies of the requests of `arrivals` to /v1/score, with candidates drawn uniformly from `items`.

    users: raw ids, assigned to the indices of `arrivals.users` at random. candidates: number per request. context: of
    every request; None: no context.
    """
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(users))  # selects the active users
    found = []
    for user in arrivals.users:
        chosen = rng.choice(len(items), size=min(candidates, len(items)), replace=False)
        body = {"user": users[order[user]], "candidates": [items[item] for item in chosen]}
        found.append(json.dumps(body if context is None else body | {"context": context}).encode())
    return found


_Connection = tuple[h11.Connection, asyncio.StreamReader, asyncio.StreamWriter]


class HttpClient:
    """Client of one server over plain HTTP, with a keep-alive connection for each request in flight.

    Raises:
        ValueError: the URL is not of the form http://HOST:PORT.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"--url {url}: must be http://HOST:PORT")
        self._host, self._port = parts.hostname, parts.port or 80
        self._headers = [("host", f"{self._host}:{self._port}"), ("content-type", "application/json")]
        if token is not None:
            self._headers.append(("authorization", f"Bearer {token}"))
        self._idle: list[_Connection] = []
        self.refusal = ""
        """Status and body of the first answer of /v1/score with a status other than 200."""

    async def post_score(self, body: bytes) -> int:
        """Send a body to /v1/score; return the status."""
        status, content = await self.request("POST", "/v1/score", body)
        if status != 200 and not self.refusal:
            self.refusal = f"{status} {content[:300].decode(errors='replace')}"
        return status

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send a request; return the status and the body of the answer.

        Raises:
            OSError, EOFError, h11.RemoteProtocolError: there is no answer, or it is not HTTP.
        """
        if self._idle:
            try:
                return await self._exchange(self._idle.pop(), method, path, body)
            except EOFError:
                pass  # the server may close an idle connection at any time: send the request on a new connection
        return await self._exchange(await self._connect(), method, path, body)

    async def _exchange(self, connection: "_Connection", method: str, path: str, body: bytes) -> tuple[int, bytes]:
        link, reader, writer = connection
        headers = [*self._headers, ("content-length", str(len(body)))]
        events = (h11.Request(method=method, target=path, headers=headers), h11.Data(body), h11.EndOfMessage())
        status, content = 0, b""
        try:
            writer.write(b"".join(link.send(event) or b"" for event in events))
            while not isinstance(event := link.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    data = await reader.read(1 << 16)
                    if not data:
                        raise EOFError
                    link.receive_data(data)
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    content += event.data
        except ConnectionError:
            writer.close()
            raise EOFError from None
        except BaseException:
            writer.close()
            raise
        if link.our_state is h11.DONE and link.their_state is h11.DONE:
            link.start_next_cycle()
            self._idle.append(connection)
        else:
            writer.close()
        return status, content

    async def cache_counts(self) -> tuple[float, float]:
        """Hits and misses of the service's cache of user states since the service loaded its model."""
        _, content = await self.request("GET", "/metrics")
        found = dict(line.rsplit(b" ", 1) for line in content.splitlines() if not line.startswith(b"#"))
        hits, misses = (float(found[b"hllm_state_cache_" + name]) for name in (b"hits_total", b"misses_total"))
        return hits, misses

    async def _connect(self) -> "_Connection":
        reader, writer = await asyncio.open_connection(self._host, self._port)
        return h11.Connection(h11.CLIENT), reader, writer

    def close(self) -> None:
        """Close the connections."""
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()


def capacity(results: Sequence[LoadResult], p99_ms: float) -> float | None:
    """The largest rate whose p99 is at most `p99_ms` and whose answers all have status 200, or None."""
    good = [r.rate for r in results if r.latency_ms["p99"] <= p99_ms and set(r.statuses) <= {"200"}]
    return max(good, default=None)


def as_json(results: Sequence[LoadResult], facts: dict[str, Any], p99_ms: float) -> dict[str, Any]:
    """The results of several rates, with the facts of the test."""
    best = {"p99_ms": p99_ms, "rate": capacity(results, p99_ms)}
    return {**facts, "capacity": best, "results": [asdict(result) for result in results]}
