"""Serve rollouts over HTTP: authentication, limits and the bytes of the messages. `service.py` has the meaning.

| call | body | answer |
|---|---|---|
| `GET /status` | none | JSON: what the server is |
| `POST /open` | who connects | one line of JSON; the connection stays open as long as the run lives |
| `POST /weights` | a bucket of weights | nothing |
| `POST /commit` | the names of all weights of the update | sums of the weights |
| `POST /generate` | one question | its responses |
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch

from rmsd_fast.config import SettingsError, UserError, first_line
from rmsd_fast.rollout.protocol import CONTENT_TYPE, TOKEN, MessageError, pack, pack_completions, unpack
from rmsd_fast.rollout.service import Refusal, Service, out_of_memory

log = logging.getLogger("rmsd_fast")
# A client that stops in the middle of a message is dropped after so many seconds.
READ_S = 60.0
# Connections that have not sent their headers and token yet, and seconds that they have for them. Further ones wait in
# the queue of the kernel.
MOST_UNKNOWN, HEADERS_S = 256, 10.0
# A lost peer without a closed connection, such as a machine that has lost power, is noticed after 30 + 6 x 10 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
_TOKEN_BYTES = 16


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice a lost peer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def check_host(host: str, token: str) -> None:
    """Raise SettingsError if anybody could reach the server without a token, or if the token is short."""
    if token and (len(token) < _TOKEN_BYTES or not token.isascii() or not token.isprintable() or " " in token):
        raise SettingsError(
            f"{TOKEN}: expected a secret of at least {_TOKEN_BYTES} ASCII characters without spaces, got {len(token)} "
            "characters; set it to the output of: openssl rand -hex 32"
        )
    if not token and not _is_local(host):
        raise SettingsError(
            f"--host: expected 127.0.0.1 without a token, since anybody who can reach {host} could use the server, got "
            f"{host}; set the environment variable {TOKEN} to the output of `openssl rand -hex 32`, for run and server"
        )


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RolloutServer(ThreadingHTTPServer):
    """The HTTP server. Its threads only read and write messages.

    It takes its port at once, and refuses all calls until it has a `service`.

    Args:
        host, port: address to listen on. Port 0 chooses a free one.
        token: secret that every call must have; empty = none.
        most_bytes: size of the largest message.
    Raises:
        SettingsError: the address cannot be used, or only with a token.
    """

    daemon_threads = True
    # The connections of all processes of a run may wait while the engine holds the GIL.
    request_queue_size = 1024
    block_on_close = False

    def __init__(self, host: str, port: int, *, token: str, most_bytes: int) -> None:
        check_host(host, token)
        self.service: Service | None = None
        self.token, self.most_bytes = token, most_bytes
        self._places, self._unknown = threading.Semaphore(MOST_UNKNOWN), set()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise SettingsError(
                f"--host and --port: expected an address to listen on, got {host} and {port} "
                f"({getattr(error, 'strerror', None) or error}); choose another port, or an address of this machine"
            ) from error

    @property
    def url(self) -> str:
        """The URL of the server, with the name of this machine if it listens on all of its addresses."""
        host, port = self.server_address[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    def start(self) -> None:
        """Serve in other threads."""
        threading.Thread(target=self.serve_forever, name="HTTP", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, if there are not too many whose clients are unknown."""
        self._places.acquire()
        self._unknown.add(request)
        super().process_request(request, client_address)

    def admit(self, request: Any) -> None:
        """Note that the client of a connection is known, or has gone."""
        if request in self._unknown:
            self._unknown.discard(request)
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self.admit(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is not an error of the server."""
        log.debug("the connection to %s has ended", client_address, exc_info=True)


class _Reader(io.RawIOBase):
    """Read a connection until a time. A timeout of the socket alone would begin again with every byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.until = connection, math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(min(READ_S, max(0.001, self.until - time.monotonic())))
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rmsd_fast", ""
    server: RolloutServer

    def setup(self) -> None:
        super().setup()
        keep_alive(self.connection)
        self.rfile.close()
        self._reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle_one_request(self) -> None:
        self._reader.until = time.monotonic() + HEADERS_S
        super().handle_one_request()

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)

    def do_GET(self) -> None:
        if (service := self._service()) is None:
            return
        if self.path != "/status":
            self._refuse(404, f"expected GET /status, got {self.path!r:.80}")
            return
        self._answer([json.dumps(service.status()).encode()], "application/json")

    def do_POST(self) -> None:
        if (service := self._service()) is None:
            return
        calls: dict[str, Callable[[Mapping[str, Any], dict[str, torch.Tensor]], list[memoryview] | None]] = {
            "/open": lambda description, _: self._open(service, description),
            "/weights": lambda description, tensors: pack({"digests": service.load(description, tensors)}),
            "/commit": lambda description, _: pack({"sums": service.commit(description)}),
            "/generate": lambda description, tensors: pack_completions(service.generate(description, tensors)),
        }
        body = self._body(self.path in calls)
        if body is None:
            return
        try:
            answer = calls[self.path](*unpack(body))
        except Refusal as error:
            self._refuse(error.status, str(error))
        except MessageError as error:
            self._refuse(400, str(error))
        except UserError as error:
            self._refuse(422, str(error))
        except torch.OutOfMemoryError as error:
            self._refuse(500, out_of_memory(error))
        except Exception as error:
            log.exception("%s failed", self.path)
            self._refuse(500, f"{type(error).__name__}: {first_line(error)}; look at the output of the server")
        else:
            if answer is not None:
                self._answer(answer, CONTENT_TYPE)

    def _service(self) -> Service | None:
        """Return the service. Return None after an answer that refuses a client, or if vLLM is still starting."""
        token = self.server.token
        sent = self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(sent.encode("latin-1", "replace"), f"Bearer {token}".encode()):
            self._refuse(401, f"expected the token of the server, got {'another' if sent else 'none'}; set {TOKEN}")
        # A page in a browser can give its own name the address 127.0.0.1.
        elif not token and not _is_local(urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""):
            host = self.headers.get("Host")
            self._refuse(403, f"expected Host 127.0.0.1 without a token, got {host!r:.80}; set {TOKEN}")
        elif self.server.service is None:
            self._refuse(503, "expected a server that is ready, got one that is starting; wait until it is serving")
        else:
            self.server.admit(self.request)
            self._reader.until = math.inf
            return self.server.service
        return None

    def _body(self, is_known: bool) -> bytearray | None:
        """Read the body of a call. Return None after an answer that refuses it."""
        length = self.headers.get("Content-Length", "")
        if not is_known:
            self._refuse(404, f"expected a call of this protocol, got {self.path!r:.80}")
        # Pages in a browser cannot send this type without asking first.
        elif self.headers.get("Content-Type") != CONTENT_TYPE:
            self._refuse(415, f"expected Content-Type {CONTENT_TYPE}, got {self.headers.get('Content-Type')!r:.80}")
        elif not length.isdecimal():
            self._refuse(411, f"expected a Content-Length, got {length!r:.40}")
        elif int(length) > self.server.most_bytes:
            self._refuse(413, f"expected at most {self.server.most_bytes} bytes, got {int(length)}")
        else:
            body = bytearray(int(length))
            view, done = memoryview(body), 0
            while done < len(body):
                read = self.rfile.readinto(view[done:])
                if not read:
                    self.close_connection = True
                    return None
                done += read
            return body
        return None

    def _open(self, service: Service, description: Mapping[str, Any]) -> None:
        """Serve a run until its connection ends, which the kernel reports even if the run was killed."""
        if type(owner := description.get("owner")) is not str:
            raise MessageError(f"owner: expected the name of a run, got {owner!r:.40}")
        session = service.open(f"{owner[:200]} at {self.client_address[0]}")
        try:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(json.dumps({"session": session, "instance": service.instance}).encode() + b"\n")
            self.connection.settimeout(None)
            while self.connection.recv(1):
                pass
        finally:
            service.close(session)

    def _answer(self, parts: Sequence[bytes | memoryview], kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def _refuse(self, status: int, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        # The body may not have been read.
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
