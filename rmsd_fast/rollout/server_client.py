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
    digest,
    pack,
    pack_request,
    unpack,
    unpack_completions,
)
from rmsd_fast.rollout.samples import Completion, Request
from rmsd_fast.rollout.server import keep_alive
from rmsd_fast.runtime.process_group import World, on_main, raise_together

# Seconds to connect, and for all answers of an update or of a batch of rollouts. Other processes of the run wait for
# 1800 s in a collective.
CONNECT_S, ANSWER_S = 20.0, 1500.0
# A server notices within moments that a run was killed.
FREE_S = 10.0
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
        self._vocabulary = facts["text_config.vocab_size"]
        self._pools = [ThreadPoolExecutor(at_once, thread_name_prefix="rollouts") for _ in urls]
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
        error, until = None, time.monotonic() + ANSWER_S
        if self._world.is_main:
            # An error of the iterator is raised at once: the other processes may be waiting in a gather of ZeRO-3,
            # where they would never meet this process in another collective.
            for bucket in _buckets(weights):
                try:
                    self._send_bucket(bucket, until)
                except Exception as caught:
                    error = caught
                    break
                # Otherwise it would be held until the next one is complete.
                bucket.clear()
        # Under ZeRO-3, all processes gather every layer together, also if a server has failed.
        for _ in weights:
            pass
        raise_together(error, self._world)

    def _send_bucket(self, bucket: dict[str, torch.Tensor], until: float) -> None:
        """Send weights to all servers, and check that each server has them under the same names."""
        description = {"version": self._version, "names": list(bucket)}
        sent = {name: digest(value) for name, value in bucket.items()}
        for url, received in self._send_to_all("/weights", "digests", description, bucket, until):
            if wrong := [name for name, value in sent.items() if received.get(name) != value]:
                raise RolloutError(
                    f"rollout server {url}: expected the weights of update {self._version} as they were sent, got "
                    f"other bytes for {wrong[0]} ({len(wrong)} of {len(sent)}); start the server again, and {_RESUME}"
                )

    def commit(self) -> dict[str, int]:
        """Make all servers use the weights, and return the sums of the first one; see `Sampler`.

        Raises:
            RolloutError: weights have not arrived, or the sums of another server differ.
        """
        return on_main(self._world, self._commit)

    def _commit(self) -> dict[str, int]:
        description = {"version": self._version, "names": self._names}
        answers = self._send_to_all("/commit", "sums", description, {}, time.monotonic() + ANSWER_S)
        (_, first), *others = answers
        for url, sums in others:
            if sums != first:
                raise RolloutError(
                    f"rollout server {url}: expected the weights of {self._urls[0]}, got others; start both again, and "
                    f"{_RESUME}"
                )
        return first

    def _send_to_all(
        self,
        path: str,
        field: str,
        description: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        until: float,
    ) -> list[tuple[str, dict[str, int]]]:
        """Send a message to all servers at once, and return the URL of each and a field of its answer."""

        def send(url: str, session: dict[str, str]) -> tuple[str, dict[str, int]]:
            answer = _call(url, path, pack({**description, **session}, tensors), self._token, until)
            try:
                return url, {str(name): int(value) for name, value in unpack(answer)[0][field].items()}
            except (MessageError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise _lost(url, error) from error

        futures = [
            pool.submit(send, url, session)
            for pool, url, session in zip(self._pools, self._urls, self._sessions, strict=True)
        ]
        return [future.result() for future in futures]

    def sample(self, requests: list[tuple[Request, Sampling]]) -> list[list[Completion]]:
        """Return the completions of all requests; see `Sampler`."""
        until, futures = time.monotonic() + ANSWER_S, []
        for i, (request, sampling) in enumerate(requests):
            # Processes with one request each do not all use the first server.
            server = (self._world.rank + i) % len(self._urls)
            futures.append(self._pools[server].submit(self._sample, server, request, sampling, until))
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

    def _sample(self, server: int, request: Request, sampling: Sampling, until: float) -> list[Completion]:
        url = self._urls[server]
        description = {"version": self._version, **self._sessions[server]}
        answer = _call(url, "/generate", pack_request(request, sampling, description, self.dtype), self._token, until)
        try:
            return unpack_completions(answer, sampling.n, self._vocabulary)
        except MessageError as error:
            raise _lost(url, error) from error

    def close(self) -> None:
        """Tell the servers that the run has ended."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for connection, response in self._connections:
            response.close()
            connection.close()
        self._connections = []


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
    if response.status in (403, 503):
        raise SettingsError(f"rollout server {url}: {_error_of(content)}")
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


def _call(url: str, path: str, body: list[memoryview], token: str, until: float) -> bytearray:
    """Send a message to a server, and return its answer.

    Raises:
        RolloutError: the server cannot be reached, refuses the message, or has not answered at the time `until`.
    """
    try:
        with closing(_connect(url)) as connection:
            # A timeout of 0 would mean not to wait for the network at all.
            connection.sock.settimeout(max(0.001, until - time.monotonic()))
            response = _post(connection, path, body, token)
            content = bytearray(response.read(MOST_ANSWER_BYTES))
    except TimeoutError as error:
        late = TimeoutError(f"an update, or a batch of rollouts, takes more than {ANSWER_S:g} s")
        raise _lost(url, late if time.monotonic() >= until else error) from error
    except (OSError, HTTPException) as error:
        raise _lost(url, error) from error
    if response.status != 200:
        # These servers have lost the run. Other messages have their own advice.
        lost = f"; {_RESUME}" if response.status == 410 or response.status >= 500 else ""
        raise RolloutError(f"rollout server {url}: {_error_of(content)}{lost}")
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
