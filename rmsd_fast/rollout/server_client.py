"""Sample with rollout servers over HTTP (`rollout.engine=vllm_server`)."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import torch

from rmsd_fast.config import SettingsError, first_line
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.protocol import (
    BUCKET_BYTES,
    CONTENT_TYPE,
    TOKEN,
    MessageError,
    check_facts,
    pack,
    pack_request,
    unpack,
    unpack_completions,
)
from rmsd_fast.rollout.samples import Completion, Request
from rmsd_fast.rollout.server import keep_alive
from rmsd_fast.runtime.process_group import World, on_main, raise_together

# Seconds to connect, and to wait for an answer. Other processes of the run wait longer for this one.
CONNECT_S, ANSWER_S = 20.0, 1500.0
# A server notices within moments that a run was killed.
FREE_S = 10.0
# A request that was interrupted is sent again, since it changes nothing on the server.
ATTEMPTS, PAUSE_S = 3, 1.0
MOST_ANSWER_BYTES = 256 * 2**20
_RESUME = "the last checkpoint is unaffected: continue the run with --resume"
_START = "python -m rmsd_fast.serve_rollouts"


class ServerSampler:
    """Sample with the copies of the language model in one or more servers; see `Sampler`.

    The main process connects to all servers and sends the weights. Each process sends its own requests, spread over
    the servers. An error of one process is raised on all.

    Args:
        urls: URLs of the servers.
        facts: what run and servers must agree on, see `protocol.check_facts`.
        dtype: dtype of the weights.
        world: this process in the run.
        owner: name of the run, for messages of the servers.
        at_once: number of requests that this process has in progress on each server.
        token: secret of the servers; empty = none.
    Raises:
        SettingsError: a server cannot be reached, or does not fit the run.
        RolloutError: a server serves another run.
    """

    def __init__(
        self,
        urls: Sequence[str],
        facts: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        world: World,
        owner: str,
        at_once: int,
        token: str,
    ) -> None:
        self.dtype, self._world, self._urls, self._token = dtype, world, list(urls), token
        self._version, self._names = 0, []
        self._pool = ThreadPoolExecutor(at_once * len(urls), thread_name_prefix="rollouts")
        # They stay open as long as the run lives, and so tell the servers when it ends.
        self._connections: list[tuple[HTTPConnection, HTTPResponse]] = []
        self._sessions = on_main(world, lambda: [self._open(url, facts, owner) for url in self._urls])

    def _open(self, url: str, facts: Mapping[str, Any], owner: str) -> dict[str, str]:
        """Connect to a server, and return the session that all later messages name."""
        check_facts(url, facts, server_status(url, self._token)["facts"])
        connection, response = _open_when_free(url, pack({"owner": owner}), self._token)
        self._connections.append((connection, response))
        try:
            opened = json.loads(response.readline())
            return {"session": opened["session"], "instance": opened["instance"]}
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise _lost(url, error) from error

    def load(self, weights: Iterator[tuple[str, torch.Tensor]], names: list[str]) -> None:
        """Send weights to all servers, in buckets; see `Sampler`."""
        self._version += 1
        self._names = names
        error = None
        if self._world.is_main:
            try:
                for bucket in _buckets(weights):
                    description = {"version": self._version, "names": list(bucket)}
                    self._send_to_all("/weights", description, bucket)
            except Exception as caught:
                error = caught
        # Under ZeRO-3, all processes gather every layer together, also if the main process has failed.
        for _ in weights:
            pass
        raise_together(error, self._world)

    def commit(self) -> dict[str, int]:
        """Make all servers use the weights, and return the sums of the first one; see `Sampler`.

        Raises:
            RolloutError: weights have not arrived, or the sums of another server differ.
        """
        return on_main(self._world, self._commit)

    def _commit(self) -> dict[str, int]:
        answers = self._send_to_all("/commit", {"version": self._version, "names": self._names}, {})
        sums: list[dict[str, int]] = []
        for url, answer in zip(self._urls, answers, strict=True):
            try:
                received = unpack(answer)[0]["sums"]
                sums.append({str(group): int(value) for group, value in received.items()})
            except (MessageError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise _lost(url, error) from error
            if sums[-1] != sums[0]:
                raise RolloutError(
                    f"rollout server {url}: expected the weights of {self._urls[0]}, got others; start both again, and "
                    "continue the run with --resume"
                )
        return sums[0]

    def _send_to_all(
        self, path: str, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> list[bytearray]:
        """Send a message to all servers at once, and return their answers."""

        def send(url: str, session: dict[str, str]) -> bytearray:
            return _call(url, path, pack({**description, **session}, tensors), self._token)

        return list(self._pool.map(send, self._urls, self._sessions))

    def sample(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """Return the completions of all requests; see `Sampler`."""
        servers = len(self._urls)
        # Processes with one request each do not all use the first server.
        futures = [
            self._pool.submit(self._sample, (self._world.rank + i) % servers, request, sampling)
            for i, request in enumerate(requests)
        ]
        error, drawn = None, []
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            drawn = [future.result() for future in futures]
        except Exception as caught:
            error = caught
        finally:
            for future in futures:
                future.cancel()
        raise_together(error, self._world)
        return drawn

    def _sample(self, server: int, request: Request, sampling: Sampling) -> list[Completion]:
        url = self._urls[server]
        description = {"version": self._version, **self._sessions[server]}
        body = pack_request(request, sampling, description, self.dtype)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return unpack_completions(_call(url, "/generate", body, self._token), sampling.n)
            except MessageError as error:
                raise _lost(url, error) from error
            except _Interrupted:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(PAUSE_S)
        raise AssertionError

    def close(self) -> None:
        """Tell the servers that the run has ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for connection, response in self._connections:
            response.close()
            connection.close()
        self._connections = []


