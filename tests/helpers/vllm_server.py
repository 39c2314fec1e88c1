"""Serve a model folder with a real vLLM server, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# A start takes 1 to 2 minutes on a CPU, most of it to import and to compile.
START_S = 480.0
SHOWN_CHARACTERS = 6000


def vllm_python() -> str:
    """Return the Python that has vLLM: that of RMSD_VLLM_PYTHON, or else this one."""
    path = os.environ.get("RMSD_VLLM_PYTHON") or sys.executable
    assert os.access(path, os.X_OK), f"RMSD_VLLM_PYTHON: expected an interpreter, got {path!r}; run make test-vllm"
    return path


class VllmServer:
    """Run a server on a free loopback port, as a context manager. It ends with all of its processes.

    Args:
        model: folder of the model.
        name: name under which the model is served.
        log: file for the output of the server.
        arguments: further arguments of the server.
    Attributes:
        started_s: seconds that the start took.
    """

    def __init__(self, model: Path, name: str, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.started_s = 0.0
        self._log = log
        self._command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(self.port), *arguments]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> VllmServer:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
        environment["PYTHONPATH"] = str(Path(__file__).parent / "server_site")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._log.parent,
                start_new_session=True,
            )
        started = time.monotonic()
        try:
            while not self._is_healthy():
                code, waited_s = self._process.poll(), time.monotonic() - started
                if code is not None or waited_s > START_S:
                    what = "did not answer" if code is None else f"ended with exit code {code}"
                    raise AssertionError(
                        f"the vLLM server {what} after {waited_s:.0f} s: {' '.join(self._command)}\n"
                        f"{self.log()[-SHOWN_CHARACTERS:]}"
                    )
                time.sleep(0.5)
        except BaseException:
            self._end()
            raise
        self.started_s = time.monotonic() - started
        return self

    def __exit__(self, *exception) -> None:
        self._end()

    def log(self) -> str:
        """Return the output of the server so far."""
        return self._log.read_text(errors="replace")

    def requests(self) -> int:
        """Return the number of chat requests that the server has received, from its log of accesses."""
        return len(re.findall(r'"POST /v1/chat/completions HTTP/1\.1" \d+', self.log()))

    def _is_healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def _end(self) -> None:
        """Stop the server and the processes that it has started; kill those that do not stop within 20 s."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
