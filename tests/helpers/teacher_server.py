"""A chat server on a loopback port that answers or fails as a test's script says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RIGHT = "<think>I look at it.</think><answer>B</answer>"
USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


@dataclass
class Act:
    """What the server does with a request.

    Attributes:
        status, headers, body: the reply.
        kind: "reply", "hang" (no reply), "reset" (the connection breaks in the middle of the body).
        delay_s: pause before the reply.
    """

    body: bytes | dict[str, Any] = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "reply"
    delay_s: float = 0.0


def completion(*texts: str | None, usage: dict | None = USAGE, reason: str = "stop", **message: Any) -> Act:
    """Return a reply with these answers."""
    choices = [
        {"index": i, "finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
        for i, text in enumerate(texts)
    ]
    return Act({"choices": choices, "model": "m", **({"usage": usage} if usage is not None else {})})


def error(status: int, message: str, **headers: str) -> Act:
    return Act({"error": {"message": message}}, status, {name.replace("_", "-"): v for name, v in headers.items()})


def right(request: dict[str, Any], number: int) -> Act:
    """Answer correctly, as often as requested."""
    return completion(*[RIGHT] * request.get("n", 1))


def question_of(request: dict[str, Any]) -> str:
    """Return the texts of the user's turn."""
    return "\n".join(part["text"] for part in request["messages"][-1]["content"] if part["type"] == "text")


class TeacherServer:
    """Run a chat server in a thread, as a context manager.

    Args:
        script: returns what to do with a request, given its body and its number from 0.
    Attributes:
        requests: bodies of all requests.
        headers: header lines of all requests.
        most_in_flight: largest number of requests at a time.
        connections: number of connections.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Act] = right, *, keep: bool = True) -> None:
        self.script, self._keep = script, keep
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.times_s: list[float] = []
        self.count = self.in_flight = self.most_in_flight = self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> TeacherServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        async def start() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**26, backlog=512)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
                )
                body = json.loads(await reader.readexactly(length))
                number, self.count = self.count, self.count + 1
                if self._keep:
                    self.requests.append(body)
                    self.headers.append(head)
                    self.times_s.append(time.monotonic())
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await self._act(self.script(body, number), writer):
                        return
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _act(self, act: Act, writer: asyncio.StreamWriter) -> bool:
        """Write the reply. Return whether the connection stays open."""
        await asyncio.sleep(act.delay_s)
        data = act.body if isinstance(act.body, bytes) else json.dumps(act.body).encode()
        if act.kind == "hang":
            await asyncio.sleep(3600)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **act.headers}
        head = f"HTTP/1.1 {act.status} x\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(head.encode() + b"\r\n")
        if act.kind == "reset":
            writer.write(data[: len(data) // 2])
            await writer.drain()
            writer.transport.abort()
            return False
        writer.write(data)
        await writer.drain()
        return True