class _Interrupted(RolloutError):
    """A connection that has ended before the answer."""


def server_token() -> str:
    """Return the secret of the servers from the environment; empty if there is none."""
    return os.environ.get(TOKEN, "")


def server_status(url: str, token: str) -> dict[str, Any]:
    """Return the status of a server.

    Raises:
        SettingsError: it cannot be reached, refuses the token, or is not a rollout server.
    """
    start = f"start one with {_START} and this recipe, or correct rollout.server_urls"
    try:
        with closing(_connect(url)) as connection:
            connection.request("GET", "/status", headers=_headers(token))
            response = connection.getresponse()
            content = response.read(MOST_ANSWER_BYTES)
    except (OSError, HTTPException) as error:
        raise SettingsError(
            f"rollout.server_urls: expected a rollout server at {url}, got no answer ({first_line(error)}); {start}"
        ) from error
    if response.status == 401:
        raise SettingsError(f"rollout server {url}: {_error_of(content)}, as for the server")
    try:
        status = json.loads(content)
        if response.status != 200 or not isinstance(status["facts"], dict):
            raise ValueError
        return status
    except (ValueError, KeyError, TypeError):
        raise SettingsError(
            f"rollout.server_urls: expected a rollout server at {url}, got another program (status {response.status}); "
            f"{start}"
        ) from None


def describe_server(url: str, facts: Mapping[str, Any], token: str) -> str:
    """Return a line about a server that fits the run.

    Raises:
        SettingsError: it cannot be reached, or does not fit.
    """
    status = server_status(url, token)
    check_facts(url, facts, status["facts"])
    shown = ", ".join(f"{name} {value}" for name, value in status.get("shown", {}).items())
    owner = f"; it serves {status['owner']}" if status.get("owner") else ""
    return f"rollout server {url}: {shown}{owner}"


def wait_until_free(url: str, token: str) -> str:
    """Return which run a server still serves after a moment in which it may notice that the run has ended, or ""."""
    end = time.monotonic() + FREE_S
    while (owner := str(server_status(url, token).get("owner", ""))) and time.monotonic() < end:
        time.sleep(0.2)
    return owner


def _open_when_free(url: str, body: list[memoryview], token: str) -> tuple[HTTPConnection, HTTPResponse]:
    """Open a session. A server needs a moment to notice that the former run has ended."""
    end = time.monotonic() + FREE_S
    while True:
        connection = None
        try:
            connection = _connect(url)
            response = _post(connection, "/open", body, token)
        except (OSError, HTTPException) as error:
            raise _lost(url, error) from error
        if response.status == 200:
            return connection, response
        content = response.read(MOST_ANSWER_BYTES)
        connection.close()
        if response.status != 409 or time.monotonic() > end:
            raise RolloutError(f"rollout server {url}: {_error_of(content)}")
        time.sleep(0.2)


def _call(url: str, path: str, body: list[memoryview], token: str) -> bytearray:
    """Send a message to a server, and return its answer.

    Raises:
        _Interrupted: the connection has ended before the answer.
        RolloutError: the server cannot be reached, or refuses the message.
    """
    try:
        connection = _connect(url)
    except OSError as error:
        raise _lost(url, error) from error
    with closing(connection):
        try:
            response = _post(connection, path, body, token)
            content = bytearray(response.read(MOST_ANSWER_BYTES))
        except TimeoutError as error:
            raise _lost(url, error) from error
        except (OSError, HTTPException) as error:
            raise _Interrupted(str(_lost(url, error))) from error
    if response.status != 200:
        restarted = f"; {_RESUME}" if response.status == 410 else ""
        raise RolloutError(f"rollout server {url}: {_error_of(content)}{restarted}")
    return content


def _connect(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=CONNECT_S)
    connection.connect()
    connection.sock.settimeout(ANSWER_S)
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(connection.sock)
    return connection


def _post(connection: HTTPConnection, path: str, body: list[memoryview], token: str) -> HTTPResponse:
    headers = {**_headers(token), "Content-Type": CONTENT_TYPE, "Content-Length": str(sum(map(len, body)))}
    # A server that refuses a message may close the connection before it has read all of it.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", path, body=body, headers=headers)
    return connection.getresponse()


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _error_of(content: bytes | bytearray) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"expected an answer, got {bytes(content[:80])!r}"


def _lost(url: str, error: Exception) -> RolloutError:
    """Return the error for a server that does not answer as expected."""
    return RolloutError(
        f"rollout server {url}: expected an answer, got {type(error).__name__} ({first_line(error)}); the server has "
        f"ended or cannot be reached: look at its output, start it again with {_START}, and {_RESUME}"
    )


def _buckets(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield weights in host memory, in buckets of at most BUCKET_BYTES or one weight."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, value in weights:
        more = value.numel() * value.element_size()
        if bucket and size + more > BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
        # The value is valid only until the next one is asked for.
        bucket[name] = value.detach().to("cpu", copy=True)
        size += more
    if bucket:
        yield bucket
