"""Send requests to a teacher: attempts, time-outs, flow control, and what each failure means for the collection."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import httpx2

from rmsd_fast.collect_run.config import CollectConfig, Teacher
from rmsd_fast.collect_run.pacing import Pacer
from rmsd_fast.collect_run.replies import Fatal, Forbidden, Refused, Reply, Transient, failure, read_reply

log = logging.getLogger("rmsd_fast")

# Larger replies are rejected. An answer of 32k tokens has about 128 KiB, and a reply has up to K of them.
MOST_REPLY_BYTES = 8 * 2**20
# An endpoint that has answered nothing and does not look like a chat server gets this many attempts of a request, and
# this many requests.
FIRST_ATTEMPTS, FIRST_REQUESTS = 3, 8
# Back-off in seconds: doubled with each attempt, up to the longest one, and multiplied by a random number.
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 60.0
CONNECT_S = 30.0
LOCAL = ("all://localhost", "all://127.0.0.1", "all://[::1]")
# A server that answers this many requests for several answers with one answer does not support `n`.
MOST_IGNORED = 3
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}


class GaveUp(Exception):
    """A request whose attempts have all failed. The next collection sends it again."""


class NotSent(Exception):
    """A request that was not sent, or not sent again, because the collection stops."""


class Client:
    """Send requests to the endpoints of one teacher. It is used within one event loop, as a context manager.

    Args:
        collect: settings of the requests.
        teacher: model, endpoints and keys.
        stop: once it is set, nothing more is sent.
    Attributes:
        counts: number of requests, answered requests, and failures by kind.
        answered: whether any request has been answered.
        single: whether each answer needs a request of its own.
        gives_several: whether a reply has had several answers.
        pacers: flow control of each endpoint.
    """

    def __init__(self, collect: CollectConfig, teacher: Teacher, stop: asyncio.Event) -> None:
        self._collect, self.teacher, self._stop = collect, teacher, stop
        self.single, self.gives_several, self._ignored = collect.several == "never", False, 0
        self.counts: Counter[str] = Counter()
        self.answered = False
        self.pacers = [Pacer(collect.start_concurrency, collect.max_concurrency) for _ in teacher.endpoints]
        # httpx logs each URL.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._tls = httpx2.create_ssl_context()
        # HTTP clients of each endpoint that are not in use. Each request in flight has a client of its own, because a
        # shared one polls its idle connections before and after each request: a quarter of the CPU time with 64
        # connections. A client for several endpoints would keep a connection to each of them.
        self._free: list[list[httpx2.AsyncClient]] = [[] for _ in teacher.endpoints]
        self._urls = [httpx2.URL(f"{endpoint}/chat/completions") for endpoint in teacher.endpoints]
        # Time of the last success, and the longest pause that a server has asked for since.
        self._succeeded_s, self._asked_s = 0.0, 0.0
        # Number of failures of each endpoint that suggest that it is not a chat server.
        self._strange = [0] * len(teacher.endpoints)

    async def __aenter__(self) -> Client:
        self._succeeded_s = asyncio.get_running_loop().time()
        return self

    async def __aexit__(self, *exception) -> None:
        for https in self._free:
            for http in https:
                await http.aclose()

    def _new_http(self) -> httpx2.AsyncClient:
        # A proxy of the environment cannot reach servers on this machine.
        direct = dict.fromkeys(LOCAL, httpx2.AsyncHTTPTransport(verify=self._tls))
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        return httpx2.AsyncClient(verify=self._tls, timeout=timeout, follow_redirects=False, mounts=direct)

    async def send(self, body: Callable[[], bytes]) -> Reply:
        """Send a request until it is answered.

        Args:
            body: returns the body of the request, when it is sent.
        Raises:
            Refused: the server has rejected the request for good.
            GaveUp: all attempts have failed.
            Fatal: no request can succeed, or none has been answered for `collect.outage_s`.
            NotSent: the collection stops.
        """
        counted = 0
        for attempt in itertools.count():
            if self._stop.is_set():
                raise NotSent
            index = self._choose()
            pacer = self.pacers[index]
            started_s = await pacer.acquire()
            try:
                if self._stop.is_set():
                    raise NotSent
                self.counts["requests"] += 1
                reply = await self._attempt(index, body())
            except Transient as error:
                self.counts[error.kind] += 1
                counted += error.kind != "429"
                pacer.failed(started_s)
                if error.overloaded:
                    pacer.overloaded(started_s, error.retry_after_s)
                self._check(index, error, counted)
                pause_s = max(error.retry_after_s or 0.0, _backoff_s(attempt) * random.uniform(0.5, 1))
            except Forbidden as error:
                if self.answered:
                    # The server accepts the key, so it rejects this request.
                    raise Refused("refused", error.said) from None
                raise
            else:
                self._succeeded_s, self._asked_s = asyncio.get_running_loop().time(), 0.0
                self.answered = True
                self.counts["answered"] += 1
                pacer.succeeded()
                return reply
            finally:
                pacer.release()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)

    def _choose(self) -> int:
        """Return the endpoint with the lowest load. Endpoints that have just failed come last.

        Otherwise, an endpoint that fails at once would get most of the requests, because its load is low.
        """
        now = asyncio.get_running_loop().time()

        def rank(index: int) -> tuple[bool, float]:
            pacer = self.pacers[index]
            rest_s = _backoff_s(pacer.failures - 1) if pacer.failures else 0.0
            return now < max(pacer.failed_s + rest_s, pacer.paused_until_s), pacer.load

        return min(range(len(self.pacers)), key=rank)

    def learn(self, asked: int, got: int) -> None:
        """Note how many answers a reply had, to find out whether the server supports `n`."""
        if asked > 1:
            self.gives_several = self.gives_several or got > 1
            self._ignored = self._ignored + 1 if got == 1 else 0
            if self._ignored >= MOST_IGNORED and not self.gives_several and not self.single:
                self.single = True
                log.warning(
                    "%s answers requests for several answers with one answer; each answer now has a request of its own",
                    self.teacher.model,
                )

    def end_pauses(self) -> None:
        """Wake the requests that wait for a pause or a place, so that they see that the collection stops."""
        for pacer in self.pacers:
            pacer.open()

    def _check(self, index: int, error: Transient, counted: int) -> None:
        """Raise GaveUp or Fatal if another attempt makes no sense."""
        url, section = self.teacher.endpoints[index], self.teacher.section
        self._strange[index] += error.wrong_server
        is_sure = counted >= FIRST_ATTEMPTS or self._strange[index] >= FIRST_REQUESTS
        if not self.answered and error.wrong_server and is_sure and min(self._strange) >= FIRST_ATTEMPTS:
            advice = "check the URL" if error.kind != "404" else f"check the URL and {section}.model"
            if not urlsplit(url).path.strip("/"):
                advice += ", which usually ends in /v1"
            raise Fatal(f"{section}.endpoint {url}: expected a server with chat completions, got {error}; {advice}")
        silent_s = asyncio.get_running_loop().time() - self._succeeded_s
        self._asked_s = max(self._asked_s, error.retry_after_s or 0.0)
        if silent_s > self._collect.outage_s + self._asked_s:
            raise Fatal(
                f"{section}.endpoint {url}: expected an answer within "
                f"{section}.outage_s={self._collect.outage_s:g}, got none (last failure: {error}); "
                "check the server, then start again"
            )
        if counted >= self._collect.attempts:
            raise GaveUp(f"{counted} attempts failed, the last with {error}")

    async def _attempt(self, index: int, body: bytes) -> Reply:
        """Send a request once."""
        try:
            return await asyncio.wait_for(self._exchange(index, body), self._collect.timeout_s)
        except asyncio.TimeoutError:
            text = f"no reply within {self.teacher.section}.timeout_s={self._collect.timeout_s:g}"
            raise Transient("timeout", text, overloaded=True) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Transient("connection", _named(error), wrong_server=True) from None
        except httpx2.TransportError as error:
            raise Transient("connection", _named(error)) from None
        except (httpx2.DecodingError, httpx2.InvalidURL) as error:
            raise Transient("garbage", _named(error), wrong_server=True) from None

    async def _exchange(self, index: int, body: bytes) -> Reply:
        key = self.teacher.keys[index]
        headers = _HEADERS | ({"Authorization": f"Bearer {key}"} if key else {})
        http = self._free[index].pop() if self._free[index] else self._new_http()
        try:
            async with http.stream("POST", self._urls[index], content=body, headers=headers) as response:
                pieces, size = [], 0
                async for piece in response.aiter_bytes():
                    pieces.append(piece)
                    size += len(piece)
                    if size > MOST_REPLY_BYTES:
                        raise Transient("too large", f"a reply of more than {MOST_REPLY_BYTES // 2**20} MiB")
                data = b"".join(pieces)
                if response.status_code != 200:
                    raise failure(response.status_code, response.headers, data, key, self.teacher.section)
        finally:
            self._free[index].append(http)
        return read_reply(data, key, self.teacher.section)


def _backoff_s(failures: int) -> float:
    """Return the back-off after this number of earlier failures in seconds."""
    return min(FIRST_BACKOFF_S * 2 ** min(failures, 16), LONGEST_BACKOFF_S)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
